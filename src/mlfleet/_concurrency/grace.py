"""The grace of a stop: the time between the request to stop and the end by force."""

from __future__ import annotations

import asyncio

import anyio

__all__ = ["StopRequest"]


class StopRequest:
    """A request to stop that may be repeated. Of several requests the shortest grace counts.

    A handle keeps one `StopRequest`, calls `request` in its ``cancel`` method, and lets the task that ends the run use
    the rest::

        await self._stop.requested()
        ...  # ask the run to stop (SIGTERM)
        await self._stop.expired()
        ...  # end it by force (SIGKILL)

    Args:
        default_grace: Seconds between the request to stop and the end by force, for requests that name none.

    Attributes:
        deadline: The time of the event loop (``loop.time()``, the same as ``anyio.current_time()``) at which the grace
            ends; None before the first request.
    """

    __slots__ = ("_changed", "_default_grace", "deadline")

    def __init__(self, default_grace: float) -> None:
        self._default_grace = default_grace
        self._changed: anyio.Event | None = None
        self.deadline: float | None = None

    @property
    def is_requested(self) -> bool:
        """True once `request` was called."""
        return self.deadline is not None

    @property
    def remaining(self) -> float | None:
        """The seconds that are left of the grace, 0 if it has ended; None before the first request."""
        return None if self.deadline is None else max(0.0, self.deadline - _now())

    def request(self, grace: float | None = None) -> bool:
        """Request the stop. Never blocks, and may be called from callbacks of the event loop.

        Args:
            grace: Seconds from now until the end by force; None: the default grace.

        Returns:
            True if this moved the deadline: it was the first request, or its grace ends earlier.
        """
        deadline = _now() + (self._default_grace if grace is None else grace)
        if self.deadline is not None and deadline >= self.deadline:
            return False
        self.deadline = deadline
        if self._changed is not None:
            self._changed.set()
            self._changed = None
        return True

    async def requested(self) -> None:
        """Wait for the first request."""
        while self.deadline is None:
            await self.changed()

    async def changed(self) -> None:
        """Wait for the next request that moves the deadline."""
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()

    async def expired(self) -> None:
        """Wait for the first request and then for the end of the grace, which further requests may shorten."""
        await self.requested()
        while remaining := self.remaining:
            with anyio.move_on_after(remaining):
                await self.changed()


def _now() -> float:
    # Not anyio.current_time(), which fails in callbacks of the event loop: they belong to no task.
    return asyncio.get_running_loop().time()
