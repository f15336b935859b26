"""Splits streams of bytes into lines of text, and reads lines of files."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio

from mlfleet._concurrency.threads import FILES

__all__ = ["LineSplitter", "follow_bytes", "follow_file", "last_lines", "split_lines", "write_all"]

_LONGEST_LINE = 64 * 1024  # characters
# One piece's lines are handled in one turn of the event loop: 16 KiB of nothing but line ends take 1 to 3 ms.
_CHUNK = 16 * 1024
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 0.2  # seconds
_LINE_END = re.compile(r"\r\n|\n|\r")


class LineSplitter:
    r"""Splits a stream of bytes into lines: at ``\n``, ``\r\n`` and ``\r`` (progress bars).

    Bad UTF-8 is replaced. A line that is longer than 64 KiB is cut into several.
    """

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._pieces: list[str] = []  # of the line that has not ended yet
        self._length = 0
        self._after_return = False

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that `data` completes."""
        return self._split(self._decode(data))

    def close(self) -> list[str]:
        """Return the last line, if it had no line end."""
        lines = self._split(self._decode(b"", final=True))
        if self._pieces:
            lines.append(self._end_line())
        return lines

    def _split(self, text: str) -> list[str]:
        if not text:
            return []
        if self._after_return and text[0] == "\n":  # the second half of \r\n
            text = text[1:]
            if not text:
                self._after_return = False
                return []
        self._after_return = text[-1] == "\r"
        *ended, rest = _LINE_END.split(text)
        lines: list[str] = []
        for line in ended:
            self._add(line, lines)
            lines.append(self._end_line())
        self._add(rest, lines)
        return lines

    def _add(self, text: str, lines: list[str]) -> None:
        """Add text to the line that has not ended; cut one that gets too long into several."""
        while self._length + len(text) > _LONGEST_LINE:
            room = _LONGEST_LINE - self._length
            self._pieces.append(text[:room])
            lines.append(self._end_line())
            text = text[room:]
        if text:
            self._pieces.append(text)
            self._length += len(text)

    def _end_line(self) -> str:
        line = "".join(self._pieces)
        self._pieces.clear()
        self._length = 0
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
    lines = splitter.feed(data) + splitter.close()
    if start > 0 and len(lines) > 1:
        del lines[0]  # its beginning was cut off
    return tuple(lines[-count:]) if count > 0 else ()


async def split_lines(chunks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Yield the lines of a stream of bytes; see `LineSplitter`."""
    splitter = LineSplitter()
    async for data in chunks:
        for line in splitter.feed(data):
            yield line
    for line in splitter.close():
        yield line


def follow_file(path: Path, ended: Callable[[], Awaitable[object]] | None = None) -> AsyncIterator[str]:
    """Yield the lines of a growing file; see `follow_bytes`."""
    return split_lines(follow_bytes(path, ended))


async def follow_bytes(path: Path, ended: Callable[[], Awaitable[object]] | None = None) -> AsyncIterator[bytes]:
    """Yield the bytes of a growing file from its beginning, until nothing more will come.

    Nothing is held open between two reads, so a follower may be dropped at any time.

    Args:
        path: The file; it need not exist yet.
        ended: A function that returns when the writer has ended, at once if it has already: ``event.wait``,
            ``process.wait``. It is awaited over and over and cancelled each time. None: yield what is there.
    """
    offset = 0
    pause = _SHORTEST_PAUSE
    has_ended = ended is None
    end: int | None = None  # where the file ended when its writer had
    while True:
        if has_ended and end is None:
            end = await FILES.run(lambda: _size(path))
        data = await FILES.run(partial(_read, path, offset))
        offset += len(data)
        if data:
            yield data
        if data and (end is None or offset < end):
            pause = _SHORTEST_PAUSE
        elif has_ended or ended is None:
            break
        else:
            with anyio.move_on_after(pause):
                await ended()
                has_ended = True
            pause = min(pause * 2, _LONGEST_PAUSE)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
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
