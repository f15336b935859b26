"""The supervision of a run that an earlier process submitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlfleet._concurrency.threads import FILES
from mlfleet._engine.records import RunRecord, find_record
from mlfleet._engine.request import SweepMember
from mlfleet._engine.supervisor import RunDescription, Supervisor
from mlfleet._paths import run_folder
from mlfleet.backends._output import FileOutput
from mlfleet.backends.base import DRIVER_DIED, BackendRun
from mlfleet.errors import RunLost, UsageError
from mlfleet.runs import FAILURE_KIND_TAG, REASON_TAG, FailureKind, JobRef, Outcome, RunStatus, Timeouts
from mlfleet.tracking.base import RunInfo, clean_reason

if TYPE_CHECKING:
    from mlfleet._engine.context import RunContext

__all__ = [
    "AttachedSupervisor",
    "FoundRun",
    "concluded",
    "find_again",
    "read_kind",
    "read_reference",
    "tracked_outcome",
]


class AttachedSupervisor(Supervisor):
    """Supervises a run that exists already.

    Args:
        context: The services of the Fleet.
        info: The MLflow run.
        found: The backend's handle; a `RunLost` instead ends the run as FAILED.
        backend: The name of the backend.
        timeouts: The time limits from now on, of which ``run`` and ``cancel_grace`` count; None: those of the Fleet.
        record: The record of the run on this machine; None if it has none.
    """

    def __init__(
        self,
        context: RunContext,
        info: RunInfo,
        found: BackendRun | RunLost,
        backend: str,
        timeouts: Timeouts | None,
        record: RunRecord | None = None,
    ) -> None:
        uri = info.tags.get("mlflow.source.name") or info.run_id
        description = RunDescription(
            uri=uri,
            project_name=uri,
            entry_point=info.tags.get("mlflow.project.entryPoint") or "main",
            backend=backend,
            parameters={},
            member=SweepMember.from_tags(info.tags),
        )
        super().__init__(context, description, timeouts or context.timeouts)
        self._found = found
        self._known = info
        self._record_of_driver = record

    async def _create(self) -> None:
        self.info = self._known

    async def _record(self) -> None:
        """Do nothing yet: a cancellation now would leave the run alone."""

    async def _take_over(self) -> None:
        """Record the run as one of this process, unless the process that submitted it lives."""
        record = self._record_of_driver
        if record is None or await FILES.run(record.driver_lives) is False:
            await super()._record()

    def _end_tags(self, outcome: Outcome) -> dict[str, str]:
        tags = super()._end_tags(outcome)
        if isinstance(outcome.error, RunLost) and self.description.member is not None:
            tags[SweepMember.LOST_TAG] = clean_reason(outcome.reason or DRIVER_DIED)
        return tags

    async def _run_stages(self) -> Outcome:
        if isinstance(self._found, RunLost):
            await self._take_over()
            raise self._found
        self.handle = self._found
        try:
            await self._take_over()
            await self.handle.started()
            return await self._await_end(self.handle)
        finally:
            await self._settle()


def read_reference(info: RunInfo) -> JobRef:
    """Return the reference to the run's job, which is a tag of the run.

    Raises:
        UsageError: The tag is missing, or belongs to another run.
        SpecError: The tag is damaged.
    """
    text = info.tags.get(JobRef.TAG)
    if text is None:
        raise UsageError(
            f"the run {info.run_id} cannot be attached to: it has no tag {JobRef.TAG}. Runs of the backend 'local' end"
            " with the process that started them"
        )
    reference = JobRef.from_json(text)
    if reference.run_id != info.run_id:
        raise UsageError(f"the tag {JobRef.TAG} of the run {info.run_id} is that of another run, {reference.run_id}")
    return replace(reference, tags=info.tags)


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A run that an earlier process submitted.

    Attributes:
        backend: The name of its backend.
        handle: The backend's handle; a `RunLost` if the run should be there and is not.
        record: The record of the run on this machine; None if it has none.
    """

    backend: str
    handle: BackendRun | RunLost
    record: RunRecord | None


async def find_again(context: RunContext, info: RunInfo) -> FoundRun:
    """Find a run by its reference, or by its record on this machine if its driver died.

    Raises:
        UsageError: The run has ended, or ends with the process that started it.
        BackendError: The backend cannot be asked.
    """
    record = await FILES.run(partial(find_record, info.run_id))
    is_left = record is not None and await FILES.run(record.driver_lives) is False
    if record is not None and is_left and record.outcome is not None and not info.status.is_terminal:
        return FoundRun(record.backend, _EndedRun(info.run_id, record.outcome), record)
    if record is not None and is_left and JobRef.TAG not in info.tags:
        backend, name = await context.backend(record.backend), record.backend
        finding = backend.find_left(info.run_id, grace=record.grace)
    else:
        reference = read_reference(info)
        backend, name = await context.backend(reference.backend), reference.backend
        finding = backend.attach(reference)
    try:
        return FoundRun(name, await finding, record)
    except RunLost as error:
        if info.status.is_terminal:
            raise UsageError(f"the run {info.run_id} has ended already: {info.status}") from error
        return FoundRun(name, error, record)


def concluded(info: RunInfo) -> FoundRun:
    """Return a run that has ended as MLflow has it."""
    handle = _EndedRun(info.run_id, tracked_outcome(info))
    return FoundRun(info.tags.get("mlflow.project.backend", ""), handle, None)


def tracked_outcome(info: RunInfo) -> Outcome:
    """Return the outcome of a run that has ended, as far as MLflow has it: without exit code and output."""
    lost = RunLost(info.tags[SweepMember.LOST_TAG]) if SweepMember.LOST_TAG in info.tags else None
    return Outcome(info.status, reason=info.tags.get(REASON_TAG) or None, error=lost, cause=read_kind(info.tags))


def read_kind(tags: Mapping[str, str]) -> FailureKind | None:
    """Return the kind of failure in the tags of a run; None if they have none that is known: others may write tags."""
    kind = tags.get(FAILURE_KIND_TAG)
    return FailureKind(kind) if kind in {each.value for each in FailureKind} else None


class _EndedRun(FileOutput):
    """The handle of a run whose end its driver has seen, but could not write any more."""

    def __init__(self, run_id: str, outcome: Outcome) -> None:
        self._outcome = outcome
        self.run_id = run_id

    async def started(self) -> None:
        """Return at once."""

    async def wait(self) -> bool:
        return self._outcome.status is RunStatus.FINISHED

    async def outcome(self) -> Outcome:
        return self._outcome

    async def get_status(self) -> RunStatus:
        return self._outcome.status

    async def cancel(self, *, grace: float | None = None) -> None:
        """Do nothing."""

    def _output_file(self) -> Path | None:
        return run_folder(self.run_id) / "output.log"

    async def _output_ended(self) -> None:
        """Return at once."""
