"""The pipe that collects what a short command prints."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from types import TracebackType
from typing import Self

from mlfleet._text.lines import LineSplitter

__all__ = ["Stream"]

# Each turn of the event loop reads no more than this of one pipe: a chunk of nothing but line ends takes 1 to 3 ms.
_CHUNK, _CHUNK_OF_LINES = 64 * 1024, 16 * 1024


class Stream:
    """A pipe whose end is kept in memory, read by the event loop without a thread.

    Attributes:
        writer: the file descriptor to write to; closed by `read`.
        ended: done when nobody can write any more.
        error: what `on_line` raised.
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
        """Begin to read, once the process that writes has a copy of `writer`.

        Args:
            on_error: is called when `on_line` has raised.
        """
        self._close_writer()
        self._on_error = on_error
        self._loop.add_reader(self._reader, self._read)

    def content(self) -> bytes:
        """The end of what was written, up to the limit."""
        return bytes(self._kept)

    def flush(self) -> None:
        """Give the last line to `on_line`, if it had no end."""
        self._tell(self._lines.close())

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
            self._tell(self._lines.feed(data))

    def _tell(self, lines: list[str]) -> None:
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
