"""The guardian process: ends the sessions of a driver that died without ending them itself.

Started by `mlfleet._process.guardian` as a script of its own, so that it does not import mlfleet. It needs the standard
library and psutil only.

It watches the driver by a pidfd, elsewhere by its own parent's id, and not by the end of the pipe: a child that the
driver forked without exec keeps the pipe open. The driver itself uses the functions below that find processes.

Each line of standard input is one message of the driver::

    + <session> <grace in seconds>    a session has begun
    - <session>                       it has ended

After the driver's death it sends SIGTERM to every process group of each session that is left, waits for the session's
grace, sends SIGKILL, and then does the same with every process that has the driver's marker in its environment: a
process that left its session (``setsid``) still has the environment that it was started with.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress

import psutil

_PARENT_POLL = 0.5  # seconds between two looks at the parent's id, where the system has no pidfds
_GAP = 0.05  # seconds in which messages gather: not each of them needs to wake this process up
_PAUSE = 0.05  # seconds between two looks at sessions that are being ended
_MARKER_GRACE = 2.0  # seconds for processes that left their session
_EXEC_PAUSE, _EXEC_LOOKS = 0.002, 10  # seconds between two looks at processes in execve, and their number
_LONGEST_END = 3600.0  # seconds after which a process that does not end (uninterruptible) is given up


def main(driver: int, marker: str) -> None:
    """Wait for the end of the driver, then end what it left.

    Args:
        driver: The process id of the driver, which is the parent of this process.
        marker: The environment variable of the driver's commands, as ``NAME=value``.
    """
    # The driver's terminal, its process group and its users' kill commands must not end the guardian.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    sessions: dict[int, float] = {}
    _watch(driver, sessions)
    # Messages that the driver wrote right before its death.
    _read_rest(sessions)
    _end_sessions(sessions)
    _end_marked(marker)


def _watch(driver: int, sessions: dict[int, float]) -> None:
    """Follow the driver's messages until it has died."""
    if os.getppid() != driver:
        return
    descriptor = _pidfd(driver)
    poll = select.poll()
    poll.register(0, select.POLLIN)
    if descriptor is not None:
        poll.register(descriptor, select.POLLIN)
    rest = b""
    while True:
        ready = dict(poll.poll(None if descriptor is not None else _PARENT_POLL * 1000))
        if 0 in ready:
            data = os.read(0, 65536)
            if data:
                rest = _apply(rest + data, sessions)
                time.sleep(_GAP)
            else:
                poll.unregister(0)
        elif descriptor in ready or os.getppid() != driver:
            return


def _pidfd(driver: int) -> int | None:
    try:
        descriptor = os.pidfd_open(driver)
    except (AttributeError, OSError):
        return None
    # If the driver died before the descriptor was made, it may name another process by now.
    return descriptor if os.getppid() == driver else None


def _read_rest(sessions: dict[int, float]) -> None:
    os.set_blocking(0, False)
    rest = b""
    while True:
        try:
            data = os.read(0, 65536)
        except BlockingIOError:
            return
        if not data:
            return
        rest = _apply(rest + data, sessions)


def _apply(text: bytes, sessions: dict[int, float]) -> bytes:
    """Apply the complete lines of `text`, and return what follows them."""
    *lines, rest = text.split(b"\n")
    for line in lines:
        match line.split():
            case [b"+", session, grace]:
                sessions[int(session)] = float(grace)
            case [b"-", session]:
                sessions.pop(int(session), None)
    return rest


def _end_sessions(sessions: dict[int, float]) -> None:
    begun, asked = time.monotonic(), set[int]()
    while time.monotonic() - begun < _LONGEST_END:
        found = living_groups(sessions)
        if not any(found.values()):
            return
        for session, groups in found.items():
            for group in groups:
                if time.monotonic() - begun >= sessions[session]:
                    _signal_group(group, signal.SIGKILL)
                elif group not in asked:
                    asked.add(group)
                    _signal_group(group, signal.SIGTERM)
                    # A stopped process does not see SIGTERM before it goes on.
                    _signal_group(group, signal.SIGCONT)
        time.sleep(_PAUSE)


def living_groups(sessions: Collection[int], named: Collection[int] = ()) -> dict[int, dict[int, list[str]]]:
    """Return the process groups in each session that have a living member which may be signalled. Blocking.

    Zombies do not count: where nobody reaps orphans (a container without an init), they stay for ever.

    Args:
        sessions: The ids of the sessions, which are the pids of their leaders.
        named: Those of them whose processes are named.

    Returns:
        For each session its groups, each with the names of its processes if the session is one of `named`.
    """
    found: dict[int, dict[int, list[str]]] = {session: {} for session in sessions}
    # Two system calls for each process of the machine, and more only for the first one of each group: 18 ms for 500
    # sessions of two processes, and 1 ms for one session. Reading /proc/<pid>/stat of all took 26 ms and 8 ms.
    for pid in _pids():
        try:
            session = os.getsid(pid)
            groups = found.get(session)
            if groups is None:
                continue
            group = os.getpgid(pid)
            if group in groups and session not in named:
                continue
            process = psutil.Process(pid)
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                continue
            # Another user's process (sudo) cannot be signalled: its end would be waited for without end.
            os.kill(pid, 0)
            names = [f"{process.name()} ({pid})"] if session in named else []
        except (OSError, psutil.Error):
            continue
        groups.setdefault(group, []).extend(names)
    return found


def _pids() -> Iterator[int]:
    """Yield the ids of all processes, and then of those that have begun meanwhile, until there are no more.

    A process may fork and end before its turn: its child is not in the list that it is in.
    """
    seen = set[int]()
    while new := set(psutil.pids()) - seen:
        seen |= new
        yield from new


def _end_marked(marker: str) -> None:
    name, _, value = marker.partition("=")
    begun, asked = time.monotonic(), set[psutil.Process]()
    # Again and again: what is found may have started another process meanwhile.
    while found := [process for process, found in list_marked(name) if found == value]:
        late = time.monotonic() - begun - _MARKER_GRACE
        if late > _LONGEST_END:
            return
        for process in found:
            if late >= 0:
                signal_process(process, signal.SIGKILL)
            elif process not in asked:
                asked.add(process)
                signal_process(process, signal.SIGTERM)
        time.sleep(_PAUSE)


def list_marked(name: str) -> list[tuple[psutil.Process, str]]:
    """Return the living processes that were started with an environment variable, each with its value. Blocking.

    Those that this user may not read are left out, and so is this process.

    Args:
        name: The name of the variable.
    """
    marked = []
    for process, environment in read_environments(_others()):
        with suppress(OSError, psutil.Error):  # it has ended
            value = environment.get(name)
            if value and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                marked.append((process, value))
    return marked


def _others() -> Iterator[psutil.Process]:
    for pid in _pids():
        if pid != os.getpid():
            with suppress(psutil.Error):  # it has ended
                yield psutil.Process(pid)


def read_environments(processes: Iterable[psutil.Process]) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """Yield processes with the environment that each was started with, as far as this user may read it. Blocking.

    The environment of a process that becomes another program (execve) is empty for a moment: look again at those.
    """
    for _ in range(_EXEC_LOOKS):
        empty = []
        for process in processes:
            with suppress(OSError, psutil.Error):  # it has ended, or is another user's
                environment = process.environ()
                if environment:
                    yield process, environment
                elif process.exe():  # a kernel thread or a zombie has no program
                    empty.append(process)
        if not empty:
            return
        processes = empty
        time.sleep(_EXEC_PAUSE)


def signal_process(process: psutil.Process, number: int) -> None:
    """Send a signal to a process, unless it has ended. A stopped one goes on, so that it sees SIGTERM."""
    with suppress(OSError, psutil.Error):
        process.send_signal(number)
        if number == signal.SIGTERM:
            process.send_signal(signal.SIGCONT)


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except OSError:
        return


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
