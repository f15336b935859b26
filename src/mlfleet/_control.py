"""Runs of other processes: wait for them, cancel them and read their output, without supervising them here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial

import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet._engine.attach import read_reference
from mlfleet._engine.request import SweepMember
from mlfleet._engine.run import handle_output
from mlfleet._paths import run_folder
from mlfleet._sweeps import NAME_TAG, SPACE_TAG, is_driven
from mlfleet._sweeps.record import forget, lock_path
from mlfleet._text.lines import follow_bytes
from mlfleet.backends.base import BackendRun
from mlfleet.errors import BackendError, BackendNotFound, MlfleetError, RunLost, UsageError
from mlfleet.fleet import Fleet, context_of
from mlfleet.runs import JobRef, Outcome, RunStatus
from mlfleet.tracking import RunInfo
from mlfleet.tracking.base import end_run, failure_tags

__all__ = ["cancel_run", "cancel_sweep", "read_output", "wait_for"]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.2, 2.0  # seconds between two looks
_MOST_RUNS = 50_000  # what mlflow's own stores give at most
_DRIVER_PATIENCE = 5.0  # seconds in which a driver must see that its sweep was cancelled


async def wait_for(fleet: Fleet, run_id: str) -> RunInfo:
    """Wait until a run has its terminal status. A cancelled call leaves the run as it is.

    If the process that should write the status is gone, it is written here when the run is over.

    Args:
        fleet: The Fleet whose tracking and backends are used.
        run_id: The id of the MLflow run.

    Raises:
        UsageError: The run is a sweep whose driver is gone.
        MlfleetError: Tracking or the backend cannot be reached.
    """
    pause, seen = _SHORTEST_PAUSE, 0
    while True:
        info = await fleet.tracking.get_run(run_id)
        if info.status.is_terminal:
            return info
        if SPACE_TAG in info.tags and not await is_driven(fleet.tracking, info):
            seen += 1
            # Only a sweep with a name has a lock that shows its driver.
            if seen > 1 and NAME_TAG in info.tags:
                raise UsageError(f"no process drives the sweep {info.name!r} ({run_id}) any more: resume it")
        elif await _is_abandoned(fleet, info):
            # Look twice: a process that has reattached to the run may be about to write its status.
            seen += 1
            if seen > 1:
                await (await fleet.attach(run_id)).outcome()
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
        UsageError: The run can be ended only by ending its process.
        BackendError: The run is not where it should be.
        MlfleetError: Tracking cannot be reached.
    """
    info = await fleet.tracking.get_run(run_id)
    if SPACE_TAG in info.tags:
        return await cancel_sweep(fleet, info, grace=grace)
    if info.status.is_terminal:
        return info
    reference = read_reference(info)
    backend = await context_of(fleet).backend(reference.backend)
    if await backend.withdraw(reference):
        await fleet.tracking.update_run(run_id, RunStatus.KILLED)
        return await fleet.tracking.get_run(run_id)
    handle = await backend.attach(reference)
    if (await handle.get_status()).is_terminal:
        return await wait_for(fleet, run_id)
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
        running = [run for run in running if run.run_id not in lost]
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
    if backend is not None and reference is not None and not backend.runs_here:
        handle = await backend.attach(reference)
        chunks = handle_output(handle, follow=follow)
    else:
        if not await FILES.run(kept.exists) and not (follow and reference is not None):
            raise UsageError(
                f"the output of the run {run_id} is not kept on this machine ({kept}). A run that `mlfleet run` prints "
                "keeps none; --log-output stores it with MLflow"
            )
        ended = partial(_wait_over, fleet, run_id) if follow and not info.status.is_terminal else None
        chunks = follow_bytes(kept, ended)
    async for data in chunks:
        yield data
    if handle is not None and follow:
        await _settle(fleet, run_id, await handle.outcome())


async def _settle(fleet: Fleet, run_id: str, outcome: Outcome) -> None:
    """Write the status of a run whose end was seen here, unless its own process does; backends forget ends."""
    for _ in range(int(_DRIVER_PATIENCE / _SHORTEST_PAUSE)):
        if (await fleet.tracking.get_run(run_id)).status.is_terminal:
            return
        await anyio.sleep(_SHORTEST_PAUSE)
    _, secret = await fleet.tracking.environ()
    tags = failure_tags(outcome, secret.values())
    await end_run(fleet.tracking, run_id, outcome.status, patience=fleet.tracking_patience, tags=tags)


async def _wait_over(fleet: Fleet, run_id: str) -> None:
    """Wait until the run writes no more output, even if tracking does not know that yet."""
    pause = _SHORTEST_PAUSE
    while True:
        info = await fleet.tracking.get_run(run_id)
        if info.status.is_terminal or await _is_abandoned(fleet, info):
            return
        await anyio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)


async def _end(fleet: Fleet, info: RunInfo, handle: BackendRun, grace: float | None) -> None:
    """Write KILLED first, so that the run's own process, if it lives, takes it for cancelled and not for failed.

    Raises:
        RunLost: The end of the run was not confirmed: it may still run.
    """
    await fleet.tracking.update_run(info.run_id, RunStatus.KILLED)
    try:
        await handle.cancel(grace=grace)
        error = (await handle.outcome()).error
        if isinstance(error, BackendError):
            raise error
    except MlfleetError:
        await fleet.tracking.update_run(info.run_id, info.status)
        raise


async def _try_to_cancel(fleet: Fleet, run_id: str, grace: float | None, errors: dict[str, MlfleetError]) -> None:
    try:
        await cancel_run(fleet, run_id, grace=grace)
    except MlfleetError as error:
        errors[run_id] = error


async def _is_abandoned(fleet: Fleet, info: RunInfo) -> bool:
    """Return True if a run is over and the process that should write its status is gone."""
    if JobRef.TAG not in info.tags:
        return False
    reference = read_reference(info)
    try:
        backend = await context_of(fleet).backend(reference.backend)
    except BackendNotFound:  # not installed here: its own process, or a machine that has it, writes the status
        return False
    return await backend.is_abandoned(reference)
