"""Single flight: one piece of work for all who ask for it at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

from mlfleet._concurrency.cancellation import wait_done

__all__ = ["Coalescing", "SingleFlight"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Runs one piece of work per key for any number of concurrent callers of one event loop.

    A cancelled caller leaves the work to the others; when the last one is gone, the work is cancelled and awaited. An
    error goes to all who wait, and the next caller starts anew. A result is forgotten as soon as it was handed out,
    unless `keep`.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self._flights: dict[K, _Flight[V]] = {}

    async def __call__(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        """The result of the work of that key, which is started if it is not under way.

        The work runs in a task of its own, so that it belongs to all callers: what it reads from context variables are
        the first caller's.
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
        """Let those who come from now on start work of their own."""
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
    """Like `SingleFlight`, but calls made while a call is in progress share the next one.

    So a result never predates its caller, and hundreds of callers at the same time cost a few calls.
    """

    def __init__(self) -> None:
        self._next: SingleFlight[K, V] = SingleFlight()
        self._locks: WeakValueDictionary[K, asyncio.Lock] = WeakValueDictionary()

    async def __call__(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        """The result of work of that key that begins after this call."""
        return await self._next(key, partial(self._in_turn, key, work))

    async def _in_turn(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        async with self._locks.setdefault(key, asyncio.Lock()):
            self._next.release(key)
            return await work()


class _Flight(Generic[V]):
    """Work under way, and how many wait for it."""

    __slots__ = ("callers", "landed", "task")

    def __init__(self, task: asyncio.Task[V]) -> None:
        self.task = task
        self.landed = asyncio.Event()  # hundreds wait for it
        self.callers = 0


async def _run(work: Callable[[], Awaitable[V]]) -> V:
    return await work()


def _result(task: asyncio.Task[V]) -> V:
    if task.cancelled():
        # Not a cancellation of the caller, who must not mistake it for one (a task group would swallow it).
        raise RuntimeError("the shared work was cancelled from outside")
    return task.result()
