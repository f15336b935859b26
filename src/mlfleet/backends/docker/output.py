"""Copies what a container prints into the run's file, or to the output of this process."""

from __future__ import annotations

import contextlib
import fcntl
import logging
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
from mlfleet.backends.docker.client import Engine, EngineError
from mlfleet.errors import SubmitError

__all__ = ["Copier", "Custody"]

_log = logging.getLogger("mlfleet.docker")
_HEADER = struct.Struct(
    ">BxxxL"
)  # https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
_STDERR = 2
_SMALL = 16 * 1024
_GATHER = 0.01  # seconds in which more of a trickle is let come, so that it costs fewer turns


class Custody:
    """The right to copy a container's output and to remove it, which one process of this machine has at a time.

    It ends with its process at the latest; then another may take it over (`mlfleet.attach`). Every method blocks, if
    only shortly.

    Args:
        path: of the lock file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    @classmethod
    def of(cls, run_id: str) -> Self:
        """That of a run which this process submits."""
        return cls(runs_folder() / run_id / "container.lock")

    @classmethod
    def told_by(cls, label: str, run_id: str) -> Self:
        """That of a container by its label; of one that another machine submitted, this machine has its own."""
        host, _, path = label.partition(":")
        return cls(Path(path)) if host == socket.gethostname() and path else cls.of(run_id)

    @property
    def label(self) -> str:
        """Where others find it."""
        return f"{socket.gethostname()}:{self._path}"

    @property
    def held(self) -> bool:
        """Whether this one has it."""
        return self._file is not None

    def take(self) -> bool:
        """Take it, if nobody else has it."""
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
        """Whether a process of this machine has it. Makes nothing."""
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
        """Give it up."""
        file, self._file = self._file, None
        if file is not None:
            self._path.unlink(missing_ok=True)
            os.close(file)
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()  # of a run whose output went elsewhere


class Copier:
    """Copies the output of one container from its beginning, live, in order, and each byte once.

    Args:
        engine: that has the container.
        container: its id.
        path: of the file to write; None: the stdout and stderr of this process.
        tty: whether the container has a terminal, so that its output is one plain stream.
    """

    def __init__(self, engine: Engine, container: str, path: Path | None, *, tty: bool) -> None:
        self._engine = engine
        self._container = container
        self._path = path
        self._tty = tty
        self._file: int | None = None
        self._pending = bytearray()
        self._skip = 0
        self.copied = 0

    async def open(self) -> None:
        """Make the file.

        Raises:
            SubmitError: it cannot be written.
        """
        if self._path is None or self._file is not None:
            return
        path = self._path
        try:
            self._file = await FILES.run(partial(_open, path), undo=_close)
        except OSError as error:
            text = f"the output of the run cannot be written to {path}: {error.strerror}"
            raise SubmitError(text, backend="docker") from error

    async def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            await FILES.run(partial(os.close, file))

    async def attach(self, on_attached: Callable[[], None]) -> None:
        """Copy the output of a container that has not started yet, byte for byte, until it or the connection ends.

        Args:
            on_attached: is called when the container may start.
        """
        await self._pump("POST", "attach", {"stream": True, "stdout": True, "stderr": True}, on_attached)

    async def replay(self, *, follow: bool) -> bool:
        """Copy what the engine has kept of the output; what was copied before is left out.

        Args:
            follow: until the container ends. The engine may then break off a moment too early and miss the last line.

        Returns:
            False: this is not all there may be, since the engine broke off.
        """
        self._pending.clear()
        self._skip = self.copied
        return await self._pump("GET", "logs", {"follow": follow, "stdout": True, "stderr": True})

    async def _pump(
        self, method: str, what: str, params: Mapping[str, bool], on_open: Callable[[], None] = lambda: None
    ) -> bool:
        doing, path = "asked for the output of a container", f"containers/{self._container}/{what}"
        try:
            async with self._engine.stream(doing, method, path, params=params) as content:
                on_open()
                while data := await content.readany():
                    await FILES.run(partial(self._take, data))
                    if len(data) < _SMALL and not content.at_eof():
                        await anyio.sleep(_GATHER)
        except EngineError as error:
            if error.unreachable:
                return False
            # Some log drivers cannot be read, and a container may be removed under us.
            _log.warning("the output of the container %s is not all there: %s", self._container[:12], error)
        return True

    def _take(self, data: bytes) -> None:
        """Write what is complete of the stream. Blocking."""
        if self._tty:
            self._write(1, data)
            return
        self._pending += data
        view, at = memoryview(self._pending), 0
        parts: list[tuple[int, bytes]] = []
        while len(view) - at >= _HEADER.size:
            stream, length = _HEADER.unpack_from(view, at)
            if len(view) - at - _HEADER.size < length:
                break
            at += _HEADER.size
            parts.append((stream, bytes(view[at : at + length])))
            at += length
        view.release()
        del self._pending[:at]
        if self._path is not None:
            self._write(1, b"".join(part for _, part in parts))
            return
        for stream, part in parts:
            self._write(stream, part)

    def _write(self, stream: int, data: bytes) -> None:
        if self._skip:
            self._skip, data = max(0, self._skip - len(data)), data[self._skip :]
        if not data:
            return
        self.copied += len(data)
        target = self._file if self._path is not None else (2 if stream == _STDERR else 1)
        if target is None:
            return
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]
        except OSError as error:
            _log.warning("output of the container %s is lost: %s", self._container[:12], error)
            if self._path is not None and self._file is not None:
                os.close(self._file)
                self._file = None


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)


async def _close(file: int) -> None:
    os.close(file)
