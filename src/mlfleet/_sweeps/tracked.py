"""The handle of a sweep that is known by its MLflow id."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet._engine.conclude import Driver, Verdict
from mlfleet._engine.context import RunContext
from mlfleet._engine.records import RunRecord, find_record, list_records
from mlfleet._engine.request import NAME_TAG, SPACE_TAG, SweepMember
from mlfleet._engine.tracked import DRIVER_PATIENCE, LONGEST_PAUSE, SHORTEST_PAUSE, TrackedRun
from mlfleet._sweeps.members import Members
from mlfleet._sweeps.record import forget, is_driven, lock_path
from mlfleet.errors import MlfleetError, RunLost, UsageError
from mlfleet.runs import RunStatus
from mlfleet.tracking import RunInfo, Tracking

__all__ = ["track"]

_MOST_RUNS = 50_000  # what mlflow's own stores give at most


async def track(context: RunContext, run_id: str) -> TrackedRun:
    """Return the handle of a run or a sweep that another Fleet or process supervises, or that has ended.

    Raises:
        TrackingError: There is no such run, or tracking cannot be reached.
    """
    info = await context.tracking.get_run(run_id)
    return (_TrackedSweep if SPACE_TAG in info.tags else TrackedRun)(context, info)


class _TrackedSweep(TrackedRun):
    __slots__ = ()

    async def _look(self) -> Driver:
        if NAME_TAG not in self._info.tags:
            return await super()._look()
        await self._refresh()
        return Driver.UNSEEN

    async def _ended(self) -> Verdict | None:
        if NAME_TAG not in self._info.tags:
            return await super()._ended()
        undriven = 0
        while not (await self._refresh()).status.is_terminal:
            undriven = 0 if await is_driven(self._context.tracking, self._info) else undriven + 1
            if undriven > 1:  # at its driver's death nobody but the next one concludes it
                raise UsageError(f"no process drives the sweep {self._info.name!r} ({self.run_id}) any more: resume it")
            await anyio.sleep(LONGEST_PAUSE if undriven == 0 else SHORTEST_PAUSE)
        return None

    async def _cancel(self, grace: float | None) -> None:
        """End the sweep and all its runs, also if its driver is gone."""
        tracking, info = self._context.tracking, await self._refresh()
        name = info.tags.get(NAME_TAG)
        if name is not None and not await is_driven(tracking, info):
            await FILES.run(partial(forget, lock_path(tracking, info.experiment_id, name)))
        if info.status.is_terminal:
            return
        record = await FILES.run(partial(find_record, self.run_id))
        await self._write(RunStatus.KILLED)
        waited = 0.0
        errors: dict[str, MlfleetError] = {}
        lost: dict[str, MlfleetError] = {}  # runs whose end is not confirmed: to wait for it again would take as long
        # The driver may start further runs until it has seen that its sweep was cancelled.
        while waited < DRIVER_PATIENCE:
            running: list[RunInfo] = []
            for status in (RunStatus.RUNNING, RunStatus.SCHEDULED):
                wanted = f"tags.`{SweepMember.ID_TAG}` = '{info.run_id}' and attributes.status = '{status}'"
                running += await tracking.search_runs([info.experiment_id], wanted, max_results=_MOST_RUNS)
            errors.clear()
            members = await FILES.run(partial(_members, tracking, info, running))
            running = [run for run in members if run.run_id not in lost]
            async with anyio.create_task_group() as group:
                for run in running:
                    group.start_soon(self._try_to_cancel, run, grace, errors)
            if not running and not await self._may_be_driven(record):
                break
            waited = waited + SHORTEST_PAUSE if len(errors) == len(running) else 0.0
            lost.update({run_id: error for run_id, error in errors.items() if isinstance(error, RunLost)})
            await anyio.sleep(SHORTEST_PAUSE)
        errors |= lost
        if errors:
            raise ExceptionGroup(f"{len(errors)} runs could not be cancelled", list(errors.values()))
        await self._refresh()

    async def _may_be_driven(self, record: RunRecord | None) -> bool:
        """Return False if the driver of the sweep has ended, as far as that can be seen here."""
        if NAME_TAG in self._info.tags:
            return await is_driven(self._context.tracking, self._info)
        return record is None or await FILES.run(partial(find_record, self.run_id)) is not None

    async def _try_to_cancel(self, run: RunInfo, grace: float | None, errors: dict[str, MlfleetError]) -> None:
        try:
            await (self._context.fleet.find(run.run_id) or TrackedRun(self._context, run)).cancel(grace=grace)
        except MlfleetError as error:
            errors[run.run_id] = error


def _members(tracking: Tracking, sweep: RunInfo, runs: Sequence[RunInfo]) -> Sequence[RunInfo]:
    """Return those of the runs tagged as a sweep's that are its own, as far as this machine knows. Blocking."""
    if name := sweep.tags.get(NAME_TAG):
        members = Members.read(lock_path(tracking, sweep.experiment_id, name))
        return members.choose(runs) if members is not None and members.is_of(sweep) else runs
    own = {record.run_id for record in list_records() if record.sweep_id == sweep.run_id}
    return [run for run in runs if run.run_id in own] if own else runs
