"""From bytes in any pieces to lines of text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

__all__ = ["LineSplitter", "follow_file", "last_lines"]


class LineSplitter:
    """Splits a stream of bytes into lines: at ``\\n``, ``\\r\\n`` and ``\\r``; bad UTF-8 is replaced; a line is cut at 64 KiB."""

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes."""
        raise NotImplementedError

    def close(self) -> list[str]:
        """The last line, if it had no end."""
        raise NotImplementedError


def last_lines(path: Path, count: int = 20, limit: int = 16 * 1024) -> tuple[str, ...]:
    """The last lines of a file, read from its end. Blocking, but bounded."""
    raise NotImplementedError


def follow_file(path: Path, ended: Callable[[], bool]) -> AsyncIterator[str]:
    """The lines of a growing file from its beginning, until `ended` says that nothing more will come.

    Args:
        path: the file; it may not be there yet.
        ended: whether its writer has ended. It is asked before each read, so that nothing written before is missed.
    """
    raise NotImplementedError
