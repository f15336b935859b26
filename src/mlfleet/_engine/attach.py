"""A run that an earlier process submitted, supervised to its end by this one."""

from __future__ import annotations

from pathlib import Path

from mlfleet._engine.job import Services
from mlfleet._engine.plan import Plan
from mlfleet._engine.request import RunRequest, SweepMember
from mlfleet._engine.run import FleetRun
from mlfleet._project.fetch import Project
from mlfleet._project.parameters import ResolvedParameters
from mlfleet._project.spec import EntryPoint, ProjectSpec
from mlfleet.backends.base import Backend, BackendRun
from mlfleet.errors import RunLost, UsageError
from mlfleet.runs import JobRef, Outcome, Timeouts
from mlfleet.tracking.base import RunInfo

__all__ = ["AttachedRun", "find_again", "read_reference"]


class AttachedRun(FleetRun):
    """The handle of a run that is there already. Its plan holds what the MLflow run tells of it.

    Args:
        services: of its Fleet.
        info: the MLflow run.
        handle: of the backend; a `RunLost` instead ends the run as FAILED.
        reference: where it is.
        timeouts: ``run`` and ``cancel_grace`` count, from now on.
    """

    def __init__(
        self,
        services: Services,
        info: RunInfo,
        handle: BackendRun | RunLost,
        reference: JobRef,
        timeouts: Timeouts | None,
    ) -> None:
        super().__init__(services, _plan(info, reference, timeouts))
        self._found = handle
        self._known = info

    async def _create(self) -> None:
        self._info = self._known

    async def _stages(self) -> Outcome:
        if isinstance(self._found, RunLost):
            raise self._found
        self._handle = self._found
        try:
            await self._handle.started()
            return await self._await_end(self._handle)
        finally:
            await self._settle()


def read_reference(info: RunInfo) -> JobRef:
    """Where the run is, as its tag tells.

    Raises:
        UsageError: it does not.
        SpecError: the tag is damaged.
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
    return reference


async def find_again(backend: Backend, info: RunInfo, reference: JobRef) -> BackendRun | RunLost:
    """The backend's handle; `RunLost` if the run should be there and is not.

    Raises:
        UsageError: the run has ended.
        BackendError: the backend cannot tell.
    """
    try:
        return await backend.attach(reference)
    except RunLost as error:
        if info.status.is_terminal:
            raise UsageError(f"the run {info.run_id} has ended already: {info.status}") from error
        return error


def _plan(info: RunInfo, reference: JobRef, timeouts: Timeouts | None) -> Plan:
    uri = info.tags.get("mlflow.source.name") or info.run_id
    entry_point = info.tags.get("mlflow.project.entryPoint") or "main"
    nowhere = Path()
    return Plan(
        request=RunRequest(
            uri=uri,
            entry_point=entry_point,
            backend=reference.backend,
            run_id=info.run_id,
            timeouts=timeouts,
            member=SweepMember.from_tags(info.tags),
        ),
        project=Project(uri=uri, folder=nowhere, cached=False, source_name=uri),
        spec=ProjectSpec(folder=nowhere),
        entry_point=EntryPoint(entry_point, ""),
        parameters=ResolvedParameters({}, {}, {}),
        backend=reference.backend,
    )
