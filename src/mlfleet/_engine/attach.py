"""The supervision of a run that an earlier process submitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlfleet._concurrency.threads import FILES
from mlfleet._engine.records import look_up
from mlfleet._engine.request import SweepMember
from mlfleet._engine.supervisor import RunDescription, Supervisor
from mlfleet._paths import run_folder
from mlfleet.backends._output import FileOutput
from mlfleet.backends.base import BackendRun
from mlfleet.errors import RunLost, UsageError
from mlfleet.runs import FAILURE_KIND_TAG, REASON_TAG, FailureKind, JobRef, Outcome, RunStatus, Timeouts
from mlfleet.tracking.base import RunInfo

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
        found: What was found of it.
        timeouts: The time limits from now on, of which ``run`` and ``cancel_grace`` count; None: those of the Fleet.
    """

    def __init__(self, context: RunContext, info: RunInfo, found: FoundRun, timeouts: Timeouts | None) -> None:
        uri = info.tags.get("mlflow.source.name") or info.run_id
        description = RunDescription(
            uri=uri,
            project_name=uri,
            entry_point=info.tags.get("mlflow.project.entryPoint") or "main",
            backend=found.backend,
            parameters={},
            member=SweepMember.from_tags(info.tags),
        )
        super().__init__(context, description, timeouts or context.fleet.timeouts)
        self.info = info
        self._found = found

    async def _create(self) -> None:
        """Do nothing: the MLflow run exists."""

    async def _run_stages(self) -> Outcome:
        found = self._found.handle
        self.handle = None if isinstance(found, RunLost) else found
        try:
            if not self._found.has_driver:
                await self._record()
            if isinstance(found, RunLost):
                raise found
            await found.started()
            return await self._await_end(found)
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
        has_driver: True if the process that submitted it lives, or is on another machine: then the record is its own.
    """

    backend: str
    handle: BackendRun | RunLost
    has_driver: bool = False


async def find_again(context: RunContext, info: RunInfo) -> FoundRun:
    """Find a run by its reference, or by its record on this machine if its driver died.

    Raises:
        UsageError: The run has ended, or ends with the process that started it.
        BackendError: The backend cannot be asked.
    """
    record, lives = await FILES.run(partial(look_up, info.run_id))
    left = record if lives is False else None
    if left is not None and left.outcome is not None and not info.status.is_terminal:
        return FoundRun(left.backend, _EndedRun(info.run_id, left.outcome))
    if left is not None and JobRef.TAG not in info.tags:
        name = left.backend
        finding = (await context.fleet.backend(name)).find_left(info.run_id, grace=left.grace)
    else:
        reference = read_reference(info)
        name = reference.backend
        finding = (await context.fleet.backend(name)).attach(reference)
    has_driver = record is not None and left is None
    try:
        return FoundRun(name, await finding, has_driver)
    except RunLost as error:
        if info.status.is_terminal:
            raise UsageError(f"the run {info.run_id} has ended already: {info.status}") from error
        return FoundRun(name, error, has_driver)


def concluded(info: RunInfo) -> FoundRun:
    """Return a run that has ended as MLflow has it."""
    handle = _EndedRun(info.run_id, tracked_outcome(info))
    return FoundRun(info.tags.get("mlflow.project.backend", ""), handle)


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
