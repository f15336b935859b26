"""The signals that ask this process to end: SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGQUIT."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from types import FrameType

import anyio
import anyio.abc

from mlfleet.fleet import Fleet, context_of

__all__ = ["Interrupts", "before_exit", "is_interrupt", "run_until_interrupted"]

_FORCED_PATIENCE = 5.0
"""Seconds for which writing the terminal status of a run is retried after the second signal."""


class Interrupts:
    """The reaction to signals: the first cancels, the second kills, the third exits.

    The first signal cancels the work inside `scope`. The second ends the runs of `fleet` without their grace period;
    nothing of them is left afterwards. The third writes KILLED for the runs that are left, within a second, and then
    has the system's default effect, which a fourth has at once.

    Args:
        say: Shows one line to the user.

    Attributes:
        scope: The scope that the first signal cancels.
        fleet: The Fleet whose runs the second signal kills; None before there is one.
        received: The first signal; None if none has arrived.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.scope = anyio.CancelScope()
        self.fleet: Fleet | None = None
        self.received: signal.Signals | None = None
        self._say = say
        self._leaving: asyncio.Task[None] | None = None

    async def watch(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Wait for the signals and react to them. Returns after the second one."""
        watched = _watched()
        with anyio.open_signal_receiver(*watched) as signals:
            task_status.started()
            async for number in signals:
                if self.received is not None:
                    break
                self.received = number
                self._say(
                    "stopping; Ctrl-C again kills at once" if number is signal.SIGINT else f"{number.name}: stopping"
                )
                self.scope.cancel()
        loop = asyncio.get_running_loop()

        # Not a handler of the loop, which would not run as long as a callback keeps the loop busy.
        def handle(number: int, frame: FrameType | None) -> None:
            for each in watched:
                signal.signal(each, signal.SIG_DFL)
            loop.call_soon_threadsafe(self._leave, number)

        for number in watched:
            signal.signal(number, handle)
        await self._kill()

    def _leave(self, number: int) -> None:
        async def leave() -> None:
            if self.fleet is not None:
                await context_of(self.fleet).fleet.write_killed()
            os.kill(os.getpid(), number)

        self._leaving = asyncio.ensure_future(leave())

    async def _kill(self) -> None:
        self._say("killing; Ctrl-C again leaves at once")
        if self.fleet is None:
            return
        self.fleet.tracking_patience = _FORCED_PATIENCE
        async with anyio.create_task_group() as group:
            for run in self.fleet.runs:
                group.start_soon(partial(run.cancel, grace=0))


def run_until_interrupted(
    work: Callable[[Interrupts], Awaitable[None]], say: Callable[[str], None]
) -> signal.Signals | None:
    """Run `work` in an event loop of its own, and react to signals meanwhile.

    Args:
        work: The coroutine function. It does everything that a signal should cancel inside the scope of its argument.
        say: Shows one line to the user.

    Returns:
        The signal that cancelled the work, after the work has cleaned up; None if none arrived.
    """
    return asyncio.run(_run_watched(work, say))


async def _run_watched(
    work: Callable[[Interrupts], Awaitable[None]], say: Callable[[str], None]
) -> signal.Signals | None:
    interrupts = Interrupts(say)
    async with anyio.create_task_group() as group:
        await group.start(interrupts.watch)
        await work(interrupts)
        group.cancel_scope.cancel()
    return interrupts.received


def _watched() -> list[signal.Signals]:
    # A signal that is ignored at our start stays ignored: that is how `nohup` and the background jobs of scripts work.
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]


def before_exit(work: Callable[[], object], at_once: Callable[[], object]) -> None:
    """Call `work` when SIGTERM or SIGHUP arrives, before the signal ends this process as it would have done at once.

    Does nothing outside of the main thread, where Python sets no handlers. A signal that the program handles itself, or
    that was ignored at its start (``nohup``), stays as it is. A forked child (multiprocessing) has nothing to end:
    there the signals have their usual effect.

    Args:
        work: Called at the first signal.
        at_once: Called at a second signal while `work` goes on, before it ends this process; a third one does so at
            once.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    numbers = {each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL}
    if not numbers:
        return
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            work()
            restore()
        else:
            restore()
            at_once()
        os.kill(os.getpid(), number)

    def restore() -> None:
        for each in numbers:
            if signal.getsignal(each) is handle:
                signal.signal(each, signal.SIG_DFL)

    # The signals are held back over the fork: one that came to the child before it has its usual effect again would be
    # lost.
    masks = threading.local()

    def hold() -> None:
        masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def go_on() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.before)

    def forget() -> None:
        restore()
        go_on()

    for each in numbers:
        signal.signal(each, handle)
    os.register_at_fork(before=hold, after_in_parent=go_on, after_in_child=forget)


def is_interrupt(error: BaseException | None) -> bool:
    """Return whether a KeyboardInterrupt led to `error`, also if the cleaning up after it failed in turn."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
