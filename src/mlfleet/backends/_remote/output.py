"""The local copy of a run's output, for every backend that fetches it from elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from mlfleet._run_log import get_logger, warn_once
from mlfleet._text.lines import write_all
from mlfleet.errors import SubmitError

__all__ = ["STDERR", "STDOUT", "KeptOutput", "begin_output", "pass_on", "remark_line"]

STDOUT, STDERR = 1, 2

_log = get_logger("mlfleet.output")


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
        file = _open_file(self._path, self._backend)
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
        line = remark_line("lines may be missing or repeated here, since what follows does not continue the copy above")
        return (b"" if _ends_line(file, self.position) else b"\n") + line + data


def pass_on(data: bytes, stream: int = STDOUT) -> None:
    """Write output to `STDOUT` or `STDERR` of this process; drop with a warning what cannot be written. Blocking."""
    try:
        write_all(stream, data)
    except OSError as error:
        name = "stdout" if stream == STDOUT else "stderr"
        warn_once(_log, "output of a run is lost, %s cannot be written: %s", name, error.strerror)


def begin_output(path: Path, *, backend: str) -> None:
    """Make a file for output, or empty it. Blocking.

    Raises:
        SubmitError: It cannot be written.
    """
    os.close(_open_file(path, backend, os.O_TRUNC))


def remark_line(text: str) -> bytes:
    """Return a line of mlfleet's own for the output of a run."""
    return f"mlfleet: {text}\n".encode()


def _open_file(path: Path, backend: str, how: int = 0) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(path, os.O_RDWR | os.O_CREAT | how | os.O_CLOEXEC, 0o600)
    except OSError as error:
        text = f"the output of the run cannot be written to {path}: {error.strerror}"
        raise SubmitError(text, backend=backend) from error


def _ends_line(file: int, position: int) -> bool:
    return position == 0 or os.pread(file, 1, position - 1) == b"\n"
