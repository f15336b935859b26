"""Work that concurrent callers share: one call at a time for each key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

import anyio

from mlfleet._concurrency.cancellation import wait_done

__all__ = ["Coalescing", "SingleFlight"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Runs one piece of work per key for any number of concurrent callers of one event loop.

    A cancelled caller leaves the work to the others. When the last caller is cancelled, the work is cancelled and
    awaited. All callers get an error of the work, and the next call starts it anew.

    Args:
        keep: Keep results for all later calls. Default: the next call after the end of the work starts it anew.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self._flights: dict[K, _Flight[V]] = {}

    async def __call__(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        """Return the result of the work of a key, which is started if it is not in progress.

        The work runs in a task of its own with the context variables of the first caller.

        Args:
            key: The key of the work.
            work: Called without arguments if the work has to be started.

        Raises:
            RuntimeError: The task of the work was cancelled by somebody else.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = _Flight(asyncio.ensure_future(_run(work)))
            self._flights[key] = flight
            started = flight
            flight.task.add_done_callback(lambda _: self._landed(key, started))
        flight.callers += 1
        try:
            await flight.landed.wait()
        except asyncio.CancelledError:
            if flight.callers == 1 and not flight.task.done():
                self._forget(key, flight)
                flight.task.cancel()
                await wait_done(flight.task)
            raise
        finally:
            flight.callers -= 1
        return _result(flight.task)

    def release(self, key: K) -> None:
        """Let the next call start new work, even if work of that key is in progress."""
        self._flights.pop(key, None)

    def _landed(self, key: K, flight: _Flight[V]) -> None:
        flight.landed.set()
        failed = flight.task.cancelled() or flight.task.exception() is not None
        if failed or not self._keep:
            self._forget(key, flight)

    def _forget(self, key: K, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class Coalescing(Generic[K, V]):
    """A `SingleFlight` in which calls made while a call is in progress share the next one.

    So a result never predates its caller, and hundreds of concurrent callers cost a few calls.
    """

    def __init__(self) -> None:
        self._next: SingleFlight[K, V] = SingleFlight()
        self._locks: WeakValueDictionary[K, anyio.Lock] = WeakValueDictionary()

    async def __call__(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        """Return the result of work of a key that begins after this call. See `SingleFlight`."""
        return await self._next(key, partial(self._in_turn, key, work))

    async def _in_turn(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        async with self._locks.setdefault(key, anyio.Lock()):
            self._next.release(key)
            return await work()


class _Flight(Generic[V]):
    """Work in progress, and the number of its callers."""

    __slots__ = ("callers", "landed", "task")

    def __init__(self, task: asyncio.Task[V]) -> None:
        self.task = task
        # Hundreds may wait: an event costs each of them one future, `asyncio.shield` a future and two callbacks.
        self.landed = anyio.Event()
        self.callers = 0


async def _run(work: Callable[[], Awaitable[V]]) -> V:
    return await work()


def _result(task: asyncio.Task[V]) -> V:
    if task.cancelled():
        # A CancelledError would look like a cancellation of the caller, and its task group would swallow it.
        raise RuntimeError("the shared work was cancelled from outside")
    return task.result()
