"""The points of a sweep: one by one from their space, and a limited number at a time."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Iterator, Mapping, Sized
from typing import Any

import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet.errors import UsageError
from mlfleet.spaces import Point, Points, Space

__all__ = ["Gate", "Source", "point_key"]


class Gate:
    """A limit to the number of active points, first come, first served. It can be resized and paused.

    Args:
        size: The number of points that may be active at the same time.

    Attributes:
        size: The present limit.
        paused: True while no further points are admitted.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.paused = False
        self._is_open = False
        self._inside = 0
        self._waiting: deque[anyio.Event] = deque()

    async def enter(self) -> None:
        """Wait for a slot and take it. A cancelled call takes none."""
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
        """Give a slot back."""
        self._inside -= 1
        self._admit()

    def resize(self, size: int) -> None:
        """Change the limit. Active points keep their slots."""
        self.size = size
        self._admit()

    def pause(self, paused: bool) -> None:
        """Admit no further points (True), or admit them again (False)."""
        self.paused = paused
        self._admit()

    def open(self) -> None:
        """Admit all points from now on, beyond the limit."""
        self._is_open = True
        self._admit()

    def _admit(self) -> None:
        while self._waiting and (self._is_open or (not self.paused and self._inside < self.size)):
            self._inside += 1
            self._waiting.popleft().set()


class Source:
    """A reader of the points of a space.

    Args:
        points: The space.

    Raises:
        UsageError: The value cannot be a space.

    Attributes:
        adaptive: True if the next point may depend on the results of earlier ones, as with any asynchronous iterable
            of the caller.
    """

    def __init__(self, points: Points) -> None:
        given: object = points
        if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable | AsyncIterable):
            raise UsageError(
                f"the space of the sweep is {points!r}: give grid(…), sample(…), rows(…), or an iterable of mappings"
            )
        self.adaptive = isinstance(points, AsyncIterable) and not isinstance(points, Space)
        self._points = points
        self._iterator: AsyncIterator[Point] | Iterator[Point] | None = None
        self._count = 0

    async def total(self) -> int | None:
        """Return the number of points, or None if it is not known before all are pulled."""
        points = self._points
        return await FILES.run(lambda: len(points)) if isinstance(points, Sized) else None

    async def next(self) -> Point | None:
        """Return the next point, or None at the end. Errors that the space raises are not wrapped.

        Raises:
            UsageError: The point is not a mapping of names to values.
        """
        if self._iterator is None:
            points = self._points
            self._iterator = aiter(points) if isinstance(points, AsyncIterable) else iter(points)
        if isinstance(self._iterator, AsyncIterator):
            point = await anext(self._iterator, None)
        else:
            point = next(self._iterator, None)
        if point is None:
            return None
        if not _is_point(point):
            raise UsageError(f"point {self._count} of the space is {point!r}: give a mapping of names to values")
        self._count += 1
        return point

    async def close(self) -> None:
        """Close the space if it is a generator."""
        iterator = self._iterator
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()
        elif isinstance(iterator, Generator):
            iterator.close()


def _is_point(point: object) -> bool:
    return isinstance(point, Mapping) and all(isinstance(name, str) for name in point)


def point_key(content: str, entry_point: str, parameters: Mapping[str, Any]) -> str:
    """Return the key by which a point is recognised when its sweep is resumed.

    Args:
        content: The commit or the content hash of the project.
        entry_point: The name of the entry point.
        parameters: All parameters of the run.
    """
    named = sorted((name, str(value)) for name, value in parameters.items())
    return hashlib.sha256(json.dumps([content, entry_point, named]).encode()).hexdigest()[:32]
