"""Ctrl-C and its like: the first asks, the second forces, the third is left to the system."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from functools import partial

import anyio
import anyio.abc

from mlfleet.fleet import Fleet

__all__ = ["Interrupts", "run_until_interrupted"]

_BRIEFLY = 5.0
"""Seconds for which the terminal status of a killed run is tried to be written."""


class Interrupts:
    """The signals that ask this process to end.

    The first cancels what goes on inside of `scope`. The second ends the runs of `fleet` without their grace. After
    that the signals do what they do to any process; by then nothing of the runs is left.

    Args:
        say: tells the person who waits.

    Attributes:
        scope: what the first signal cancels.
        fleet: whose runs the second signal kills.
        received: the first signal; None while there was none.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.scope = anyio.CancelScope()
        self.fleet: Fleet | None = None
        self.received: signal.Signals | None = None
        self._say = say

    async def watch(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Wait for the signals and act on them; ends after the second."""
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
        for number in watched:
            signal.signal(number, signal.SIG_DFL)
        await self._kill()

    async def _kill(self) -> None:
        self._say("killing; Ctrl-C again leaves without telling MLflow")
        if self.fleet is None:
            return
        self.fleet.tracking_patience = _BRIEFLY
        async with anyio.create_task_group() as group:
            for run in self.fleet.runs:
                group.start_soon(partial(run.cancel, grace=0))


def run_until_interrupted(
    work: Callable[[Interrupts], Awaitable[None]], say: Callable[[str], None]
) -> signal.Signals | None:
    """Run `work` in an event loop of its own.

    Args:
        work: does in the scope of its argument what a signal is to cancel.
        say: tells the person who waits.

    Returns:
        The signal that cancelled it, after it has cleaned up; None if there was none.
    """
    return asyncio.run(_watched_work(work, say))


async def _watched_work(
    work: Callable[[Interrupts], Awaitable[None]], say: Callable[[str], None]
) -> signal.Signals | None:
    interrupts = Interrupts(say)
    async with anyio.create_task_group() as group:
        await group.start(interrupts.watch)
        await work(interrupts)
        group.cancel_scope.cancel()
    return interrupts.received


def _watched() -> list[signal.Signals]:
    """A signal that is ignored when we start stays ignored: ``nohup``, background jobs of scripts."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
