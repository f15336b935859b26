"""Runs of other processes: wait for them, cancel them and read their output, without supervising them here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import anyio

from mlfleet._concurrency.cancellation import wait_done
from mlfleet._concurrency.threads import FILES
from mlfleet._engine.attach import read_reference
from mlfleet._engine.conclude import UNSEEN_PATIENCE, Driver, Verdict, conclude, find_processes, judge
from mlfleet._engine.records import find_record, list_records
from mlfleet._engine.request import SweepMember
from mlfleet._engine.run import handle_output
from mlfleet._paths import run_folder
from mlfleet._sweeps import NAME_TAG, SPACE_TAG, is_driven
from mlfleet._sweeps.members import Members
from mlfleet._sweeps.record import forget, lock_path
from mlfleet._text.lines import follow_bytes
from mlfleet.backends.base import BackendRun
from mlfleet.errors import BackendError, MlfleetError, RunLost, UsageError
from mlfleet.fleet import Fleet, context_of
from mlfleet.runs import JobRef, Outcome, RunStatus
from mlfleet.tracking import RunInfo
from mlfleet.tracking.base import end_run, failure_tags

__all__ = ["cancel_run", "cancel_sweep", "look_at", "read_output", "wait_for"]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.2, 2.0  # seconds between two looks
_PAUSE_ELSEWHERE = 5.0  # seconds between two looks at a run whose driver cannot be seen
_MOST_RUNS = 50_000  # what mlflow's own stores give at most
_DRIVER_PATIENCE = 5.0  # seconds in which a driver must see that its sweep was cancelled


async def wait_for(fleet: Fleet, run_id: str, *, unseen_patience: float = UNSEEN_PATIENCE) -> RunInfo:
    """Wait until a run has its terminal status. A cancelled call leaves the run as it is.

    If the process that should write the status is gone, it is written here when the run is over.

    Args:
        fleet: The Fleet whose tracking and backends are used.
        run_id: The id of the MLflow run.
        unseen_patience: Seconds from the end of the run at its backend in which a process that cannot be seen from here
            must write the status. Default: two minutes.

    Raises:
        UsageError: The run is a sweep whose driver is gone.
        MlfleetError: Tracking or the backend cannot be reached.
    """
    pause, seen, watch = _SHORTEST_PAUSE, 0, _Watch(fleet, unseen_patience)
    while True:
        info = await fleet.tracking.get_run(run_id)
        if info.status.is_terminal:
            return info
        if SPACE_TAG in info.tags and NAME_TAG in info.tags:
            seen = 0 if await is_driven(fleet.tracking, info) else seen + 1
            if seen > 1:
                raise UsageError(f"no process drives the sweep {info.name!r} ({run_id}) any more: resume it")
        elif await watch.is_left(info):
            await conclude(context_of(fleet), info, watch.verdict)
            continue
        await anyio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)


async def cancel_run(fleet: Fleet, run_id: str, *, grace: float | None = None) -> RunInfo:
    """End a run of another process, and return when nothing of it runs any more and its status is KILLED.

    A run that has ended keeps its status. The process that supervises the run, if it lives, sees a cancelled run.

    Args:
        fleet: The Fleet whose tracking and backends are used.
        run_id: The id of the MLflow run.
        grace: Seconds between the request to stop and the end by force; None: the grace that the run was submitted
            with.

    Raises:
        UsageError: The command of a run of this machine has not begun.
        BackendError: The run is not where it should be.
        MlfleetError: Tracking cannot be reached.
    """
    info = await fleet.tracking.get_run(run_id)
    if SPACE_TAG in info.tags:
        return await cancel_sweep(fleet, info, grace=grace)
    if info.status.is_terminal:
        return info
    verdict = await judge(context_of(fleet), info, elsewhere=False)
    if verdict.is_left:
        await conclude(context_of(fleet), info, verdict)
        return await fleet.tracking.get_run(run_id)
    if verdict.driver is Driver.GONE and JobRef.TAG not in info.tags:
        await (await fleet.attach(run_id)).cancel(grace=grace)  # the processes that its driver has left
        return await fleet.tracking.get_run(run_id)
    if verdict.driver is Driver.LIVES and JobRef.TAG not in info.tags:
        processes = await _find_processes(fleet, run_id)
        if processes is not None:
            await _end(fleet, info, processes, grace)
            return await fleet.tracking.get_run(run_id)
    reference = read_reference(info)
    backend = await context_of(fleet).backend(reference.backend)
    if await backend.withdraw(reference):
        await fleet.tracking.update_run(run_id, RunStatus.KILLED)
        return await fleet.tracking.get_run(run_id)
    handle = await backend.attach(reference)
    if (await handle.get_status()).is_terminal:
        await _settle(fleet, run_id, await handle.outcome())
        return await fleet.tracking.get_run(run_id)
    await _end(fleet, info, handle, grace)
    return await fleet.tracking.get_run(run_id)


async def cancel_sweep(fleet: Fleet, info: RunInfo, *, grace: float | None = None) -> RunInfo:
    """End a sweep and all its runs, also if its driver is gone.

    Args:
        fleet: The Fleet whose tracking and backends are used.
        info: The sweep's MLflow run.
        grace: The grace of each run; see `cancel_run`.

    Raises:
        ExceptionGroup: Some runs could not be cancelled; it holds their errors.
        MlfleetError: Tracking cannot be reached.
    """
    name = info.tags.get(NAME_TAG)
    if name is not None and not await is_driven(fleet.tracking, info):
        await FILES.run(partial(forget, lock_path(fleet.tracking, info.experiment_id, name)))
    if info.status.is_terminal:
        return info
    await fleet.tracking.update_run(info.run_id, RunStatus.KILLED)
    waited = 0.0
    errors: dict[str, MlfleetError] = {}
    lost: dict[str, MlfleetError] = {}  # runs whose end is not confirmed: to wait for it again would take as long
    # The driver may start further runs until it has seen that its sweep was cancelled.
    while waited < _DRIVER_PATIENCE:
        running: list[RunInfo] = []
        for status in (RunStatus.RUNNING, RunStatus.SCHEDULED):
            wanted = f"tags.`{SweepMember.ID_TAG}` = '{info.run_id}' and attributes.status = '{status}'"
            running += await fleet.tracking.search_runs([info.experiment_id], wanted, max_results=_MOST_RUNS)
        errors.clear()
        running = [run for run in await FILES.run(partial(_members, fleet, info, running)) if run.run_id not in lost]
        async with anyio.create_task_group() as group:
            for run in running:
                group.start_soon(_try_to_cancel, fleet, run.run_id, grace, errors)
        if not running and NAME_TAG in info.tags and not await is_driven(fleet.tracking, info):
            break
        waited = waited + _SHORTEST_PAUSE if len(errors) == len(running) else 0.0
        lost.update({run_id: error for run_id, error in errors.items() if isinstance(error, RunLost)})
        await anyio.sleep(_SHORTEST_PAUSE)
    errors |= lost
    if errors:
        raise ExceptionGroup(f"{len(errors)} runs could not be cancelled", list(errors.values()))
    return await fleet.tracking.get_run(info.run_id)


def _members(fleet: Fleet, sweep: RunInfo, runs: Sequence[RunInfo]) -> Sequence[RunInfo]:
    """Return those of the runs tagged as a sweep's that are its own, as far as this machine knows. Blocking."""
    if name := sweep.tags.get(NAME_TAG):
        members = Members.read(lock_path(fleet.tracking, sweep.experiment_id, name))
        return members.choose(runs) if members is not None and members.is_of(sweep) else runs
    own = {record.run_id for record in list_records() if record.sweep_id == sweep.run_id}
    return [run for run in runs if run.run_id in own] if own else runs


async def read_output(fleet: Fleet, run_id: str, *, follow: bool) -> AsyncGenerator[bytes, None]:
    """Yield a run's output byte for byte from its beginning.

    Args:
        fleet: The Fleet whose tracking and backends are used.
        run_id: The id of the MLflow run.
        follow: True to go on until the run has ended.

    Raises:
        UsageError: The output is not kept on this machine.
        MlfleetError: Tracking or the backend cannot be reached.
    """
    info = await fleet.tracking.get_run(run_id)
    kept = run_folder(info.run_id) / "output.log"
    reference = read_reference(info) if JobRef.TAG in info.tags else None
    backend = None
    if reference is not None and not info.status.is_terminal:
        backend = await context_of(fleet).backend(reference.backend)
    handle: BackendRun | None = None
    chunks: AsyncIterator[bytes]
    is_mine = False
    if backend is not None and reference is not None and not backend.runs_here:
        try:
            handle = await backend.attach(reference)
        except RunLost:
            if not (await look_at(fleet, run_id))[0].status.is_terminal:
                raise
    if handle is not None:
        is_mine = await _take_over(fleet, run_id)
        chunks = handle_output(handle, follow=follow)
    else:
        if not await FILES.run(kept.exists) and not (follow and reference is not None):
            raise UsageError(
                f"the output of the run {run_id} is not kept on this machine ({kept}). A run that `mlfleet run` prints "
                "keeps none; --log-output stores it with MLflow"
            )
        is_active = follow and not info.status.is_terminal
        chunks = _follow_until_over(fleet, run_id, kept) if is_active else follow_bytes(kept)
    async for data in chunks:
        yield data
    if handle is not None and (follow or (await handle.get_status()).is_terminal):
        outcome = await handle.outcome()
        is_mine = is_mine or await _take_over(fleet, run_id)  # its driver may have died meanwhile
        await _settle(fleet, run_id, outcome, patience=0 if is_mine else _DRIVER_PATIENCE)
    elif handle is None and not info.status.is_terminal and SPACE_TAG not in info.tags:
        await look_at(fleet, run_id)


async def _take_over(fleet: Fleet, run_id: str) -> bool:
    """Take over the record of a run whose driver is gone: at the end of the run its backend may have nothing of it.

    Returns:
        True if this process must write the status.
    """
    record = await FILES.run(partial(find_record, run_id))
    if record is None or await FILES.run(record.driver_lives) is not False:
        return False
    await context_of(fleet).records.add(record)
    return True


async def look_at(fleet: Fleet, run_id: str) -> tuple[RunInfo, Driver]:
    """Return a run and the state of its driver. If that is gone and the run is over, its status is written first.

    Args:
        fleet: The Fleet whose tracking and backends are used.
        run_id: The id of the MLflow run.

    Raises:
        MlfleetError: Tracking or the backend cannot be reached.
    """
    info = await fleet.tracking.get_run(run_id)
    if info.status.is_terminal or NAME_TAG in info.tags:
        return info, Driver.UNSEEN
    verdict = await judge(context_of(fleet), info, elsewhere=False)
    if verdict.is_left:
        await conclude(context_of(fleet), info, verdict)
        info = await fleet.tracking.get_run(run_id)
    return info, verdict.driver


async def _settle(fleet: Fleet, run_id: str, outcome: Outcome, *, patience: float = _DRIVER_PATIENCE) -> None:
    """Write the status of a run whose end was seen here, unless its own process does; backends forget ends."""
    records = context_of(fleet).records
    records.end(run_id, outcome)
    for _ in range(int(patience / _SHORTEST_PAUSE)):
        if (await fleet.tracking.get_run(run_id)).status.is_terminal:
            return
        await anyio.sleep(_SHORTEST_PAUSE)
    _, secret = await fleet.tracking.environ()
    tags = failure_tags(outcome, secret.values())
    await end_run(fleet.tracking, run_id, outcome.status, patience=fleet.tracking_patience, tags=tags)
    records.remove(run_id)


async def _follow_until_over(fleet: Fleet, run_id: str, kept: Path) -> AsyncGenerator[bytes, None]:
    # A task of its own: `follow_bytes` cancels what it waits for again and again, which may be longer than its pauses.
    waiting = asyncio.ensure_future(_wait_over(fleet, run_id))
    try:
        async for data in follow_bytes(kept, lambda: asyncio.wait([waiting])):
            yield data
        waiting.result()
    finally:
        waiting.cancel()
        await wait_done(waiting)


async def _wait_over(fleet: Fleet, run_id: str) -> None:
    """Wait until the run writes no more output, even if tracking does not know that yet."""
    pause, watch = _SHORTEST_PAUSE, _Watch(fleet)
    while True:
        info = await fleet.tracking.get_run(run_id)
        if info.status.is_terminal or await watch.is_left(info):
            return
        await anyio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)


async def _find_processes(fleet: Fleet, run_id: str) -> BackendRun | None:
    """Return the handle of the processes of a run that another process of this machine supervises.

    Returns:
        None if its backend cannot find them.

    Raises:
        UsageError: Its command has not begun.
    """
    record = await FILES.run(partial(find_record, run_id))
    if record is None:
        return None
    try:
        return await find_processes(context_of(fleet), record)
    except RunLost:
        pid = record.driver.partition("-")[0]
        raise UsageError(
            f"the command of the run {run_id} has not begun: try again when it has, or end the process that prepares"
            f" it ({pid})"
        ) from None


async def _end(fleet: Fleet, info: RunInfo, handle: BackendRun, grace: float | None) -> None:
    """Write KILLED first, so that the run's own process, if it lives, takes it for cancelled and not for failed.

    Raises:
        RunLost: The end of the run was not confirmed: it may still run.
    """
    await fleet.tracking.update_run(info.run_id, RunStatus.KILLED)
    try:
        await handle.cancel(grace=grace)
        outcome = await handle.outcome()
        if isinstance(outcome.error, BackendError):
            raise outcome.error
    except MlfleetError:
        await fleet.tracking.update_run(info.run_id, info.status)
        raise
    if outcome.status is not RunStatus.KILLED:
        # It had ended by itself, a moment before it was to be ended.
        if tags := failure_tags(outcome):
            await fleet.tracking.log(info.run_id, tags=tags)
        await fleet.tracking.update_run(info.run_id, outcome.status)


async def _try_to_cancel(fleet: Fleet, run_id: str, grace: float | None, errors: dict[str, MlfleetError]) -> None:
    try:
        await cancel_run(fleet, run_id, grace=grace)
    except MlfleetError as error:
        errors[run_id] = error


class _Watch:
    """Looks again and again at one run, to see when it has to be concluded here."""

    def __init__(self, fleet: Fleet, unseen_patience: float = UNSEEN_PATIENCE) -> None:
        self._context = context_of(fleet)
        self._unseen_patience = unseen_patience
        self._seen = 0
        self._since: float | None = None
        self._next = 0.0
        self.verdict = Verdict(Driver.UNSEEN)

    async def is_left(self, info: RunInfo) -> bool:
        """Return True if the run is over and nobody else writes its status."""
        now = anyio.current_time()
        if now < self._next:
            return False
        self.verdict = await judge(self._context, info)
        if self.verdict.driver is Driver.UNSEEN:
            self._next = now + _PAUSE_ELSEWHERE
            self._since = None if not self.verdict.ended else now if self._since is None else self._since
            return self._since is not None and now - self._since >= self._unseen_patience
        # Look twice: a process that has reattached to the run may be about to write its status. One that has removed
        # its container after the end gets more time.
        self._seen = self._seen + 1 if self.verdict.is_left else 0
        self._since = None if self._seen == 0 else now if self._since is None else self._since
        patience = 2 * _DRIVER_PATIENCE if self.verdict.is_missing else 0
        return self._seen > 1 and self._since is not None and now - self._since >= patience
