"""Locks between processes."""

from __future__ import annotations

import errno
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import anyio
from anyio.lowlevel import RunVar

from mlfleet._concurrency.threads import FILES

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = ["file_lock"]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.01, 0.2  # seconds
_queues: RunVar[WeakValueDictionary[Path, anyio.Lock]] = RunVar("mlfleet lock queues")


@asynccontextmanager
async def file_lock(path: Path, *, patience: float | None = None) -> AsyncIterator[None]:
    """Hold the lock file at `path` against other processes and other tasks of this one.

    The file and its folder are created if they do not exist.

    Waiting does not block the event loop and may be cancelled. The lock ends with its process at the latest. The file
    stays where it is: if it were deleted, two others could hold a lock of this name each.

    Args:
        path: The lock file.
        patience: Seconds for which a refused lock is tried again; None: until it is free. Time that passes without a
            refusal (imports, threads that are busy) does not count.

    Raises:
        TimeoutError: The lock was still refused when the patience had passed.
        OSError: The file cannot be created or written.
    """
    # One task of this process at a time asks the system, so that hundreds of waiters cost no more than one.
    queue = _queue(path)
    try:
        queue.acquire_nowait()
    except anyio.WouldBlock:
        with anyio.fail_after(patience):
            await queue.acquire()
    try:
        lock = await FILES.run(lambda: _lock(path))
        await _acquire(lock, patience)
        try:
            yield
        finally:
            await _release(lock)
    finally:
        queue.release()


def _lock(path: Path) -> FileLock:
    from filelock import FileLock  # late, and in a thread: most programs do not need it

    return FileLock(path, thread_local=False)


def _queue(path: Path) -> anyio.Lock:
    queues = _queues.get(None)
    if queues is None:
        queues = WeakValueDictionary()
        _queues.set(queues)
    queue = queues.get(path)
    if queue is None:
        queue = queues[path] = anyio.Lock()
    return queue


async def _acquire(lock: FileLock, patience: float | None) -> None:
    def attempt() -> bool:
        from filelock import Timeout

        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        except NotImplementedError as error:  # filelock's for a file system without locks
            raise OSError(errno.ENOLCK, str(error), lock.lock_file) from error
        return True

    async def undo(acquired: bool) -> None:
        if acquired:
            await _release(lock)

    pause, refused_at = _SHORTEST_PAUSE, None
    while not await FILES.run(attempt, undo=undo):
        refused_at = refused_at or time.monotonic()
        if patience is not None and time.monotonic() - refused_at >= patience:
            raise TimeoutError(f"{lock.lock_file} is locked")
        await anyio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


async def _release(lock: FileLock) -> None:
    await FILES.finish(lock.release)
