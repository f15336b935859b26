"""Who still lives in the session of a process that is being ended.

A command leads a session, but its processes need not stay in its process group: ``timeout 60 python train.py`` makes a
group of its own, and so does ``set -m``. So whoever wants all of a command gone must look at the session.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from anyio.lowlevel import RunVar

__all__ = ["SessionWatch", "living_groups"]

_PROC = "/proc"
_HAS_PROC = Path(f"{_PROC}/self/stat").exists()
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1  # seconds


def living_groups(sessions: Collection[int]) -> dict[int, set[int]]:
    """The process groups in each of `sessions` that have a member which is alive and may be signalled. Blocking.

    Zombies do not count: where nobody reaps orphans (a container without an init), they stay for ever.
    Without /proc only the group of each session's leader is looked at.
    """
    found: dict[int, set[int]] = {session: set() for session in sessions}
    if not _HAS_PROC:
        for session in sessions:
            if _may_signal(-session):
                found[session].add(session)
        return found
    for entry in os.listdir(_PROC):  # noqa: PTH208 - a Path for each process of the machine would cost
        if not entry.isdigit():
            continue
        try:
            state, group, session = _read_stat(entry)
        except OSError:  # it has just ended
            continue
        if session in found and state not in (b"Z", b"X") and _may_signal(int(entry)):
            found[session].add(group)
    return found


def _read_stat(entry: str) -> tuple[bytes, int, int]:
    descriptor = os.open(f"{_PROC}/{entry}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(descriptor, 1024)
    finally:
        os.close(descriptor)
    # pid (name) state ppid pgrp session …; the name may hold blanks and brackets: proc_pid_stat(5)
    fields = text[text.rindex(b")") + 2 :].split(maxsplit=4)
    return fields[0], int(fields[2]), int(fields[3])


def _may_signal(target: int) -> bool:
    try:
        os.kill(target, 0)
    except OSError:  # gone, or another user's (sudo): we could wait for ever for its end
        return False
    return True


class SessionWatch:
    """Looks at all sessions of one event loop that are being ended, with one look for all of them at a time.

    One thread does it, only while there are any. Each look's result is told in the event loop.
    """

    _of_loop: RunVar[SessionWatch] = RunVar("mlfleet sessions")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._tell: dict[int, Callable[[set[int]], None]] = {}
        self._changed = threading.Condition()
        self._pause = _SHORTEST_PAUSE
        self._running = False

    @classmethod
    def of_running_loop(cls) -> SessionWatch:
        """The one of the running event loop."""
        watch = cls._of_loop.get(None)
        if watch is None:
            watch = cls(asyncio.get_running_loop())
            cls._of_loop.set(watch)
        return watch

    def add(self, session: int, tell: Callable[[set[int]], None]) -> None:
        """Call `tell` with the living groups of `session` after each look, until `remove`."""
        with self._changed:
            self._tell[session] = tell
            begin = not self._running
            self._running = True
        if begin:
            self._begin()
        self.hurry()

    def remove(self, session: int) -> None:
        """Look at `session` no more."""
        with self._changed:
            self._tell.pop(session, None)
            self._changed.notify()

    def hurry(self) -> None:
        """Something has just happened: look again now."""
        with self._changed:
            self._pause = _SHORTEST_PAUSE
            self._changed.notify()

    def _begin(self) -> None:
        try:
            threading.Thread(target=self._look, name="mlfleet sessions", daemon=True).start()
        except RuntimeError:
            # No thread can be had: the limit is reached, or the interpreter is about to end. Processes must be ended
            # all the more, even if each look holds up the event loop for a few milliseconds.
            self._look_without_thread()

    def _look(self) -> None:
        while sessions := self._watched():
            found = living_groups(sessions)
            try:
                self._loop.call_soon_threadsafe(self._report, found)
            except RuntimeError:  # the loop is closed
                return
            with self._changed:
                self._changed.wait(self._pause)
                self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    def _look_without_thread(self) -> None:
        if sessions := self._watched():
            self._loop.call_later(_LONGEST_PAUSE, self._look_without_thread)
            self._loop.call_soon(self._report, living_groups(sessions))

    def _watched(self) -> list[int]:
        with self._changed:
            self._running = bool(self._tell)
            return list(self._tell)

    def _report(self, found: dict[int, set[int]]) -> None:
        for session, groups in found.items():
            tell = self._tell.get(session)
            if tell is not None:
                tell(groups)
