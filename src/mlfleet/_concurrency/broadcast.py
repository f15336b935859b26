"""One writer, any number of readers, each with a bounded buffer of its own."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, Self, TypeVar
from weakref import WeakSet

__all__ = ["Broadcast", "Subscription"]

T = TypeVar("T")


class Subscription(Generic[T]):
    """What one reader has still to read. Iterate it asynchronously; it ends when the writer closes.

    To forget it is enough to leave it.
    """

    def __init__(self, size: int, mark: Callable[[T, int], T]) -> None:
        self._size = size
        self._mark = mark
        self._items: deque[T] = deque()
        self._lost = 0
        self._closed = False
        self._changed = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            await self._changed.wait()
        item = self._items.popleft()
        if not self._lost:
            return item
        lost, self._lost = self._lost, 0
        return self._mark(item, lost)

    def _put(self, item: T) -> None:
        if len(self._items) >= self._size:
            self._items.popleft()
            self._lost += 1
        self._items.append(item)
        self._wake()

    def _close(self) -> None:
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Broadcast(Generic[T]):
    """Gives every item to every reader.

    Args:
        mark: makes of an item and a number the same item that says so: as many were dropped right before it.
    """

    def __init__(self, mark: Callable[[T, int], T]) -> None:
        self._mark = mark
        self._readers: WeakSet[Subscription[T]] = WeakSet()
        self._closed = False

    def subscribe(self, size: int) -> Subscription[T]:
        """A reader that gets all items from now on.

        Args:
            size: how many are kept for it; of more, the oldest are dropped.
        """
        reader = Subscription(size, self._mark)
        if self._closed:
            reader._close()
        self._readers.add(reader)
        return reader

    @property
    def has_readers(self) -> bool:
        """Whether anybody gets what is published now."""
        return bool(self._readers)

    def publish(self, item: T) -> None:
        """Give an item to all readers; never waits for them."""
        for reader in self._readers:
            reader._put(item)

    def close(self) -> None:
        """Let all readers end when they have read what is there."""
        self._closed = True
        for reader in self._readers:
            reader._close()
