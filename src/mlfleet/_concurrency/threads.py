"""Blocking work in threads, with a limit for each kind of work so that none can starve another."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Generic, Literal, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from mlfleet._concurrency.cancellation import complete, wait_done

__all__ = [
    "FILES",
    "LOGINS",
    "PLUGIN_QUESTIONS",
    "PLUGIN_SUBMITS",
    "PROCESSES",
    "PROJECTS",
    "SESSIONS",
    "STORES",
    "TERMINAL",
    "TRANSFERS",
    "ThreadLimiter",
]

T = TypeVar("T")


class ThreadLimiter:
    """Runs blocking functions in anyio's worker threads, a limited number at a time in each event loop.

    Args:
        name: The kind of work.
        count: How many functions may run at the same time. Others wait, first come, first served.
    """

    def __init__(self, name: str, count: int) -> None:
        self._count = count
        self._limiter: RunVar[anyio.CapacityLimiter] = RunVar(f"mlfleet thread limiter {name}")

    async def run(self, function: Callable[[], T], *, undo: Callable[[T], Awaitable[None]] | None = None) -> T:
        """Call `function` in a thread.

        A call that is cancelled before its thread began does not happen. A thread that has begun cannot be stopped: the
        cancelled caller waits for its end.

        Args:
            function: The blocking work.
            undo: Called with the result of a call whose caller was cancelled, to take it back; awaited through any
                further cancellation. Its error is raised instead of the cancellation. Default: the result is dropped.
        """
        call: _Call[T] = _Call(function)
        try:
            await anyio.to_thread.run_sync(call.run, limiter=self._capacity())
        except asyncio.CancelledError:
            if not call.future.cancel():
                await wait_done(asyncio.wrap_future(call.future))
                if call.future.exception() is None and undo is not None:
                    undone = asyncio.ensure_future(undo(call.future.result()))
                    await wait_done(undone)
                    undone.result()
            raise
        return call.future.result()

    async def finish(self, function: Callable[[], None]) -> None:
        """Call `function` in a thread and wait for its end, although the caller is cancelled."""
        await complete(lambda: self.run(function))

    @asynccontextmanager
    async def open(self, path: Path, mode: Literal["rb", "wb"]) -> AsyncIterator[IO[bytes]]:
        """Open a file in a thread, and close it in a thread. A cancelled caller leaves no open file behind."""

        async def close(file: IO[bytes]) -> None:
            await self.run(file.close)

        file: IO[bytes] = await self.run(lambda: path.open(mode), undo=close)
        try:
            yield file
        finally:
            await self.finish(file.close)

    async def read(self, file: IO[bytes], chunk: int) -> AsyncIterator[bytes]:
        """Yield the content of a file from its beginning, in chunks of at most `chunk` bytes, each read in a thread."""
        await self.run(lambda: file.seek(0))
        while data := await self.run(lambda: file.read(chunk)):
            yield data

    def _capacity(self) -> anyio.CapacityLimiter:
        limiter = self._limiter.get(None)
        if limiter is None:
            limiter = anyio.CapacityLimiter(self._count)
            self._limiter.set(limiter)
        return limiter


class _Call(Generic[T]):
    """A function to call in a thread, and its outcome, which outlives the cancellation of the caller."""

    __slots__ = ("_function", "future")

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self.future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


FILES = ThreadLimiter("files", 8)
"""Short reads and writes: output files, locks, records, configuration."""

PROJECTS = ThreadLimiter("projects", 8)
"""Fetching, reading, hashing, copying and packing projects."""

TRANSFERS = ThreadLimiter("transfers", 8)
"""Artifacts and downloads through blocking libraries."""

PROCESSES = ThreadLimiter("processes", 4)
"""Starting processes. Each thread gets its next start from the event loop, so that few threads leave processors idle.

On a busy machine, 500 runs took 4.0 ms each with two threads and 2.6 with four, with the same stalls of the event loop
(benchmarks/fleet.py; bare processes: 2.3 ms). Eight are faster still, but their stalls are longer.
"""

SESSIONS = ThreadLimiter("sessions", 1)
"""Listing the processes of sessions that are being ended. Starts of processes and files must not delay it."""

STORES = ThreadLimiter("stores", 4)
"""Calls of the mlflow client. More than eight threads exhaust the connections that it keeps to a sqlite database."""

LOGINS = ThreadLimiter("logins", 4)
"""Loading clients, credentials and their helpers, which may take seconds."""

PLUGIN_SUBMITS = ThreadLimiter("plugin submits", 8)
"""Submissions by mlflow plugins, which may take any time."""

PLUGIN_QUESTIONS = ThreadLimiter("plugin questions", 8)
"""All other calls of mlflow plugins: a submission that hangs must not hold up a cancellation."""

TERMINAL = ThreadLimiter("terminal", 1)
"""Writing to the terminal, in order."""
