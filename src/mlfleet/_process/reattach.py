"""Processes that this one did not start: recognised by pid and start time, and watched until they end."""

from __future__ import annotations

import os
import select
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from mlfleet._process.process import Process, open_pidfd

__all__ = [
    "Identity",
    "ProcessRecord",
    "ReattachedProcess",
    "boot_id",
    "identify",
    "machine",
    "open_process",
    "pid_namespace",
]

_HAS_PROC = Path("/proc/self/stat").exists()
_CLOCK_ERROR = 2.0  # seconds between the clocks of file systems and of process tables; psutil's boot time is rounded
_POLL_PAUSE = 0.1  # seconds
_UNKNOWN = 255


@dataclass(frozen=True, slots=True)
class Identity:
    """A pid together with the start of its process, which no other process shares.

    Attributes:
        pid: The id, which the system gives to another process later.
        started: The start of the process: on Linux in clock ticks since the boot, elsewhere in seconds since the epoch.
            Only equality counts. On Linux, psutil's seconds change with the wall clock.
    """

    pid: int
    started: float

    def is_alive(self) -> bool:
        """Return True while the process runs; a zombie does not. Blocking."""
        import psutil

        if identify(self.pid) != self:
            return False
        try:
            return psutil.Process(self.pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.Error:
            return False


def identify(pid: int) -> Identity | None:
    """Return the identity of the process that has the pid now, or None if none has. Blocking."""
    if _HAS_PROC:
        try:
            return Identity(pid, _Stat.parse(Path(f"/proc/{pid}/stat").read_text(errors="replace")).started)
        except (OSError, ValueError, IndexError):
            return None
    import psutil

    try:
        return Identity(pid, psutil.Process(pid).create_time())
    except psutil.Error:
        return None


@dataclass(frozen=True, slots=True)
class _Stat:
    pid: int
    parent: int
    started: int

    @classmethod
    def parse(cls, text: str) -> _Stat:
        # pid (name) state ppid … starttime: fields 4 and 22 of proc_pid_stat(5); the name may hold blanks and brackets.
        fields = text[text.rindex(")") + 2 :].split()
        return cls(int(text.split(maxsplit=1)[0]), int(fields[1]), int(fields[19]))


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """The record that a process has written about itself, to be recognised later.

    On Linux the text is the process's ``/proc/<pid>/stat``. Elsewhere it is the pid and the parent's pid, and the time
    of the writing tells the process from later ones with the same pid.

    Attributes:
        pid: The pid of the process.
        parent: The pid of its parent at that time.
        started: The start of the process in clock ticks since the boot; None if it is not recorded.
        written: The time of the writing, in seconds since the epoch.
    """

    pid: int
    parent: int
    started: int | None
    written: float

    @classmethod
    def parse(cls, text: str, written: float) -> ProcessRecord:
        """Read a record.

        Args:
            text: The content of the file.
            written: The modification time of the file, in seconds since the epoch.

        Raises:
            ValueError: This is not a record of a process.
        """
        if ")" in text:
            try:
                stat = _Stat.parse(text)
            except IndexError as error:
                raise ValueError(f"not a process record: {text!r}") from error
            return cls(stat.pid, stat.parent, stat.started, written)
        pid, parent = text.split()
        return cls(int(pid), int(parent), None, written)

    def identity(self) -> Identity | None:
        """Return the identity of the recorded process, or None if it has ended and was reaped. Blocking."""
        now = identify(self.pid)
        return now if now is not None and self._is_of(now) else None

    def pid_was_reused(self) -> bool:
        """Return True if another process has the pid now. Blocking."""
        now = identify(self.pid)
        return now is not None and not self._is_of(now)

    def has_its_parent(self) -> bool:
        """Return True if the process still is the child of the process that started it. Blocking."""
        import psutil

        # A process whose parent has died gets another one: init, or a process that asked for orphans.
        try:
            return psutil.Process(self.pid).ppid() == self.parent != 1
        except psutil.Error:
            return False

    def _is_of(self, now: Identity) -> bool:
        if self.started is not None:
            return now.started == self.started
        import psutil

        try:
            return psutil.Process(now.pid).create_time() <= self.written + _CLOCK_ERROR
        except psutil.Error:
            return False


def machine() -> str:
    """Return the name of this machine or container."""
    return socket.gethostname()


def boot_id() -> str:
    """Return the id of this boot of the machine; empty where start times need none. Blocking."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """Return the namespace in which this process's pids count; empty on systems without such. Blocking."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - it is not a path
    except OSError:
        return ""


def open_process(identity: Identity) -> tuple[bool, int | None]:
    """Look for a process, and open its descriptor where the system has them. Blocking.

    Returns:
        True if it lives, and its descriptor: None if it has ended, or on systems without pidfds.

    Raises:
        OSError: The system has no room for another file descriptor.
    """
    try:
        pidfd = open_pidfd(identity.pid)
    except ProcessLookupError:
        return False, None
    # Checked only now: from here on the descriptor cannot come to mean another process.
    if identity.is_alive():
        return True, pidfd
    if pidfd is not None:
        os.close(pidfd)
    return False, None


class ReattachedProcess(Process):
    """A running process that leads a session, and whose parent is not this process.

    Only its parent learns its exit code: `wait` returns a meaningless one.

    Args:
        identity: The process.
        pidfd: Its descriptor, from `open_process`.
        title: What the process is, for messages.
        rest_grace: Seconds between SIGTERM and SIGKILL for what it leaves in its session; None: that is left alone.
    """

    __slots__ = ("_identity",)

    def __init__(
        self, identity: Identity, pidfd: int | None, title: str = "a command", rest_grace: float | None = None
    ) -> None:
        self._identity = identity
        super().__init__(identity.pid, pidfd, title, rest_grace)

    def _poll(self) -> None:
        if self._code is not None or self._pidfd is None:
            return
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(0):
            self._reaped = True
            self._end(_UNKNOWN)

    def _wait_blocking(self) -> int:
        while self._identity.is_alive():
            time.sleep(_POLL_PAUSE)
        self._reaped = True
        return _UNKNOWN
