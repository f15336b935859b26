"""How many points of a sweep may be on their way at once; it can be changed while they are."""

from __future__ import annotations

from collections import deque

import anyio

__all__ = ["Gate"]


class Gate:
    """First come, first served.

    Args:
        size: how many may be inside.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.paused = False
        self._is_open = False
        self._inside = 0
        self._waiting: deque[anyio.Event] = deque()

    async def enter(self) -> None:
        """Wait for a place. A cancelled call takes none."""
        turn = anyio.Event()
        self._waiting.append(turn)
        self._admit()
        try:
            await turn.wait()
        except anyio.get_cancelled_exc_class():
            if turn.is_set():
                self.leave()
            else:
                self._waiting.remove(turn)
            raise

    def leave(self) -> None:
        """Give a place back."""
        self._inside -= 1
        self._admit()

    def resize(self, size: int) -> None:
        """Let so many in; those who are inside stay there."""
        self.size = size
        self._admit()

    def pause(self, paused: bool) -> None:
        """Let nobody in for a while."""
        self.paused = paused
        self._admit()

    def open(self) -> None:
        """Let everybody in from now on."""
        self._is_open = True
        self._admit()

    def _admit(self) -> None:
        while self._waiting and (self._is_open or (not self.paused and self._inside < self.size)):
            self._inside += 1
            self._waiting.popleft().set()
