"""Copies the output of a container into the run's file, or to the output of this process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Self

import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet._paths import runs_folder
from mlfleet._run_log import get_logger
from mlfleet.backends._remote.output import STDERR, STDOUT, KeptOutput, OutputFile
from mlfleet.backends.docker.client import Engine, EngineError

__all__ = ["ContainerLock", "OutputCopy"]

_log = get_logger("mlfleet.docker")
# https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
_HEADER = struct.Struct(">BxxxL")
_SMALL = 16 * 1024
_GATHER = 0.01  # seconds to wait for more of a slow stream, so that it takes fewer turns of the event loop


class ContainerLock:
    """The ownership lock of a container: its holder copies the output and removes the container.

    One process of this machine holds it at a time. It ends with its process at the latest; then another process may
    take it over (`mlfleet.attach`). Every method blocks, if only shortly.

    Args:
        path: The path of the lock file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    @classmethod
    def of_run(cls, run_id: str) -> Self:
        """Return the lock of a run that this process submits."""
        return cls(runs_folder() / run_id / "container.lock")

    @classmethod
    def from_label(cls, label: str, run_id: str) -> Self:
        """Return the lock named by the container's label, or a local one for containers submitted elsewhere."""
        host, _, path = label.partition(":")
        return cls(Path(path)) if host == socket.gethostname() and path else cls.of_run(run_id)

    @property
    def label(self) -> str:
        """The text by which other processes find the lock."""
        return f"{socket.gethostname()}:{self._path}"

    @property
    def is_held(self) -> bool:
        """True if this object holds the lock."""
        return self._file is not None

    def acquire(self) -> bool:
        """Acquire the lock. Return False if another process holds it."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(file)
                return False
            self._file = file
        return True

    def is_taken(self) -> bool:
        """Return True if a process of this machine holds the lock. Makes no file."""
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(file)
        return False

    def release(self) -> None:
        """Release the lock and remove its file."""
        file, self._file = self._file, None
        if file is not None:
            self._path.unlink(missing_ok=True)
            os.close(file)
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()  # empty if the run's output went elsewhere


class OutputCopy:
    """Copies the output of one container from its beginning, live, in order, and each byte once.

    Args:
        engine: The engine that has the container.
        container: The container's id.
        path: The file to write; None: the stdout and stderr of this process.
        tty: True if the container has a terminal, so that its output is one plain stream.
        keep: True to compare what the file holds with what the engine has, rather than begin the file anew: an engine
            that rotates logs may have discarded what an earlier process has copied.

    Attributes:
        copied: The number of bytes copied so far.
    """

    def __init__(self, engine: Engine, container: str, path: Path | None, *, tty: bool, keep: bool = False) -> None:
        self._engine = engine
        self._container = container
        self._file = OutputFile(path, backend="docker")
        self._kept = KeptOutput(path, backend="docker") if keep and path is not None else None
        self._separate = path is None
        self._tty = tty
        self._pending = bytearray()
        self._skip = 0
        self.copied = 0

    async def open(self) -> None:
        """Make the file.

        Raises:
            SubmitError: It cannot be written.
        """
        if self._kept is None:
            await self._file.open()

    async def close(self) -> None:
        """Close the file."""
        await self._file.close()

    async def attach(self, on_attached: Callable[[], None]) -> None:
        """Copy the output of a container that has not started yet, byte for byte, until it or the connection ends.

        Args:
            on_attached: Called when the container may start.
        """
        await self._copy("POST", "attach", {"stream": True, "stdout": True, "stderr": True}, on_attached)

    async def replay(self, *, follow: bool) -> bool:
        """Copy the output that the engine has stored, without what was copied before.

        Args:
            follow: True to go on until the container ends. The engine may then close the stream a moment too early and
                miss the last line.

        Returns:
            False if there may be more, since the connection broke.
        """
        self._pending.clear()
        self._skip = self.copied
        if self._kept is not None and self.copied:
            self._skip = 0
            await FILES.run(partial(self._kept.seek, 0))
        return await self._copy("GET", "logs", {"follow": follow, "stdout": True, "stderr": True})

    async def _copy(
        self, method: str, what: str, params: Mapping[str, bool], on_open: Callable[[], None] = lambda: None
    ) -> bool:
        doing, path = "asked for the output of a container", f"containers/{self._container}/{what}"
        try:
            async with self._engine.stream(doing, method, path, params=params) as content:
                on_open()
                while data := await content.readany():
                    await FILES.run(partial(self._feed, data))
                    if len(data) < _SMALL and not content.at_eof():
                        await anyio.sleep(_GATHER)
        except EngineError as error:
            if error.unreachable:
                return False
            # Some log drivers cannot be read, and somebody else may remove the container meanwhile.
            _log.warning("the output of the container %s is not all there: %s", self._container[:12], error)
        return True

    def _feed(self, data: bytes) -> None:
        """Write the complete frames of the stream. Blocking."""
        if self._tty:
            self._write(STDOUT, data)
            return
        self._pending += data
        view, at = memoryview(self._pending), 0
        frames: list[tuple[int, bytes]] = []
        while len(view) - at >= _HEADER.size:
            stream, length = _HEADER.unpack_from(view, at)
            if len(view) - at - _HEADER.size < length:
                break
            at += _HEADER.size
            frames.append((stream, bytes(view[at : at + length])))
            at += length
        view.release()
        del self._pending[:at]
        if not self._separate:
            self._write(STDOUT, b"".join(frame for _, frame in frames))
            return
        for stream, frame in frames:
            self._write(STDERR if stream == STDERR else STDOUT, frame)

    def _write(self, stream: int, data: bytes) -> None:
        if self._skip:
            self._skip, data = max(0, self._skip - len(data)), data[self._skip :]
        if data:
            self.copied += len(data)
            if self._kept is None:
                self._file.write(data, stream=stream)
                return
            try:
                self._kept.write(data)
            except OSError as error:
                _log.warning("output of a run is lost: %s", error)
