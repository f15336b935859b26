"""Connections to one server, handed out first come, first served."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import httpx

    from mlfleet.tracking.wire import Wire

__all__ = ["Connections", "Line"]

T = TypeVar("T")


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

    Who may get what it wants without a turn of its own uses `wait`, and `release` if it got a turn.

    Attributes:
        count: of connections.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = count
        self._waiting: OrderedDict[asyncio.Future[Any], None] = OrderedDict()
        self._line: Line | None = None

    def prepare(self, line: Line) -> None:
        """Take the way to send requests by. Nothing is connected yet."""
        self._line = line

    @property
    def line(self) -> Line:
        """The way to send requests by, for one who holds a turn."""
        if self._line is None:
            raise RuntimeError("the connections are closed")
        return self._line

    async def __aenter__(self) -> Line:
        await self.wait(asyncio.get_running_loop().create_future())
        try:
            return self.line
        except RuntimeError:
            self.release()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    async def wait(self, turn: asyncio.Future[T | None]) -> T | None:
        """Wait for a turn, whose end is `release`.

        Args:
            turn: to be used once.

        Returns:
            None: it is our turn. Else what somebody made the result of `turn` meanwhile.
        """
        self.queue(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            self.leave(turn)
            if not turn.cancelled() and turn.result() is None:
                self.release()
            raise

    def queue(self, turn: asyncio.Future[T | None], *, first: bool = False) -> None:
        """Let `turn` wait, behind all others or before them."""
        self._waiting[turn] = None
        if first:
            self._waiting.move_to_end(turn, last=False)
        self._give()

    def leave(self, turn: asyncio.Future[T | None]) -> None:
        """Let `turn` wait no longer; nothing becomes of it unless somebody gives it a result, or lets it wait again."""
        self._waiting.pop(turn, None)

    def release(self) -> None:
        """End a turn."""
        self._free += 1
        self._give()

    def _give(self) -> None:
        while self._free and self._waiting:
            turn, _ = self._waiting.popitem(last=False)
            if not turn.done():  # nobody was cancelled meanwhile
                self._free -= 1
                turn.set_result(None)

    async def close(self) -> None:
        """Close those that are connected."""
        line, self._line = self._line, None
        if line is not None:
            await line.client.aclose()
