"""Connections to one server, handed out first come, first served."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    import httpx

    from mlfleet.tracking.wire import Wire

__all__ = ["Connections", "Line"]


@dataclass(frozen=True, slots=True)
class Line:
    """The way to a server.

    Attributes:
        wire: for requests with small answers.
        client: over the same wire, for all else.
    """

    wire: Wire
    client: httpx.AsyncClient


class Connections:
    """Up to `count` requests at a time: ``async with connections as line`` waits for a turn, and holds it for one.

    Attributes:
        count: of connections.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._turns = anyio.Semaphore(count, fast_acquire=True)
        self._line: Line | None = None

    def prepare(self, line: Line) -> None:
        """Take the way to send requests by. Nothing is connected yet."""
        self._line = line

    async def __aenter__(self) -> Line:
        await self._turns.acquire()
        if self._line is None:
            self._turns.release()
            raise RuntimeError("the connections are closed")
        return self._line

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turns.release()

    async def close(self) -> None:
        """Close those that are connected."""
        line, self._line = self._line, None
        if line is not None:
            await line.client.aclose()
