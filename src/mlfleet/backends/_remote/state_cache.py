"""The latest states of many remote things, fed by one watcher, so that no run needs a poll of its own."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Awaitable, Callable
from contextvars import Context
from types import TracebackType
from typing import Generic, Self, TypeVar

import anyio

from mlfleet._concurrency.cancellation import wait_done
from mlfleet._run_log import get_logger
from mlfleet.errors import BackendError, MlfleetError

__all__ = ["CachedState", "StateCache"]

_log = get_logger("mlfleet.watch")

V = TypeVar("V")


class CachedState(Generic[V]):
    """The latest state of one thing. Waiters see states, not changes.

    Each waiter's condition is tested when a state arrives, so that states which nobody waits for wake no task.

    Attributes:
        value: The latest state; None before the first one is known.
    """

    __slots__ = ("_error", "_users", "_waiters", "value")

    def __init__(self) -> None:
        self.value: V | None = None
        self._users = 0
        self._error: MlfleetError | None = None
        self._waiters: dict[asyncio.Future[V], Callable[[V], bool]] = {}

    async def until(self, accept: Callable[[V], bool]) -> V:
        """Wait for a state for which `accept` returns True, and return it. Any number of tasks may wait.

        Args:
            accept: A quick function that is called with the current state and every new one.

        Raises:
            MlfleetError: The watcher has ended, so that there will be no further state.
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
                waiter.exception()  # retrieve it: asyncio logs an error that nobody retrieved

    def put(self, value: V) -> None:
        """Set the state and wake the waiters that accept it."""
        self.value = value
        for waiter, accept in tuple(self._waiters.items()):
            if not waiter.done():
                try:
                    wanted = accept(value)
                except Exception as error:  # the fault of the waiter and not of the watcher
                    waiter.set_exception(error)
                else:
                    if wanted:
                        waiter.set_result(value)

    def fail(self, error: MlfleetError) -> None:
        """Raise `error` in all waiters, since there will be no further state."""
        self._error = error
        for waiter in self._waiters:
            if not waiter.done():
                told = copy.copy(error)
                told.__cause__ = error
                waiter.set_exception(told)


class StateCache(Generic[V]):
    """A cache of states by key, and the one task that feeds it.

    The feeder calls `put` for each state that has changed. A state is kept for as long as its key is tracked. When the
    feeder ends, by an error or otherwise, all waiters and all later ones get an error.

    Args:
        feed: A coroutine function that runs until it is cancelled, and reconnects by itself. Its error becomes that of
            all waiters.
        name: The name of its task.

    Attributes:
        error: The error with which the feeder has ended; None while it runs.

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
        self.error: MlfleetError | None = None
        self._wanted = anyio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=self._name, context=Context())
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

    # ---- for waiters ------------------------------------------------------------------------------------------------

    def track(self, key: str) -> CachedState[V]:
        """Keep the state of `key` from now on. Every call needs a call of `untrack`."""
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = CachedState()
            if self.error is not None:
                cell.fail(self.error)
        cell._users += 1
        self._wanted.set()
        return cell

    def untrack(self, key: str) -> None:
        """Undo one call of `track`."""
        cell = self._cells[key]
        cell._users -= 1
        if cell._users == 0:
            del self._cells[key]
            if not self._cells:
                self._wanted = anyio.Event()

    # ---- for the feeder ---------------------------------------------------------------------------------------------

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are tracked now."""
        return tuple(self._cells)

    async def wanted(self) -> None:
        """Wait until a key is tracked, so that the feeder need not poll for nothing."""
        await self._wanted.wait()

    def get(self, key: str) -> V | None:
        """Return the latest state of `key`; None if it is unknown or not tracked."""
        cell = self._cells.get(key)
        return None if cell is None else cell.value

    def put(self, key: str, value: V) -> None:
        """Set the state of `key`, if it is tracked."""
        cell = self._cells.get(key)
        if cell is not None:
            cell.put(value)

    async def _run(self) -> None:
        error: MlfleetError = BackendError(f"{self._name} has ended")
        try:
            while not self._closing:
                # asyncio.run cancels every task at its end; tasks that clean up then still need states.
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
            self.error = error
            for cell in tuple(self._cells.values()):
                cell.fail(error)
