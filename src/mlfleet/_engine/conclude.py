"""The end of runs whose driver died: who may conclude a run, and how its status is written.

The driver of a run is the process that supervises it. The cases, in this order:

1. The run has a record on this machine. Its driver lives: nobody else concludes the run, unless the driver has not
   been able to write the status for `FleetServices.unseen_patience` seconds.
2. It has one, and its driver is gone. The outcome that the driver wrote into the record counts; without one, a run
   without a reference has ended when nothing of it is left here, and one with a reference when its backend says so.
3. It has none, but its reference names a driver of this machine: the backend says if that is gone and the run is over.
4. Otherwise the driver cannot be seen. A run that has ended at its backend is concluded when its status has not been
   written for `FleetServices.unseen_patience` seconds. One that the backend does not have (any more) is left alone: its
   driver may be about to make it.

MLflow's own status counts in all cases: a terminal one is only ever made worse, by an exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet._engine.attach import read_reference
from mlfleet._engine.records import (
    RunRecord,
    find_record,
    forget_driver,
    list_left_drivers,
    list_records,
    look_up,
    remove_record,
)
from mlfleet._engine.request import SweepMember
from mlfleet._engine.supervisor import end_tags
from mlfleet._run_log import about_run, get_logger
from mlfleet.backends.base import DRIVER_DIED, Backend, BackendRun, Presence
from mlfleet.backends.registry import find
from mlfleet.errors import BackendNotFound, MlfleetError, RunLost, TrackingError
from mlfleet.runs import FailureKind, JobRef, Outcome, RunStatus
from mlfleet.tracking.base import RunInfo, end_run
from mlfleet.tracking.models import SUBMISSION_TAG

if TYPE_CHECKING:
    from mlfleet._engine.context import RunContext

__all__ = ["Driver", "Verdict", "conclude", "conclude_left", "find_processes", "judge", "take_over", "write_end"]

logger = get_logger("mlfleet.runs")

_PAUSE = 2.0  # seconds between two looks at runs whose processes are still being ended


class Driver(StrEnum):
    """The state of the process that supervises a run."""

    LIVES = "lives"
    GONE = "gone"
    UNSEEN = "unseen"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state of a run as another process than its driver sees it.

    Attributes:
        driver: The state of its driver.
        ended: True if nothing of the run runs any more, as far as that is known.
        outcome: The outcome to write; None if the backend must be asked for it.
        is_missing: True if the backend has nothing of the run: it was never made, or has been removed.
    """

    driver: Driver
    ended: bool = False
    outcome: Outcome | None = None
    is_missing: bool = False

    @property
    def is_left(self) -> bool:
        """True if the run has ended, and its driver will not write its status."""
        return self.ended and self.driver is Driver.GONE


async def judge(context: RunContext, info: RunInfo, *, elsewhere: bool = True) -> Verdict:
    """Return the state of a run that this process does not supervise.

    Args:
        context: The services of the Fleet.
        info: The MLflow run.
        elsewhere: True to ask the backend about runs of other machines, too.

    Raises:
        MlfleetError: The reference is damaged, or the backend cannot be asked about a run of this machine.
    """
    record, lives = await FILES.run(partial(look_up, info.run_id))
    if lives and record is not None:
        return Verdict(Driver.LIVES, ended=record.outcome is not None, outcome=record.outcome)
    reference = read_reference(info) if JobRef.TAG in info.tags else None
    if record is not None and lives is False:
        return await _judge_left(context, record, reference)
    if reference is None:
        return Verdict(Driver.UNSEEN)
    try:
        backend = await context.fleet.backend(reference.backend)
    except BackendNotFound:  # not installed here: its own process, or a machine that has it, writes the status
        return Verdict(Driver.UNSEEN)
    if await backend.is_abandoned(reference):
        return Verdict(Driver.GONE, ended=True)
    if not elsewhere:
        return Verdict(Driver.UNSEEN)
    try:
        return Verdict(Driver.UNSEEN, ended=await backend.presence(reference) is Presence.ENDED)
    except MlfleetError as error:  # this machine need not have access to the backend
        logger.debug("the run %s cannot be looked at from here: %s", info.run_id, error, extra={"run_id": info.run_id})
        return Verdict(Driver.UNSEEN)


async def conclude(context: RunContext, info: RunInfo, verdict: Verdict) -> None:
    """Write the status of a run that has ended and whose driver does not do it.

    Raises:
        MlfleetError: Tracking or the backend cannot be reached.
    """
    with about_run(info.run_id):
        await write_end(context, info, verdict.outcome or await _ask_backend(context, info))
    await FILES.run(partial(remove_record, info.run_id))


async def _ask_backend(context: RunContext, info: RunInfo) -> Outcome:
    """Return the outcome that the backend of a run has."""
    reference = read_reference(info)
    await take_over(context, info.run_id)
    try:
        async with context.fleet.handles.use(reference) as handle:
            outcome = await handle.outcome()
    except RunLost as lost:
        outcome = Outcome(RunStatus.FAILED, reason=str(lost).partition("\n")[0], error=lost)
    context.fleet.records.end(info.run_id, outcome)
    return outcome


async def take_over(context: RunContext, run_id: str) -> bool:
    """Take over the record of a run whose driver is gone: at the end of the run its backend may have nothing of it.

    Returns:
        True if this process must write the status.
    """
    record, lives = await FILES.run(partial(look_up, run_id))
    if record is None or lives is not False:
        return False
    await context.fleet.records.add(record)
    return True


async def write_end(context: RunContext, info: RunInfo, outcome: Outcome) -> RunInfo:
    """Write the status of a run that has no supervisor here, and the reason of its failure.

    Returns:
        The run as it was right before.

    Raises:
        MlfleetError: Tracking cannot be reached.
    """
    _, secret = await context.tracking.environ()
    seen = await end_run(
        context.tracking,
        info.run_id,
        outcome.status,
        patience=context.fleet.tracking_patience,
        # Nobody knows how a run that was lost has ended, but its own code, which may have written that.
        overwrite=not isinstance(outcome.error, RunLost),
        tags=end_tags(outcome, is_member=SweepMember.ID_TAG in info.tags, secrets=secret.values()),
    )
    context.fleet.records.remove(info.run_id)
    return seen


async def conclude_left(context: RunContext) -> None:
    """Conclude the runs that drivers of this machine have left in the context's tracking, as far as that asks nobody.

    Active runs of sweeps with a name are left to their sweep, and runs that a backend elsewhere has to those who ask
    for them.
    """
    key = context.tracking_key
    searched: set[str] = set()
    try:
        while True:
            going = [not await _conclude_record(context, record) for record in await FILES.run(partial(_left, key))]
            drivers = await FILES.run(partial(list_left_drivers, key))
            for driver, experiments in drivers:
                await _conclude_unrecorded(context, driver, experiments)
                if driver in searched:
                    await FILES.run(partial(forget_driver, driver))
            # Each is searched for twice: what a driver has requested before its death may be carried out late.
            new = {driver for driver, _ in drivers} - searched
            if not any(going) and not new:
                return
            searched |= new
            await anyio.sleep(_PAUSE)
    except MlfleetError as error:
        logger.debug("runs that another process has left are not concluded now: %s", error)
    except Exception:
        logger.exception("runs that another process has left are not concluded")


async def _conclude_record(context: RunContext, record: RunRecord) -> bool:
    """Conclude the run of a record, if that is possible. Return False to try again later."""
    try:
        info = await context.tracking.get_run(record.run_id)
    except TrackingError as error:
        if error.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        info = None
    if info is None or info.deleted or info.status.is_terminal:
        await FILES.run(partial(remove_record, record.run_id))
        return True
    if record.durable or (JobRef.TAG in info.tags and record.outcome is None):
        return True
    verdict = await judge(context, info)
    if not verdict.is_left:
        return False
    await conclude(context, info, verdict)
    logger.info("the run %s was concluded: %s", record.run_id, DRIVER_DIED, extra={"run_id": record.run_id})
    return True


async def _conclude_unrecorded(context: RunContext, driver: str, experiments: Sequence[str]) -> None:
    """Conclude the runs that a driver has created and not recorded. Nothing of them was begun."""
    wanted = f"tags.`{SUBMISSION_TAG}` LIKE '{driver}.%' and attributes.status = '{RunStatus.RUNNING}'"
    for info in await context.tracking.search_runs(experiments, wanted):
        record = await FILES.run(partial(find_record, info.run_id))
        if record is not None or info.status.is_terminal or JobRef.TAG in info.tags:
            continue
        await conclude(context, info, Verdict(Driver.GONE, ended=True, outcome=_died(None)))


async def _judge_left(context: RunContext, record: RunRecord, reference: JobRef | None) -> Verdict:
    """Return the state of a run whose driver is gone."""
    if record.outcome is not None:
        return Verdict(Driver.GONE, ended=True, outcome=record.outcome)
    if reference is not None:
        backend = await context.fleet.backend(reference.backend)
        presence = await backend.presence(reference)
        ended = await backend.is_abandoned(reference) if presence is None else presence is not Presence.ACTIVE
        return Verdict(Driver.GONE, ended=ended, is_missing=presence is Presence.MISSING)
    # The reference is written before anything is made elsewhere: only a backend of this machine can have left more.
    with suppress(RunLost):
        if await find_processes(context, record) is not None:
            return Verdict(Driver.GONE)
    return Verdict(Driver.GONE, ended=True, outcome=_died(record.backend))


async def find_processes(context: RunContext, record: RunRecord) -> BackendRun | None:
    """Return the handle of the processes of a run without a reference; None if its backend cannot find them.

    Raises:
        RunLost: The run has no processes.
    """
    try:
        can_tell = (await FILES.run(partial(find, record.backend))).find_left is not Backend.find_left
    except BackendNotFound:
        can_tell = False
    if not can_tell:
        return None
    return await (await context.fleet.backend(record.backend)).find_left(record.run_id, grace=record.grace)


def _died(backend: str | None) -> Outcome:
    """Return the outcome of a run that ended with its driver."""
    lost = RunLost(DRIVER_DIED, backend=backend)
    return Outcome(RunStatus.FAILED, reason=DRIVER_DIED, error=lost, cause=FailureKind.INFRASTRUCTURE)


def _left(key: str) -> list[RunRecord]:
    """Return the records of a tracking server or store whose drivers are gone. Blocking."""
    return [record for record in list_records() if record.tracking == key and record.driver_lives() is False]
