"""A throttle for hundreds of tasks that one event resumes."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Throttle"]

_RESUMED_AT_ONCE = 2  # tasks, whose steps take some tenths of a millisecond each


class Throttle:
    """Resumes at most two waiting tasks per iteration of the event loop, first come, first served.

    An event that resumes hundreds of tasks at once keeps the loop from everything else until each has had its step.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Wait until all earlier callers were resumed, and at least for one iteration of the loop."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._resume_some)
        self._waiting.append(turn)
        await turn

    def _resume_some(self) -> None:
        resumed = 0
        while self._waiting and resumed < _RESUMED_AT_ONCE:
            turn = self._waiting.popleft()
            if not turn.done():  # else its task was cancelled
                turn.set_result(None)
                resumed += 1
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._resume_some)
