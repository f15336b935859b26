"""Copies the output of a container into the run's file, or to the output of this process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Self

import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet._paths import runs_folder
from mlfleet._process.reattach import machine
from mlfleet._run_log import get_logger
from mlfleet.backends._remote.output import STDERR, STDOUT, KeptOutput, begin_output, pass_on
from mlfleet.backends.docker.client import Engine, EngineError
from mlfleet.errors import SubmitError

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
        return cls(Path(path)) if host == machine() and path else cls.of_run(run_id)

    @property
    def label(self) -> str:
        """The text by which other processes find the lock."""
        return f"{machine()}:{self._path}"

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

    def release(self) -> None:
        """Release the lock and remove its file."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
                self._path.parent.rmdir()  # empty if the run's output went elsewhere
            os.close(file)


class OutputCopy:
    """Copies the output of one container from its beginning, live, in order, and each byte once.

    Args:
        engine: The engine that has the container.
        container: The container's id.
        path: The file to write; None: the stdout and stderr of this process.
        tty: True if the container has a terminal, so that its output is one plain stream.
        keep: True to go on with what the file holds, rather than begin the file anew: an engine that rotates logs may
            have discarded what an earlier process has copied.

    Attributes:
        copied: The number of bytes copied so far.
    """

    def __init__(self, engine: Engine, container: str, path: Path | None, *, tty: bool, keep: bool = False) -> None:
        self._engine = engine
        self._container = container
        self._path = path
        self._file = KeptOutput(path, backend="docker")
        self._keep = keep
        self._tty = tty
        self._pending = bytearray()
        self._skip = 0
        self._lost = False
        self.copied = 0

    async def open(self) -> None:
        """Make the file, if that was not done before.

        Raises:
            SubmitError: It cannot be written.
        """
        if self._path is not None and not self._keep:
            await FILES.run(partial(begin_output, self._path, backend="docker"))
            self._keep = True

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
        if self._path is None:
            self._skip = self.copied
        else:
            # Compared with the file from its beginning, since the engine may have discarded what was copied.
            self._file = KeptOutput(self._path, backend="docker")
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
        if self._path is not None:
            self._write(STDOUT, b"".join(frame for _, frame in frames))
            return
        for stream, frame in frames:
            self._write(STDERR if stream == STDERR else STDOUT, frame)

    def _write(self, stream: int, data: bytes) -> None:
        if self._skip:
            self._skip, data = max(0, self._skip - len(data)), data[self._skip :]
        if not data:
            return
        self.copied += len(data)
        if self._path is None:
            pass_on(data, stream)
            return
        try:
            self._file.write(data)
        except (OSError, SubmitError) as error:  # a full disk costs lines and not the run
            if not self._lost:
                self._lost = True
                _log.warning("output of a run is lost, %s cannot be written: %s", self._path, error)
