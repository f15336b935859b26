"""Processes that this one did not start: found again by pid and start time, watched through pidfds."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

from mlfleet._process.process import Process
from mlfleet._process.sessions import living_groups

__all__ = ["CAN_ADOPT", "AdoptedProcess", "adopt", "end_orphans", "start_time"]

CAN_ADOPT = hasattr(os, "pidfd_open") and Path("/proc/self/stat").exists()
"""Whether this system has what it takes (Linux 5.3)."""

_UNKNOWN = 255


class AdoptedProcess(Process):
    """A running process that leads a session, and whose parent is not this process.

    Its exit code is its parent's; `wait` gives one that means nothing.
    """

    __slots__ = ()

    def _poll(self) -> None:
        if self._code is not None or self._pidfd is None:
            return
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(0):
            self._reaped = True
            self._end(_UNKNOWN)


def start_time(stat: str) -> int:
    """When a process started, in ticks since the boot: with its pid it is never given to another one.

    Args:
        stat: the content of its ``/proc/<pid>/stat``.

    Raises:
        ValueError: this is no such content.
    """
    # pid (name) state ppid … starttime: field 22 of proc_pid_stat(5); the name may hold blanks and brackets.
    return int(stat[stat.rindex(")") + 2 :].split()[19])


def adopt(pid: int, started: int) -> int | None:
    """A pidfd of the process with that pid and start time; None: it has ended. Blocking.

    Raises:
        OSError: the system has no room for another file descriptor.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        # Only after the descriptor is there: from now on it cannot come to mean another process.
        if start_time(Path(f"/proc/{pid}/stat").read_text()) == started:
            return pidfd
    except (OSError, ValueError):
        pass
    os.close(pidfd)
    return None


def end_orphans(session: int, started: int) -> None:
    """Kill what is left in the session of a leader that has ended. Blocking.

    Args:
        session: its number, the pid of its leader.
        started: the start time of the leader. A session's number is not given away while a process is in it: if another
            process has it now, the session has ended long ago.
    """
    try:
        if start_time(Path(f"/proc/{session}/stat").read_text()) != started:
            return
    except (OSError, ValueError):
        pass  # reaped
    for group in living_groups({session})[session]:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue
