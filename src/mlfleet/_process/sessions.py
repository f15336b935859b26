"""The processes that still live in sessions that are being ended.

A command leads a session, but its processes need not stay in its process group: ``timeout 60 python train.py`` makes a
group of its own, and so does ``set -m``. So to end all of a command, its whole session is looked at.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import ClassVar
from weakref import WeakKeyDictionary

from mlfleet._concurrency.threads import SESSIONS

__all__ = ["SessionWatch", "kill_session", "signal_group"]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.01, 0.1  # seconds
_SIGNALLING = 0.002  # seconds of one iteration of the event loop that are spent on sending signals


def signal_group(group: int, number: int) -> None:
    """Send a signal to a process group, if it still exists and belongs to this user."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def kill_session(session: int) -> None:
    """Kill all processes of a session. Blocking."""
    for group in _living_groups({session})[session]:
        signal_group(group, signal.SIGKILL)


def _living_groups(sessions: Collection[int], named: Collection[int] = ()) -> dict[int, dict[int, list[str]]]:
    from mlfleet._process.guardian_main import living_groups  # late, and in a thread: most uses of mlfleet end nothing

    return living_groups(sessions, named)


_Callback = Callable[[Mapping[int, Sequence[str]]], None]


class SessionWatch:
    """Looks at all sessions of one event loop that are being ended, with one look in a thread for all of them."""

    _of_loops: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, SessionWatch]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._callbacks: dict[_Callback, tuple[int, bool]] = {}  # each with its session, and if that is named
        self._pause = _SHORTEST_PAUSE
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._signals: deque[Callable[[], None]] = deque()

    @classmethod
    def of_running_loop(cls) -> SessionWatch:
        """Return the watch of the running event loop."""
        loop = asyncio.get_running_loop()
        watch = cls._of_loops.get(loop)
        if watch is None:
            watch = cls._of_loops[loop] = cls()
        return watch

    def add(self, session: int, callback: _Callback, *, named: bool = False) -> None:
        """Call `callback` with the living groups of `session` after each look, until `remove`.

        Args:
            session: The id of the session. More than one callback may be interested in it.
            callback: Called with the groups of the session, each with the names of its processes.
            named: True to have the processes named.
        """
        self._callbacks[callback] = session, named
        if self._task is None:
            self._start()
        self.hurry()

    def remove(self, callback: _Callback) -> None:
        """Stop calling `callback`."""
        if self._callbacks.pop(callback, None) is None:
            return
        if not self._callbacks and self._task is not None:
            self._task.cancel()

    def hurry(self) -> None:
        """Look again soon, because something has just happened."""
        self._pause = _SHORTEST_PAUSE
        self._hurry.set()

    def signal_soon(self, send: Callable[[], None]) -> None:
        """Call `send` in one of the next iterations of the event loop: of hundreds, a few in each.

        A signal lets its process run at once, in this one's place: half a millisecond each on a busy machine.
        """
        if not self._signals:
            asyncio.get_running_loop().call_soon(self._send_some)
        self._signals.append(send)

    def _send_some(self) -> None:
        until = time.monotonic() + _SIGNALLING
        while self._signals and time.monotonic() < until:
            self._signals.popleft()()
        if self._signals:
            asyncio.get_running_loop().call_soon(self._send_some)

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._look(), name="mlfleet sessions", context=Context())
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        # asyncio.run cancels every task at its end, but the tasks that stop processes wait for the processes' end.
        # And a session may have been added after the last look.
        if self._callbacks and (task.cancelled() or task.exception() is None):
            self._start()

    async def _look(self) -> None:
        while self._callbacks:
            await self._look_once()

    async def _look_once(self) -> None:
        begun = time.monotonic()
        living = await self._living()
        for callback, (session, _) in list(self._callbacks.items()):
            # A session that was added meanwhile has its turn at the next look; a callback may remove another one.
            if session in living and callback in self._callbacks:
                callback(living[session])
        # Where there are thousands of processes, at least half of the time is free of looks.
        await asyncio.sleep(max(_SHORTEST_PAUSE, time.monotonic() - begun))
        with suppress(TimeoutError):
            async with asyncio.timeout(self._pause):
                await self._hurry.wait()
        self._hurry.clear()
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    async def _living(self) -> dict[int, dict[int, list[str]]]:
        sessions = {session for session, _ in self._callbacks.values()}
        named = {session for session, is_named in self._callbacks.values() if is_named}
        try:
            return await SESSIONS.run(partial(_living_groups, sessions, named))
        except RuntimeError:
            # The limit of threads is reached, or the interpreter is ending. Processes must be ended all the more, even
            # if each look holds up the event loop for some milliseconds.
            self._pause = _LONGEST_PAUSE
            return _living_groups(sessions, named)
