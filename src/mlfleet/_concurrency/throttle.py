"""Throttle, for hundreds of tasks that would all go on at once."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Throttle"]

_AT_ONCE = 2  # of some tenths of a millisecond each


class Throttle:
    """Lets tasks go on a few in each turn of the event loop, so that whatever else it has to do comes in between.

    A single event that wakes hundreds of tasks keeps the loop from everything else until all of them have had their
    step. First come, first served.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Wait for our turn."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._give)
        self._waiting.append(turn)
        await turn

    def _give(self) -> None:
        given = 0
        while self._waiting and given < _AT_ONCE:
            turn = self._waiting.popleft()
            if not turn.done():  # nobody was cancelled meanwhile
                turn.set_result(None)
                given += 1
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._give)
