"""The local copy of a run's output, for every backend that fetches it from elsewhere."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from mlfleet._concurrency.threads import FILES
from mlfleet._run_log import get_logger
from mlfleet._text.lines import write_all
from mlfleet.errors import SubmitError

__all__ = ["STDERR", "STDOUT", "KeptOutput", "OutputFile", "remark_line", "write_output"]

STDOUT, STDERR = 1, 2

_log = get_logger("mlfleet.output")


class OutputFile:
    """The file that a run's output is copied to, or the output of this process in its place.

    It stays open for a live stream; see `KeptOutput` for output that arrives now and then. An output that cannot be
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


class KeptOutput:
    """The file that a run's output is copied to, part by part, without losing what an earlier process has copied.

    Every part is written at its position, so that processes that copy the same output write the same file. Bytes that
    the file holds already are compared and not written again. Where they differ, the rest goes behind all that the
    file holds, after a line that says so. Nothing is held open between two calls.

    Args:
        path: The file; None: the stdout of this process.
        backend: The name of the backend, for errors.

    Attributes:
        position: The number of bytes of output that have been written, here or by an earlier process.
        ends_line: True if the next byte begins a line.
    """

    def __init__(self, path: Path | None, *, backend: str) -> None:
        self._path = path
        self._backend = backend
        self._begun = False
        self._held = 0  # the bytes of the file when it was opened
        self.position = 0
        self.ends_line = True

    def seek(self, position: int) -> None:
        """Continue a copy at the position that it had reached. Blocking."""
        assert self._path is not None  # noqa: S101 - only a file can be continued
        with self._path.open("rb") as file:
            self._held = os.fstat(file.fileno()).st_size
            self.position = min(position, self._held)
            self.ends_line = _ends_line(file.fileno(), self.position)
        self._begun = True

    def write(self, data: bytes) -> None:
        """Write the next part. Blocking.

        Raises:
            SubmitError: The file cannot be made.
            OSError: The data cannot be written; the position is still before it.
        """
        if self._path is None:
            write_all(STDOUT, data)
            self._advance(data)
            return
        file = _open_file(self._path, self._backend, append=False)
        try:
            if not self._begun:
                self._begun, self._held = True, os.fstat(file).st_size
            data = self._without_held(file, data)
            write_all(file, data, self.position)
            self._advance(data)
        finally:
            os.close(file)

    def _advance(self, data: bytes) -> None:
        self.position += len(data)
        if data:
            self.ends_line = data.endswith(b"\n")

    def _without_held(self, file: int, data: bytes) -> bytes:
        size = min(self._held - self.position, len(data))
        if size <= 0:
            return data
        there = os.pread(file, size, self.position)
        if data.startswith(there) and len(there) == size:
            self._advance(there)
            return data[size:]
        self.position, self._held = self._held, 0
        line = remark_line("lines may be missing or repeated here: the copy above was made by another process")
        return (b"" if _ends_line(file, self.position) else b"\n") + line + data


def remark_line(text: str) -> bytes:
    """Return a line of mlfleet's own for the output of a run."""
    return f"mlfleet: {text}\n".encode()


def write_output(path: Path | None, data: bytes, *, backend: str, at: int) -> None:
    """Open a file for output, write `data` and close it. Blocking.

    Args:
        path: The file; None: the stdout of this process.
        data: The bytes to write.
        backend: The name of the backend, for errors.
        at: The position in the file, so that two processes may copy the same output.

    Raises:
        SubmitError: The file cannot be made.
        OSError: The data cannot be written.
    """
    if path is None:
        write_all(STDOUT, data)
        return
    file = _open_file(path, backend, append=False)
    try:
        write_all(file, data, at)
    finally:
        os.close(file)


def _open_file(path: Path, backend: str, *, begin: bool = False, append: bool = True) -> int:
    # With O_APPEND, pwrite(2) ignores its position on Linux.
    how = (os.O_TRUNC if begin else 0) | (os.O_APPEND if append else 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(path, os.O_RDWR | os.O_CREAT | how | os.O_CLOEXEC, 0o600)
    except OSError as error:
        text = f"the output of the run cannot be written to {path}: {error.strerror}"
        raise SubmitError(text, backend=backend) from error


def _ends_line(file: int, position: int) -> bool:
    return position == 0 or os.pread(file, 1, position - 1) == b"\n"


async def _close(file: int) -> None:
    os.close(file)
