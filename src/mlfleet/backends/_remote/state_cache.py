"""The latest state of many remote things, fed by one watcher: nobody polls for a single run."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Generic, Self, TypeVar

import anyio

from mlfleet._concurrency.cancellation import wait_done
from mlfleet.errors import BackendError, MlfleetError

__all__ = ["CachedState", "StateCache"]

_log = logging.getLogger("mlfleet.watch")

V = TypeVar("V")


class CachedState(Generic[V]):
    """The latest state of one thing. Waiters see states, not changes.

    Whether a state is the one that a waiter wants is decided when it comes, so that hundreds of states which nobody
    waits for wake nobody.

    Attributes:
        value: the latest state; None before the first one is known.
    """

    __slots__ = ("_error", "_users", "_waiters", "born", "value")

    def __init__(self, born: int) -> None:
        self.born = born
        self.value: V | None = None
        self._users = 0
        self._error: MlfleetError | None = None
        self._waiters: dict[asyncio.Future[V], Callable[[V], bool]] = {}

    async def until(self, accept: Callable[[V], bool]) -> V:
        """Wait for a state that `accept` takes, and return it; at once if it is there. Any number of waiters.

        Args:
            accept: is asked by whoever has a new state; must be quick.

        Raises:
            MlfleetError: the watcher has ended, so that no state will come any more.
        """
        if self.value is not None and accept(self.value):
            return self.value
        if self._error is not None:
            raise copy.copy(self._error) from self._error
        waiter: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = accept
        try:
            return await waiter
        finally:
            self._waiters.pop(waiter, None)
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # asked for, so that nobody is told of it whose waiter was cancelled meanwhile

    def put(self, value: V) -> None:
        """Set the state and wake those who wait for it."""
        self.value = value
        for waiter, accept in tuple(self._waiters.items()):
            if not waiter.done():
                try:
                    wanted = accept(value)
                except Exception as error:  # the waiter's own fault, not that of whoever has the news
                    waiter.set_exception(error)
                else:
                    if wanted:
                        waiter.set_result(value)

    def fail(self, error: MlfleetError) -> None:
        """Tell the waiters that no further state will come."""
        self._error = error
        for waiter in self._waiters:
            if not waiter.done():
                told = copy.copy(error)
                told.__cause__ = error
                waiter.set_exception(told)


class StateCache(Generic[V]):
    """A cache of states by key, and the one task that feeds it.

    What feeds it calls `put` for a state that has changed, and `replace` for a complete list. A state is kept for as
    long as somebody tracks its key; of what nobody tracks, nothing is kept. When the feeder ends, by an error or
    otherwise, everybody who waits is told so, and everybody who comes later.

    Args:
        feed: runs until it is cancelled, and sees to reconnecting itself. Its error is that of all waiters.
        name: of its task.

    Example:
        >>> async with StateCache(feed, name="containers") as watch:
        ...     cell = watch.track(key)
        ...     try:
        ...         state = await cell.until(lambda state: state.ended)
        ...     finally:
        ...         watch.untrack(key)
    """

    def __init__(self, feed: Callable[[StateCache[V]], Awaitable[None]], *, name: str) -> None:
        self._feed = feed
        self._name = name
        self._cells: dict[str, CachedState[V]] = {}
        self._clock = itertools.count()
        self._error: MlfleetError | None = None
        self._wanted = anyio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=self._name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task = self._task
        if task is None:
            return
        self._closing = True
        task.cancel()
        cancelled = await wait_done(task)
        if cancelled is not None:
            raise cancelled

    # ---- for those who wait -----------------------------------------------------------------------------------------

    def track(self, key: str) -> CachedState[V]:
        """Keep the state of `key` from now on; `untrack` as often as this was called."""
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = CachedState(next(self._clock))
            if self._error is not None:
                cell.fail(self._error)
        cell._users += 1
        self._wanted.set()
        return cell

    def untrack(self, key: str) -> None:
        """Take back one `track`."""
        cell = self._cells[key]
        cell._users -= 1
        if cell._users == 0:
            del self._cells[key]
            if not self._cells:
                self._wanted = anyio.Event()

    # ---- for what feeds it ------------------------------------------------------------------------------------------

    @property
    def keys(self) -> tuple[str, ...]:
        """What is tracked now."""
        return tuple(self._cells)

    async def wanted(self) -> None:
        """Wait until something is tracked, so that a poll for nothing can be spared."""
        await self._wanted.wait()

    def get(self, key: str) -> V | None:
        """The latest state of `key`; None if there is none, or nobody tracks it."""
        cell = self._cells.get(key)
        return None if cell is None else cell.value

    def put(self, key: str, value: V) -> None:
        """A new state of `key`."""
        cell = self._cells.get(key)
        if cell is not None:
            cell.put(value)

    def now(self) -> int:
        """A moment, to be taken before a list is asked for and given to `replace` with its answer."""
        return next(self._clock)

    def replace(self, values: Mapping[str, V], *, asked_at: int, gone: Callable[[V | None], V]) -> None:
        """Take over a complete list of states.

        Args:
            values: all there are.
            asked_at: `now()` before the list was asked for: what is tracked since then may not be in it yet.
            gone: makes the new state of what is tracked, but not in the list, from its last one.
        """
        for key, cell in tuple(self._cells.items()):
            if key in values:
                cell.put(values[key])
            elif cell.born < asked_at:
                cell.put(gone(cell.value))

    async def _run(self) -> None:
        error: MlfleetError = BackendError(f"{self._name} has ended")
        try:
            while not self._closing:
                # asyncio.run cancels every task at its end; those who clean up then still need to hear of states.
                with contextlib.suppress(asyncio.CancelledError):
                    await self._feed(self)
                    break
        except MlfleetError as reason:
            error = reason
        except Exception as reason:
            _log.exception("%s has failed", self._name)
            error = BackendError(f"{self._name} has failed: {type(reason).__name__}: {reason}")
            error.__cause__ = reason
        finally:
            self._error = error
            for cell in tuple(self._cells.values()):
                cell.fail(error)
