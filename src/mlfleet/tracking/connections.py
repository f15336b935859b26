"""Connections to one server, handed out first come, first served."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    import httpx

    from mlfleet.tracking.wire import AiohttpTransport

__all__ = ["Connections", "Line"]


@dataclass(frozen=True, slots=True)
class Line:
    """The way to a server.

    Attributes:
        wire: for requests with small answers.
        client: over the same wire, for all else.
    """

    wire: AiohttpTransport
    client: httpx.AsyncClient


class Connections:
    """Up to `count` requests at a time.

    Attributes:
        count: of connections.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._turns = anyio.Semaphore(count)
        self._line: Line | None = None

    def prepare(self, line: Line) -> None:
        """Take the way to send requests by. Nothing is connected yet."""
        self._line = line

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Line]:
        """Wait for our turn, and hold it for one request."""
        async with self._turns:
            if self._line is None:
                raise RuntimeError("the connections are closed")
            yield self._line

    async def close(self) -> None:
        """Close those that are connected."""
        line, self._line = self._line, None
        if line is not None:
            await line.client.aclose()
