"""Who still lives in the session of a process that is being ended.

A command leads a session, but its processes need not stay in its process group: ``timeout 60 python train.py`` makes a
group of its own, and so does ``set -m``. So whoever wants all of a command gone must look at the session.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import ClassVar
from weakref import WeakKeyDictionary

__all__ = ["SessionWatch", "living_groups"]

_PROC = "/proc"
_HAS_PROC = Path(f"{_PROC}/self/stat").exists()
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1  # seconds
_TURN = 0.002  # seconds of each turn of the event loop for signals


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

    The looks are made in one thread, which is there only while there are such sessions; everything else happens in the
    event loop, so there is no lock that the two could contend for.
    """

    _of_loops: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, SessionWatch]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._tell: dict[int, Callable[[set[int]], None]] = {}
        self._pause = _SHORTEST_PAUSE
        self._next: asyncio.TimerHandle | None = None
        self._looking = False
        self._thread: SimpleQueue[list[int]] | None = None
        self._turns: deque[Callable[[], None]] = deque()

    @classmethod
    def of_running_loop(cls) -> SessionWatch:
        """The one of the running event loop."""
        loop = asyncio.get_running_loop()
        watch = cls._of_loops.get(loop)
        if watch is None:
            watch = cls._of_loops[loop] = cls()
        return watch

    def add(self, session: int, tell: Callable[[set[int]], None]) -> None:
        """Call `tell` with the living groups of `session` after each look, until `remove`."""
        self._tell[session] = tell
        self.hurry()

    def remove(self, session: int) -> None:
        """Look at `session` no more."""
        self._tell.pop(session, None)

    def hurry(self) -> None:
        """Something has just happened: look again soon."""
        self._pause = _SHORTEST_PAUSE
        if not self._looking:
            self._look_in(self._pause)

    def in_turn(self, signal: Callable[[], None]) -> None:
        """Call `signal` soon. Of hundreds, a few in each turn of the event loop.

        A signal lets its process run at once, in this one's place: half a millisecond each on a busy machine.
        """
        if not self._turns:
            asyncio.get_running_loop().call_soon(self._take_turns)
        self._turns.append(signal)

    def _take_turns(self) -> None:
        until = time.monotonic() + _TURN
        while self._turns and time.monotonic() < until:
            self._turns.popleft()()
        if self._turns:
            asyncio.get_running_loop().call_soon(self._take_turns)

    def _look_in(self, pause: float) -> None:
        loop = asyncio.get_running_loop()
        when = loop.time() + pause
        if self._next is not None:
            if self._next.when() <= when:
                return
            self._next.cancel()
        self._next = loop.call_at(when, self._look)

    def _look(self) -> None:
        self._next = None
        sessions = list(self._tell)
        if not sessions:
            self._end_thread()
            return
        self._looking = True
        if self._thread is None:
            self._thread = _start_thread(partial(self._in_thread, asyncio.get_running_loop()))
        if self._thread is None:
            # Processes must be ended all the more, even if each look holds up the event loop for some milliseconds.
            self._pause = _LONGEST_PAUSE
            self._report(living_groups(sessions), 0)
        else:
            self._thread.put(sessions)

    def _report(self, found: dict[int, set[int]], took: float) -> None:
        for session, groups in found.items():
            tell = self._tell.get(session)
            if tell is not None:
                tell(groups)
        self._looking = False
        self._look_in(max(self._pause, took))  # where there are thousands of processes, not all the time
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    def _end_thread(self) -> None:
        if self._thread is not None:
            self._thread.put([])
            self._thread = None

    def _in_thread(self, loop: asyncio.AbstractEventLoop, asked: SimpleQueue[list[int]]) -> None:
        while sessions := asked.get():
            begun = time.monotonic()
            found = living_groups(sessions)
            try:
                loop.call_soon_threadsafe(self._report, found, time.monotonic() - begun)
            except RuntimeError:  # the loop is closed
                return


def _start_thread(work: Callable[[SimpleQueue[list[int]]], None]) -> SimpleQueue[list[int]] | None:
    """Start a thread that gets its work from a queue. None: the limit is reached, or the interpreter is ending."""
    queue: SimpleQueue[list[int]] = SimpleQueue()
    try:
        threading.Thread(target=work, args=(queue,), name="mlfleet sessions", daemon=True).start()
    except RuntimeError:
        return None
    return queue
