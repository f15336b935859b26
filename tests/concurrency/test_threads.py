"""Blocking work in threads of ours, and what a cancellation leaves of it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import IO, Any

import pytest

from mlfleet._concurrency.threads import ThreadLimiter


class Slow(type(Path())):  # type: ignore[misc]
    """A path on a disk that takes its time, which file systems of a network do."""

    opening = threading.Event()
    go_on = threading.Event()
    file: IO[bytes]

    def open(self, *args: Any, **kwargs: Any) -> IO[Any]:
        self.opening.set()
        self.go_on.wait()
        self.file = super().open(*args, **kwargs)
        return self.file


async def test_a_file_that_opens_while_its_caller_is_cancelled_is_closed(tmp_path: Path) -> None:
    threads, path = ThreadLimiter("test", 2), Slow(tmp_path / "file")

    async def write() -> None:
        async with threads.open(path, "wb"):
            raise AssertionError("was cancelled before")

    task = asyncio.create_task(write())
    await threads.run(path.opening.wait)
    task.cancel()
    asyncio.get_running_loop().call_soon(path.go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert path.file.closed
