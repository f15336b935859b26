"""The local copy of a run's output, for every backend that fetches it from elsewhere."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

from mlfleet._concurrency.threads import FILES
from mlfleet._text.lines import write_all
from mlfleet.errors import SubmitError

__all__ = ["STDERR", "STDOUT", "OutputFile", "write_output"]

STDOUT, STDERR = 1, 2

_log = logging.getLogger("mlfleet.output")


class OutputFile:
    """The file that a run's output is copied to, or the output of this process in its place.

    It stays open for a live stream; see `write_output` for output that arrives now and then. An output that cannot be
    written (a full disk) costs lines and not the run: the rest is dropped with a warning.

    Args:
        path: The file, which is begun anew: another process may have copied the same output before. None: the stdout
            and stderr of this process.
        backend: The name of the backend, for errors.
    """

    def __init__(self, path: Path | None, *, backend: str) -> None:
        self._path = path
        self._backend = backend
        self._file: int | None = None
        self._lost = False

    async def open(self) -> None:
        """Make the file, if that was not done before.

        Raises:
            SubmitError: It cannot be written.
        """
        if self._path is not None and self._file is None and not self._lost:
            self._file = await FILES.run(partial(_open_file, self._path, self._backend, begin=True), undo=_close)

    async def close(self) -> None:
        """Close the file. A cancelled call closes it all the same."""
        file, self._file = self._file, None
        if file is not None:
            await FILES.finish(partial(os.close, file))

    def write(self, data: bytes, *, stream: int = STDOUT) -> None:
        """Write `data` at the end of the open file. Blocking.

        Args:
            data: The bytes to write.
            stream: `STDOUT` or `STDERR`, where the output goes to that of this process.
        """
        target = stream if self._path is None else self._file
        if target is None:
            return
        try:
            write_all(target, data)
        except OSError as error:
            _log.warning("output of a run is lost, %s cannot be written: %s", self._path or "stdout", error.strerror)
            if self._file is not None:
                os.close(self._file)
                self._file, self._lost = None, True


def write_output(path: Path | None, data: bytes, *, backend: str, begin: bool = False, at: int | None = None) -> None:
    """Open a file for output, write `data` and close it. Blocking.

    Args:
        path: The file; None: the stdout of this process.
        data: The bytes to write.
        backend: The name of the backend, for errors.
        begin: True to drop what the file holds.
        at: The position in the file, so that two processes may copy the same output; None: its end.

    Raises:
        SubmitError: The file cannot be made.
        OSError: The data cannot be written.
    """
    if path is None:
        write_all(STDOUT, data)
        return
    file = _open_file(path, backend, begin=begin, append=at is None)
    try:
        write_all(file, data, at)
    finally:
        os.close(file)


def _open_file(path: Path, backend: str, *, begin: bool, append: bool = True) -> int:
    # With O_APPEND, pwrite(2) ignores its position on Linux.
    how = (os.O_TRUNC if begin else 0) | (os.O_APPEND if append else 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(path, os.O_WRONLY | os.O_CREAT | how | os.O_CLOEXEC, 0o600)
    except OSError as error:
        text = f"the output of the run cannot be written to {path}: {error.strerror}"
        raise SubmitError(text, backend=backend) from error


async def _close(file: int) -> None:
    os.close(file)
