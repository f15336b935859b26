"""What goes wrong with a request. What cannot be sent at all is a `ValueError`."""

from __future__ import annotations

__all__ = ["BrokenAnswer", "CannotConnect", "SilentServer"]


class CannotConnect(ConnectionError):
    """There is no connection: nothing was sent. Its cause tells why, where the system did."""


class BrokenAnswer(ConnectionError):
    """The connection broke, or what came is no HTTP. The server may have done what it was asked."""


class SilentServer(TimeoutError):
    """Nothing came for too long. The server may have done what it was asked."""
