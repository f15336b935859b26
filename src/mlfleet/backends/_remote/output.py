"""The local copy of a run's output, for every backend that fetches it from elsewhere."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

from mlfleet._concurrency.threads import FILES
from mlfleet._text.lines import write_all
from mlfleet.errors import SubmitError

__all__ = ["STDERR", "STDOUT", "OutputFile"]

STDOUT, STDERR = 1, 2

_log = logging.getLogger("mlfleet.output")


class OutputFile:
    """The file that a run's output is copied to, or the output of this process in its place.

    An output that cannot be written (a full disk) costs lines and not the run: the rest is dropped with a warning.

    Args:
        path: The file; None: the stdout and stderr of this process.
        backend: The name of the backend, for errors.
        keep: True to keep what the file holds already, and to write at positions; False to begin it anew and to append.
            Another process may have copied the same output before.
    """

    def __init__(self, path: Path | None, *, backend: str, keep: bool = False) -> None:
        self._path = path
        self._backend = backend
        self._keep = keep
        self._file: int | None = None
        self._lost = False

    async def open(self) -> None:
        """Make the file, if that was not done before.

        Raises:
            SubmitError: It cannot be written.
        """
        if self._path is not None and self._file is None and not self._lost:
            self._file = await FILES.run(self._open, undo=_close)

    async def close(self) -> None:
        """Close the file. A cancelled call closes it all the same."""
        file, self._file = self._file, None
        if file is not None:
            await FILES.finish(partial(os.close, file))

    async def append(self, data: bytes) -> None:
        """Write `data` at the end, in a thread; see `write`.

        Raises:
            SubmitError: The file cannot be made.
        """
        await self.open()
        await FILES.run(partial(self.write, data))

    def write(self, data: bytes, *, stream: int = STDOUT, at: int | None = None) -> None:
        """Write `data` to the open file. Blocking.

        Args:
            data: The bytes to write.
            stream: `STDOUT` or `STDERR`, where the output goes to that of this process.
            at: The position in a file that is kept, so that two processes may copy the same output; None: its end.
        """
        target = stream if self._path is None else self._file
        if target is None:
            return
        try:
            write_all(target, data, None if self._path is None else at)
        except OSError as error:
            _log.warning("output of a run is lost, %s cannot be written: %s", self._path or "stdout", error.strerror)
            if self._file is not None:
                os.close(self._file)
                self._file, self._lost = None, True

    def _open(self) -> int:
        path = self._path
        assert path is not None  # noqa: S101 - checked by the caller
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # With O_APPEND, pwrite(2) ignores its position on Linux.
            how = 0 if self._keep else os.O_TRUNC | os.O_APPEND
            return os.open(path, os.O_WRONLY | os.O_CREAT | how | os.O_CLOEXEC, 0o600)
        except OSError as error:
            text = f"the output of the run cannot be written to {path}: {error.strerror}"
            raise SubmitError(text, backend=self._backend) from error


async def _close(file: int) -> None:
    os.close(file)
