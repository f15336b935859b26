"""Reads the output of a run from a given line or byte on, whatever the handle of its backend offers."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from functools import partial
from pathlib import Path

from mlfleet._concurrency.threads import FILES
from mlfleet._text.lines import LogLine, find_tail, follow_bytes, split_lines
from mlfleet.backends.base import BackendRun
from mlfleet.errors import UsageError

__all__ = ["FileOutput", "find_start", "read_bytes", "read_lines"]


class FileOutput(ABC):
    """The part of a handle that reads the output of its run, which is in a file of this machine."""

    __slots__ = ()

    @abstractmethod
    def _output_file(self) -> Path | None:
        """Return the file, which need not exist yet; None if the output goes to that of this process."""

    @abstractmethod
    async def _output_ended(self) -> object:
        """Wait until no more output comes, or a few lines of processes that the run has left behind."""

    async def _catch_up(self) -> None:
        """Wait until the output that is not here yet is in the file, up to now."""
        return

    def logs(self, *, follow: bool = True, tail: int | None = None, start: int = 0) -> AsyncGenerator[LogLine, None]:
        """Yield the lines of the output; see `FleetRun.logs`."""
        return read_lines(self, follow=follow, tail=tail, start=start)

    async def find_tail(self, count: int) -> int:
        """Return the offset in bytes of the last `count` lines that there are now."""
        await self._catch_up()
        path = self._output_file()
        return 0 if path is None else await FILES.run(partial(find_tail, path, count))

    async def output_bytes(self, *, follow: bool = True, start: int = 0) -> AsyncGenerator[bytes, None]:
        """Yield the output byte for byte, from the offset `start` on."""
        path = self._output_file()
        if path is None:
            return
        if not follow:
            await self._catch_up()
        async with aclosing(follow_bytes(path, self._output_ended if follow else None, start=start)) as chunks:
            async for data in chunks:
                yield data


async def find_start(handle: BackendRun | FileOutput, *, tail: int | None, start: int) -> int:
    """Return the offset in bytes from which on the output is to be read: the later one of both arguments'.

    Args:
        handle: The backend's handle of the run.
        tail: The largest number of lines from before this call; None: any number.
        start: The smallest offset.

    Raises:
        UsageError: An argument is negative.
    """
    for name, value in (("tail", tail), ("start", start)):
        if value is not None and value < 0:
            raise UsageError(f"{name} is {value}: give 0 or more")
    if tail is None:
        return start
    tail = min(tail, sys.maxsize - 1)  # the longest deque has one more
    if isinstance(handle, FileOutput):
        return max(start, await handle.find_tail(tail))
    ends = deque((0,), maxlen=tail + 1)
    async for line in split_lines(_encode(handle.logs(follow=False))):
        ends.append(line.end)
    return max(start, ends[0])


async def read_bytes(handle: BackendRun | FileOutput, *, follow: bool, start: int = 0) -> AsyncGenerator[bytes, None]:
    """Yield the output of a run from an offset on: byte for byte, or the text of its lines if the handle has no more.

    A handle that begins with the first line in any case is read from there.
    """
    if isinstance(handle, FileOutput):
        chunks = handle.output_bytes(follow=follow, start=start)
        start = 0
    else:
        chunks = _encode(handle.logs(follow=follow))
    async with aclosing(chunks):
        async for data in chunks:
            if start < len(data):
                yield data[start:]
            start = max(start - len(data), 0)


async def read_lines(
    handle: BackendRun | FileOutput, *, follow: bool, tail: int | None, start: int
) -> AsyncGenerator[LogLine, None]:
    """Yield the lines of the output of a run; see `FleetRun.logs`."""
    first = await find_start(handle, tail=tail, start=start)
    chunks = read_bytes(handle, follow=follow, start=max(first - 1, 0))
    async with aclosing(split_lines(chunks, first)) as lines:
        async for line in lines:
            yield line


async def _encode(lines: AsyncIterable[str]) -> AsyncGenerator[bytes, None]:
    async for line in lines:
        yield f"{line}\n".encode(errors="replace")
