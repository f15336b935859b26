"""The making of a job from a plan: its folder, its downloaded files and its environment."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlfleet._concurrency.threads import FILES, PROJECTS
from mlfleet._engine.plan import Plan
from mlfleet._project.downloads import download_all
from mlfleet._project.uri import UriKind, parse_uri
from mlfleet.backends.base import Job, ProjectCall
from mlfleet.runs import Timeouts
from mlfleet.tracking.base import RunInfo, Tracking

if TYPE_CHECKING:
    from mlfleet._engine.context import RunContext

__all__ = ["draft", "prepare"]


async def draft(plan: Plan, info: RunInfo, tracking: Tracking, *, output: Path | None, timeouts: Timeouts) -> Job:
    """Return the job as it is known before its preparation: command, folder and environment are provisional.

    Args:
        plan: The plan of the run.
        info: The MLflow run.
        tracking: The tracking server or store.
        output: The file for the run's output; None: the output is inherited.
        timeouts: The time limits of the run.
    """
    plain, secret = await tracking.environ()
    return Job(
        run_id=info.run_id,
        experiment_id=info.experiment_id,
        project_name=plan.project_name,
        project_dir=plan.spec.folder,
        commit=plan.project.commit,
        command=plan.provisional_command,
        environ={**plain, "MLFLOW_RUN_ID": info.run_id, "MLFLOW_EXPERIMENT_ID": info.experiment_id},
        secrets={**(plan.request.env or {}), **secret},
        docker=plan.docker,
        config=plan.config,
        output=output,
        cancel_grace=timeouts.cancel_grace,
        queue_timeout=timeouts.queue,
        environment_file=plan.spec.environment,
        spark_job=plan.spec.databricks_spark_job,
        tracking_uri=tracking.uri,
        artifact_uri=info.artifact_uri,
        resources=plan.request.resources,
        durable=plan.request.detach or (plan.request.member is not None and plan.request.member.durable),
        placed=plan.parameters.placed,
        call=partial(_call, plan),
        sweep_id=plan.request.member.sweep_id if plan.request.member is not None else None,
        inherit_env=plan.inherit_env,
    )


async def prepare(
    job: Job,
    plan: Plan,
    context: RunContext,
    stack: AsyncExitStack,
    variables: Mapping[str, str],
    *,
    on_progress: Callable[[str], None],
) -> Job:
    """Prepare folder, downloads and environment, and return the job as its backend gets it.

    Args:
        job: The draft of the job.
        plan: The plan of the run.
        context: The services of the Fleet.
        stack: Gets the clean-up for the end of the run.
        variables: The environment variables that tell the run which resources it may use.
        on_progress: Called with lines about the build of the environment.
    """
    shared = (await context.fleet.backend(plan.backend)).shared_folder(plan.config)
    folder = plan.project.folder
    if plan.project.cached:
        folder = await stack.enter_async_context(context.fleet.fetcher.working_copy(plan.project))
    if job.output is not None and plan.request.run_id is not None:
        # An existing MLflow run that runs again starts with an empty output file.
        await FILES.run(partial(job.output.unlink, missing_ok=True))
    downloaded: dict[str, str] = {}
    if plan.parameters.downloads:
        storage = await _storage(plan.request.storage_dir or (shared and shared / "downloads"), stack)
        downloaded = await download_all(plan.parameters.downloads, storage, context.tracking.download)
    environment = None
    if plan.environment is not None:
        manager = context.fleet.environment_manager(plan.environment.manager, shared and shared / "environments")
        environment = await manager.prepare(plan.environment, on_progress=on_progress)
    return replace(
        job,
        project_dir=folder,
        environ={**job.environ, **variables} if variables else job.environ,
        command=plan.command(downloaded),
        environment=environment,
        paths=_paths(plan, downloaded),
    )


def _call(plan: Plan) -> ProjectCall:
    request = plan.request
    uri = parse_uri(request.uri)
    # Plugins put the URI into tags, so it must not contain credentials; without them only public projects are found.
    elsewhere = uri.kind is UriKind.GIT and uri.credentials is None
    return ProjectCall(
        uri=uri.text if elsewhere else None,
        version=plan.project.commit if elsewhere else None,
        entry_point=request.entry_point,
        # Lists as MLflow keeps them: plugins know texts only.
        parameters={
            name: plan.parameters.logged[name] if isinstance(value, list | tuple) else value
            for name, value in request.parameters.items()
        },
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


async def _storage(parent: str | os.PathLike[str] | None, stack: AsyncExitStack) -> Path:
    """Make a new folder for downloads, which is removed when the run ends.

    Args:
        parent: The folder to make it in; None: that for temporary files.
        stack: Gets the clean-up for the end of the run.
    """

    def make() -> Path:
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="mlfleet-", dir=parent))

    async def remove(folder: Path) -> None:
        await PROJECTS.finish(partial(shutil.rmtree, folder, ignore_errors=True))

    folder = await FILES.run(make, undo=remove)
    stack.push_async_callback(remove, folder)
    return folder
