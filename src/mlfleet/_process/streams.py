"""The pipe that collects the output of a short command."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from mlfleet._text.lines import LineSplitter

__all__ = ["Stream"]

# One iteration of the event loop reads no more than this of one pipe: 16 KiB of nothing but line ends take 1 to 3 ms.
_CHUNK, _CHUNK_OF_LINES = 64 * 1024, 16 * 1024


class Stream:
    """A pipe that the event loop reads without a thread; the end of its content is kept in memory.

    Args:
        limit: Bytes to keep; of longer content the end is kept.
        on_line: Called with every line as it comes; None: lines are not split.

    Attributes:
        writer: The file descriptor to write to; `read` closes it.
        ended: Done when no process can write any more.
        error: The exception that `on_line` raised; None if it raised none.
    """

    def __init__(self, limit: int, on_line: Callable[[str], None] | None) -> None:
        self._limit = limit
        self._on_line = on_line
        self._lines = LineSplitter()
        self._kept = bytearray()
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_writer()
        self._loop.remove_reader(self._reader)
        os.close(self._reader)

    def read(self, on_error: Callable[[], None]) -> None:
        """Begin to read. The writing process must have its copy of `writer` by now.

        Args:
            on_error: Called after `on_line` has raised.
        """
        self._close_writer()
        self._on_error = on_error
        self._loop.add_reader(self._reader, self._read)

    def content(self) -> bytes:
        """Return the end of the content, up to the limit."""
        return bytes(self._kept)

    def flush(self) -> None:
        """Pass the last line to `on_line`, if it had no line end."""
        self._pass_on(self._lines.close())

    def _read(self) -> None:
        try:
            data = os.read(self._reader, _CHUNK if self._on_line is None else _CHUNK_OF_LINES)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._reader)
            self.ended.set_result(None)
            return
        self._kept += data
        if len(self._kept) > self._limit:
            del self._kept[: len(self._kept) - self._limit]
        if self._on_line is not None:
            self._pass_on(self._lines.feed(data))

    def _pass_on(self, lines: Sequence[str]) -> None:
        if self._on_line is None:
            return
        try:
            for line in lines:
                self._on_line(line)
        except Exception as error:
            self.error = error
            self._on_line = None
            self._on_error()

    def _close_writer(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1
