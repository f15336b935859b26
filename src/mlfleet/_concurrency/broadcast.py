"""Items from one writer to any number of readers, each with a bounded buffer of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Self, TypeVar
from weakref import WeakSet

import anyio

__all__ = ["Broadcast", "Subscription"]

T = TypeVar("T")


class Subscription(Generic[T]):
    """The items that one reader has not read yet, for ``async for``.

    The iteration ends when the writer closes. Dropping the last reference to a reader removes it.
    """

    def __init__(self, size: int, mark: Callable[[T, int], T]) -> None:
        self._size = size
        self._mark = mark
        self._items: deque[T] = deque()
        self._lost = 0
        self._closed = False
        self._changed: anyio.Event | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            if self._changed is None:
                self._changed = anyio.Event()
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
        if self._changed is not None:
            self._changed.set()
            self._changed = None


class Broadcast(Generic[T]):
    """A writer that gives every item to every reader.

    Args:
        mark: Called with an item and the number of items that were dropped right before it. It returns the item with
            that number noted.
    """

    def __init__(self, mark: Callable[[T, int], T]) -> None:
        self._mark = mark
        self._readers: WeakSet[Subscription[T]] = WeakSet()
        self._closed = False

    def subscribe(self, size: int) -> Subscription[T]:
        """Return a reader of all items from now on.

        Args:
            size: The number of items that are kept for the reader. If there are more, the oldest are dropped.
        """
        reader = Subscription(size, self._mark)
        if self._closed:
            reader._close()
        self._readers.add(reader)
        return reader

    def publish(self, item: T) -> None:
        """Give an item to all readers, without waiting for them."""
        for reader in self._readers:
            reader._put(item)

    def close(self) -> None:
        """End the iteration of all readers after the items that they still have."""
        self._closed = True
        for reader in self._readers:
            reader._close()
