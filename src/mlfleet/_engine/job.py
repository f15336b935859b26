"""From a plan to a job: in a folder of its own, with its files downloaded and its environment built."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import anyio

from mlfleet._engine.admission import Slot
from mlfleet._engine.plan import Plan
from mlfleet._environments.manager import EnvironmentManager
from mlfleet._project.downloads import download_all
from mlfleet._project.fetch import ProjectFetcher
from mlfleet._project.uri import UriKind, parse_uri
from mlfleet.backends.base import Backend, Job, ProjectCall
from mlfleet.runs import RunEvent, Timeouts
from mlfleet.tracking.base import RunInfo, Tracking

__all__ = ["Services", "draft", "prepare"]


class Services(Protocol):
    """What a run needs of its Fleet."""

    tracking: Tracking
    tracking_patience: float
    timeouts: Timeouts
    runs_folder: Path

    @property
    def fetcher(self) -> ProjectFetcher:
        """What fetches projects."""
        ...

    async def backend(self, name: str) -> Backend:
        """The opened backend of that name."""
        ...

    def environment_manager(self, name: str) -> EnvironmentManager:
        """The manager of that name."""
        ...

    async def experiment_id(self, plan: Plan) -> str:
        """The experiment that a run belongs to."""
        ...

    def slot(self, plan: Plan) -> Slot:
        """The place of such a run."""
        ...

    @property
    def is_followed(self) -> bool:
        """Whether anybody follows the Fleet."""
        ...

    def tell(self, event: RunEvent) -> None:
        """Tell those who follow the Fleet."""
        ...


async def draft(plan: Plan, info: RunInfo, tracking: Tracking, *, output: Path | None, cancel_grace: float) -> Job:
    """The job as it is known before anything is prepared: its command, folder and environment are provisional."""
    plain, secret = await tracking.environ()
    return Job(
        run_id=info.run_id,
        experiment_id=info.experiment_id,
        project_name=plan.project_name,
        project_dir=plan.spec.folder,
        commit=plan.project.commit,
        command=plan.provisional_command,
        environ={**plain, "MLFLOW_RUN_ID": info.run_id, "MLFLOW_EXPERIMENT_ID": info.experiment_id},
        secrets=secret,
        docker=plan.docker,
        config=plan.config,
        output=output,
        cancel_grace=cancel_grace,
        environment_file=plan.spec.environment,
        spark_job=plan.spec.databricks_spark_job,
        tracking_uri=tracking.uri,
        artifact_uri=info.artifact_uri,
        resources=plan.request.resources,
        durable=plan.request.member is not None and plan.request.member.durable,
        placed=plan.parameters.placed,
        call=partial(_call, plan),
        sweep_id=plan.request.member.sweep_id if plan.request.member is not None else None,
    )


async def prepare(
    job: Job,
    plan: Plan,
    services: Services,
    stack: AsyncExitStack,
    share: Mapping[str, str],
    *,
    on_progress: Callable[[str], None],
) -> Job:
    """The job as the backend gets it.

    Args:
        job: the draft of it.
        plan: what it is made from.
        services: of its Fleet.
        stack: takes what must be removed when the run has ended.
        share: variables that tell the run which part of the machine is its own.
        on_progress: is called with lines of the environment's build.
    """
    folder = plan.project.folder
    if plan.project.cached:
        folder = await stack.enter_async_context(services.fetcher.working_copy(plan.project))
    if job.output is not None and plan.request.run_id is not None:
        # An existing MLflow run that runs again starts with an empty output file.
        await anyio.to_thread.run_sync(partial(job.output.unlink, missing_ok=True))
    downloaded: dict[str, str] = {}
    if plan.parameters.downloads:
        storage = await _storage(plan, stack)
        downloaded = await download_all(plan.parameters.downloads, storage, services.tracking.download)
    environment = None
    if plan.environment is not None:
        manager = services.environment_manager(plan.environment.manager)
        environment = await manager.prepare(plan.environment, on_progress=on_progress)
    return replace(
        job,
        project_dir=folder,
        environ={**job.environ, **share} if share else job.environ,
        command=plan.command(downloaded),
        environment=environment,
        paths=_paths(plan, downloaded),
        on_progress=on_progress,
    )


def _call(plan: Plan) -> ProjectCall:
    request = plan.request
    uri = parse_uri(request.uri)
    # Only what anybody can fetch again: whoever reads the project would put credentials of the URI into tags.
    elsewhere = uri.kind is UriKind.GIT and uri.credentials is None
    return ProjectCall(
        uri=uri.text if elsewhere else None,
        version=plan.project.commit if elsewhere else None,
        entry_point=request.entry_point,
        parameters=request.parameters,
        env_manager=request.env_manager,
        storage_dir=None if request.storage_dir is None else os.fspath(request.storage_dir),
        docker_args=request.docker_args,
        build_image=request.build_image,
        docker_auth=request.docker_auth,
    )


def _paths(plan: Plan, downloaded: Mapping[str, str]) -> tuple[Path, ...]:
    values = {**plan.parameters.declared, **downloaded}
    named = [values[each.name] for each in plan.entry_point.parameters.values() if each.type == "path"]
    return tuple(Path(text) for text in named if text not in plan.parameters.placed)


async def _storage(plan: Plan, stack: AsyncExitStack) -> Path:
    """A fresh folder for downloads, which goes when the run ends."""

    def make() -> Path:
        given = plan.request.storage_dir
        if given is not None:
            Path(given).mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="mlfleet-", dir=given))

    async def remove() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(partial(shutil.rmtree, folder, ignore_errors=True))

    folder = await anyio.to_thread.run_sync(make)
    stack.push_async_callback(remove)
    return folder
