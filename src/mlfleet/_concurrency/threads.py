"""Blocking work in threads, and waiting that a cancellation cannot tear."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Generic, Literal, TypeVar

import anyio

__all__ = ["Threads", "outlast"]

V = TypeVar("V")


async def outlast(future: asyncio.Future[V]) -> asyncio.CancelledError | None:
    """Wait until `future` is done, also when the calling task is cancelled, however often.

    An anyio scope's shield holds off that scope's own cancellation, but not ``task.cancel()``; this holds off both.

    Returns:
        The cancellation that came meanwhile, which the caller raises when its work is done.
    """
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = error
    return cancelled


class Threads:
    """Up to `count` threads of each event loop for one kind of blocking work, so that no other kind can starve it.

    They are threads of its own rather than anyio's or the loop's: a fan-out of hundreds of runs goes through here for
    each of them, and a limiter, a copied context and a second message to the loop would cost it several times as much.
    """

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._count = count
        self._crews: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Crew] = weakref.WeakKeyDictionary()

    async def __call__(self, function: Callable[[], V], *, undo: Callable[[V], Awaitable[None]] | None = None) -> V:
        """Call `function` in a thread.

        A call that is cancelled before a thread took it does not happen. One that a thread is busy with is awaited
        first, since it cannot be stopped.

        Args:
            function: the blocking work.
            undo: takes back a result that nobody will get any more. No cancellation tears it; its error is raised
                rather than the cancellation.
        """
        loop = asyncio.get_running_loop()
        crew = self._crews.get(loop)
        if crew is None:
            crew = self._crews[loop] = _Crew(self._name, self._count)
        call = _Call(function, loop, crew)
        crew.take(call)
        try:
            return await call.done
        except asyncio.CancelledError:
            if not call.withdraw():
                result = call.outcome()
                await outlast(result)
                if result.exception() is None and undo is not None:
                    undone = asyncio.ensure_future(undo(result.result()))
                    await outlast(undone)
                    undone.result()
            raise

    async def clean_up(self, work: Callable[[], None]) -> None:
        """Call `work` in a thread and wait for its end, although the caller is cancelled."""
        task = asyncio.ensure_future(self(work))
        cancelled = await outlast(task)
        task.result()
        if cancelled is not None:
            raise cancelled

    @asynccontextmanager
    async def opened(self, path: Path, mode: Literal["rb", "wb"]) -> AsyncIterator[IO[bytes]]:
        """Open a file in a thread, and close it there; a caller that is cancelled leaves none open."""

        async def undo(file: IO[bytes]) -> None:
            await self(file.close)

        file: IO[bytes] = await self(lambda: path.open(mode), undo=undo)
        try:
            yield file
        finally:
            await self.clean_up(file.close)


class _Crew:
    """The threads of one event loop; all but their work itself happens in that loop.

    They end when the loop is gone.
    """

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._count = count
        self._threads = 0
        self._queue: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self.under_way = 0

    def take(self, call: _Call[Any]) -> None:
        """Have the call made, in its turn."""
        if self._threads <= self.under_way and self._threads < self._count:
            self._grow()
        self.under_way += 1
        self._queue.put(call)

    def _grow(self) -> None:
        thread = threading.Thread(target=_work, args=(self._queue,), name=f"mlfleet {self._name}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the limit is reached: those that are there do it
            if self._threads == 0:
                raise
            return
        self._threads += 1
        weakref.finalize(self, self._queue.put, None).atexit = False


def _work(queue: SimpleQueue[_Call[Any] | None]) -> None:
    while (call := queue.get()) is not None:
        call.run()
        del call  # which knows the loop


class _Call(Generic[V]):
    """A call for a thread that can be withdrawn until the thread takes it."""

    __slots__ = ("_crew", "_error", "_function", "_has_ended", "_loop", "_result", "_taken", "done")

    def __init__(self, function: Callable[[], V], loop: asyncio.AbstractEventLoop, crew: _Crew) -> None:
        self._function = function
        self._loop = loop
        self._crew = crew
        self._taken = threading.Lock()
        self._has_ended = False
        self._result: V | None = None
        self._error: BaseException | None = None
        self.done: asyncio.Future[V] = loop.create_future()

    def run(self) -> None:
        if self._taken.acquire(blocking=False):
            try:
                self._result = self._function()
            except BaseException as error:
                self._error = error
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    def withdraw(self) -> bool:
        """Keep any thread from taking the call. False: one has taken it."""
        return self._taken.acquire(blocking=False)

    def outcome(self) -> asyncio.Future[V]:
        """What becomes of it after all, for one whose wait for `done` was cancelled."""
        self.done = self._loop.create_future()
        if self._has_ended:
            self._tell()
        return self.done

    def _end(self) -> None:
        self._has_ended = True
        self._crew.under_way -= 1
        if not self.done.done():
            self._tell()

    def _tell(self) -> None:
        if self._error is not None:
            self.done.set_exception(self._error)
        else:
            self.done.set_result(self._result)  # type: ignore[arg-type]
