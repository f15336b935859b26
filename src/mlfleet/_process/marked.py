"""The processes of a run that left its session: found by a variable in the environment that they were started with."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from anyio.lowlevel import RunVar

from mlfleet._concurrency.single_flight import Coalescing
from mlfleet._concurrency.threads import FILES, SESSIONS
from mlfleet._process.guardian import RUN_VARIABLE
from mlfleet._run_log import get_logger

if TYPE_CHECKING:
    import psutil

__all__ = ["MarkedProcess", "end_marked", "find_marked"]

_log = get_logger("mlfleet.process")

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 0.2  # seconds between two looks
_STUCK = 30.0  # seconds after SIGKILL, after which a process (uninterruptible) is given up

_Found = Mapping[str, Sequence["MarkedProcess"]]
_looks: RunVar[Coalescing[str, _Found]] = RunVar("mlfleet looks for marked processes")


@dataclass(frozen=True, slots=True)
class MarkedProcess:
    """A living process that has the variable.

    Attributes:
        process: The process; psutil signals no other one that has got its pid.
        session: The id of its session.
    """

    process: psutil.Process
    session: int


async def find_marked(run_id: str) -> Sequence[MarkedProcess]:
    """Return the living processes of a run, but for this one. Calls at the same time share one look."""
    look = _looks.get(None)
    if look is None:
        look = Coalescing()
        _looks.set(look)
    return (await look("all", partial(SESSIONS.run, _look))).get(run_id, ())


async def end_marked(
    run_id: str,
    grace: float,
    *,
    session: int | None = None,
    goes_on: Callable[[], bool] = lambda: False,
    may_end: Callable[[], bool] = lambda: True,
) -> None:
    """Send SIGTERM to the processes of a run outside of its session, after the grace SIGKILL, until none is left.

    The caller must call it in `mlfleet._concurrency.cancellation.complete`.

    Args:
        run_id: The id of the MLflow run.
        grace: Seconds between SIGTERM and SIGKILL.
        session: The id of the run's session, which is ended otherwise; None: all of its processes are meant.
        goes_on: Returns True as long as the session may start further processes.
        may_end: Returns True when the processes may be signalled.
    """
    loop = asyncio.get_running_loop()
    begun, asked, pause = loop.time(), set[int](), _SHORTEST_PAUSE
    while True:
        is_last = not goes_on()
        if is_last and not may_end():
            return
        found = [each.process for each in await find_marked(run_id) if each.session != session]
        late = loop.time() - begun - grace
        if not found and is_last:
            return
        if late > _STUCK:
            names = ", ".join(str(process.pid) for process in found)
            _log.warning(
                "processes of the run %s do not end, although they were killed: %s",
                run_id,
                names,
                extra={"run_id": run_id},
            )
            return
        number = signal.SIGKILL if late >= 0 else signal.SIGTERM
        new = [process for process in found if late >= 0 or process.pid not in asked]
        if new and may_end():
            asked.update(process.pid for process in new)
            await FILES.run(partial(_signal, new, number))
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)


def _look() -> _Found:
    """Look at all processes of the machine that this user may read. Blocking."""
    from mlfleet._process.guardian_main import list_marked  # late, and in a thread: most uses of mlfleet end nothing

    found: dict[str, list[MarkedProcess]] = defaultdict(list)
    for process, run_id in list_marked(RUN_VARIABLE):
        with suppress(OSError):  # it has ended
            found[run_id].append(MarkedProcess(process, os.getsid(process.pid)))
    return found


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    from mlfleet._process.guardian_main import signal_process

    for process in processes:
        signal_process(process, number)
