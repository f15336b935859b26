"""Splits streams of bytes into lines of text, and reads lines of files."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from mlfleet._concurrency.cancellation import wait_done
from mlfleet._concurrency.threads import FILES

__all__ = [
    "LineSplitter",
    "LogLine",
    "find_tail",
    "follow_bytes",
    "last_lines",
    "split_lines",
    "write_all",
]

_LONGEST_LINE = 64 * 1024  # bytes
_LONGEST_CHARACTER = 4  # bytes of UTF-8
# One piece's lines are handled in one turn of the event loop: 16 KiB of nothing but line ends take 3 to 7 ms.
_CHUNK = 16 * 1024
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 0.2  # seconds
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BLOCK = 64 * 1024


class LogLine(str):
    """A line of a run's output, without its line end.

    Attributes:
        end: The number of bytes of the output up to and with the line end: ``logs(start=line.end)`` continues there.
    """

    __slots__ = ("end",)
    end: int


class LineSplitter:
    r"""Splits a stream of bytes into lines: at ``\n``, ``\r\n`` and ``\r`` (progress bars).

    Bad UTF-8 is replaced. A line that is longer than 64 KiB is cut into several.

    Args:
        start: The offset in bytes of the first line. If it is not 0, the byte before it has to be fed, too: the offset
            may be between ``\r`` and ``\n``.
    """

    def __init__(self, start: int = 0) -> None:
        self._line = bytearray()  # what there is of the line that has not ended yet
        self._offset = max(start - 1, 0)
        self._has_byte_before = start > 0
        self._after_return = False

    def feed(self, data: bytes) -> Sequence[LogLine]:
        """Return the lines that `data` completes."""
        if self._has_byte_before and data:
            self._has_byte_before, self._after_return = False, data[:1] == b"\r"
            self._offset += 1
            data = data[1:]
        lines: list[LogLine] = []
        at = 0
        if data:
            if self._after_return and data[:1] == b"\n":  # the second half of \r\n
                at = 1
            self._after_return = data.endswith(b"\r")
        for found in _LINE_END.finditer(data, at):
            end, after = found.span()
            if self._line or end - at > _LONGEST_LINE:
                self._line += data[at:end]
                self._cut(self._offset + end, lines)
                lines.append(self._take(len(self._line), self._offset + after))
            else:
                line = LogLine(data[at:end], "utf-8", "replace")
                line.end = self._offset + after
                lines.append(line)
            at = after
        self._line += data[at:]
        self._offset += len(data)
        self._cut(self._offset, lines)
        return lines

    def close(self) -> Sequence[LogLine]:
        """Return the last line, if it had no line end."""
        return [self._take(len(self._line), self._offset)] if self._line else []

    def _cut(self, offset: int, lines: list[LogLine]) -> None:
        """Cut a line that has become too long, and ends at `offset`, between two characters."""
        while len(self._line) > _LONGEST_LINE:
            length = _LONGEST_LINE
            while self._line[length] & 0xC0 == 0x80 and length > _LONGEST_LINE - _LONGEST_CHARACTER:
                length -= 1
            lines.append(self._take(length, offset - len(self._line) + length))

    def _take(self, length: int, end: int) -> LogLine:
        line = LogLine(self._line[:length], "utf-8", "replace")
        line.end = end
        del self._line[:length]
        return line


def last_lines(path: Path, count: int = 20, limit: int = 16 * 1024) -> tuple[str, ...]:
    """Return the last lines of a file, read from its end. Blocking, but bounded.

    Args:
        path: The file; if it does not exist, the result is empty.
        count: The largest number of lines. Default 20.
        limit: The largest number of bytes to read. Default 16 KiB.
    """
    try:
        with path.open("rb") as file:
            start = max(file.seek(0, os.SEEK_END) - limit, 0)
            file.seek(start)
            data = file.read(limit)
    except OSError:
        return ()
    splitter = LineSplitter()
    lines = [*splitter.feed(data), *splitter.close()]
    if start > 0 and len(lines) > 1:
        del lines[0]  # its beginning was cut off
    return tuple(map(str, lines[-count:])) if count > 0 else ()


def find_tail(path: Path, count: int) -> int:
    """Return the offset in bytes of the last lines of a file, read from its end. Blocking.

    Args:
        path: The file; if it does not exist, the result is 0.
        count: The number of lines.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if count >= size:  # no line is shorter than a byte
                return 0
            block = min(_BLOCK, size)
            while True:
                # Counted first, and not kept: an output may have millions of lines.
                found = sum(1 for _ in _line_ends(file, size - block, size))
                if block == size or found > count:
                    ends = _line_ends(file, size - block, size)
                    return next(islice(ends, max(found - count - 1, 0), None))
                block = min(8 * block, size)
    except OSError:
        return 0


def _line_ends(file: BinaryIO, begin: int, size: int) -> Iterator[int]:
    """Yield the offsets after the lines that end between `begin` and `size`; before all of them 0 as the first one."""
    if begin == 0:
        yield 0
    file.seek(begin)
    # The first line may be the rest of one, but its end is an end.
    splitter = LineSplitter(begin + 1 if begin else 0)
    for at in range(begin, size, _BLOCK):
        for line in splitter.feed(file.read(min(_BLOCK, size - at))):
            yield line.end
    for line in splitter.close():
        yield line.end


async def split_lines(chunks: AsyncGenerator[bytes, None], start: int = 0) -> AsyncGenerator[LogLine, None]:
    """Yield the lines of a stream of bytes; see `LineSplitter`.

    Args:
        chunks: The bytes; closed at the end.
        start: The offset of the first line. If it is not 0, `chunks` begins one byte before it.
    """
    splitter = LineSplitter(start)
    async with aclosing(chunks):
        async for data in chunks:
            for line in splitter.feed(data):
                yield line
    for line in splitter.close():
        yield line


async def follow_bytes(
    path: Path, ended: Callable[[], Awaitable[object]] | None = None, *, start: int = 0
) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of a growing file, until nothing more will come.

    The file is not held open between two reads.

    Args:
        path: The file; it need not exist yet.
        ended: A function that returns when the writer has ended, at once if it has already: ``event.wait``,
            ``process.wait``. It is called once, and cancelled if the iteration ends before. None: yield what is there.
        start: The offset of the first byte.

    Raises:
        Exception: The error of `ended`, after all bytes.
    """
    offset = start
    pause = _SHORTEST_PAUSE
    end: int | None = None if ended else await FILES.run(partial(_size, path))  # of the file when its writer had ended
    ending = asyncio.ensure_future(ended()) if ended else None
    try:
        while end is None or offset < end:
            data = await FILES.run(partial(_read, path, offset))
            offset += len(data)
            if data:
                yield data
                pause = _SHORTEST_PAUSE
            elif ending is None or end is not None:
                break  # the file has become shorter
            else:
                await asyncio.wait([ending], timeout=pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
            # Also after data: a process that outlives the writer may write faster than this reads.
            if ending is not None and end is None and ending.done():
                end = await FILES.run(partial(_size, path))
        if ending is not None:
            ending.result()
    finally:
        if ending is not None:
            ending.cancel()
            await wait_done(ending)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            if offset >= file.seek(0, os.SEEK_END):  # it may be larger than any place that `seek` takes
                return b""
            file.seek(offset)
            return file.read(_CHUNK)
    except FileNotFoundError:
        return b""


def write_all(descriptor: int, data: bytes, at: int | None = None) -> None:
    """Write all of `data`, however little of it each system call takes. Blocking.

    Args:
        descriptor: The open file, pipe or terminal.
        data: The bytes to write.
        at: The position in the file; None: the current one.

    Raises:
        OSError: The rest cannot be written.
    """
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view) if at is None else os.pwrite(descriptor, view, at)
        view = view[written:]
        at = None if at is None else at + written
