"""The supervision of a run that an earlier process submitted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mlfleet._engine.request import SweepMember
from mlfleet._engine.supervisor import RunDescription, Supervisor
from mlfleet.backends.base import Backend, BackendRun
from mlfleet.errors import RunLost, UsageError
from mlfleet.runs import JobRef, Outcome, Timeouts
from mlfleet.tracking.base import RunInfo

if TYPE_CHECKING:
    from mlfleet._engine.context import RunContext

__all__ = ["AttachedSupervisor", "find_again", "read_reference"]


class AttachedSupervisor(Supervisor):
    """Supervises a run that exists already.

    Args:
        context: The services of the Fleet.
        info: The MLflow run.
        found: The backend's handle; a `RunLost` instead ends the run as FAILED.
        backend: The name of the backend.
        timeouts: The time limits from now on, of which ``run`` and ``cancel_grace`` count; None: those of the Fleet.
    """

    def __init__(
        self, context: RunContext, info: RunInfo, found: BackendRun | RunLost, backend: str, timeouts: Timeouts | None
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

    async def _create(self) -> None:
        self.info = self._known

    async def _run_stages(self) -> Outcome:
        if isinstance(self._found, RunLost):
            raise self._found
        self.handle = self._found
        try:
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


async def find_again(backend: Backend, info: RunInfo, reference: JobRef) -> BackendRun | RunLost:
    """Return the backend's handle of a run; a `RunLost` if the run should be there and is not.

    Args:
        backend: The opened backend.
        info: The MLflow run.
        reference: The reference to its job.

    Raises:
        UsageError: The run has ended.
        BackendError: The backend cannot be asked.
    """
    try:
        return await backend.attach(reference)
    except RunLost as error:
        if info.status.is_terminal:
            raise UsageError(f"the run {info.run_id} has ended already: {info.status}") from error
        return error
