"""The Databricks backend: it submits jobs as one-time runs, and attaches to runs of earlier processes."""

from __future__ import annotations

import io
import json
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import FILES, PROJECTS
from mlfleet._paths import run_folder
from mlfleet._run_log import get_logger
from mlfleet.backends._remote.backend import RemoteBackend
from mlfleet.backends._remote.owner import owner_lives
from mlfleet.backends.base import BackendRun, DockerRequest, Job, ListedRun, Presence
from mlfleet.backends.databricks import request
from mlfleet.backends.databricks.client import Timing, Workspace, WorkspaceError
from mlfleet.backends.databricks.config import DatabricksConfig, TaskKind, parse_config
from mlfleet.backends.databricks.quota import QuotaQueue
from mlfleet.backends.databricks.records import Record, change_owner, read_records, remove_record, write_record
from mlfleet.backends.databricks.reference import (
    NUMBER_TAG,
    output_folder,
    secret_of,
    submitted_at,
    upload_of,
)
from mlfleet.backends.databricks.requirements import read_requirements
from mlfleet.backends.databricks.run import DatabricksRun
from mlfleet.backends.databricks.secret_scopes import find_old_secrets, put_secret, remove_secret, secret_key
from mlfleet.backends.databricks.states import LOST, Phase, State, read_state
from mlfleet.backends.databricks.storage import HOME, Storage, Uploads, open_storage
from mlfleet.backends.databricks.watch import Poller, RecentRuns
from mlfleet.errors import BackendError, RunLost, SubmitError, UsageError
from mlfleet.runs import JobRef
from mlfleet.tracking.databricks import check_profile, is_databricks, profile_of

__all__ = ["DatabricksBackend"]

_log = get_logger("mlfleet.databricks")
_GRACE = 60.0  # seconds to cancel a run whose submission was cancelled


class _WorkspaceContext:
    """One workspace with the client, the poller and the uploads that all its runs share."""

    def __init__(self, workspace: Workspace, timing: Timing) -> None:
        self.workspace = workspace
        self.poller = Poller(workspace, timing)
        self.uploads = Uploads()
        self.recent = RecentRuns(workspace)
        self.quota = QuotaQueue(timing.quota_pause)


@dataclass(frozen=True, slots=True)
class _Submission:
    """A job that is being submitted.

    Attributes:
        job: The job.
        config: The job's configuration.
        reference: The reference to the run.
        context: The workspace to submit to.
        storage: The storage of the project and the output.
    """

    job: Job
    config: DatabricksConfig
    reference: JobRef
    context: _WorkspaceContext
    storage: Storage


@dataclass(frozen=True, slots=True)
class _Left:
    """A run whose process on this machine is gone.

    Attributes:
        reference: The reference to it, with its id in Databricks among the tags.
        context: Its workspace.
        listed: Its entry for `Backend.list_runs`.
        is_active: True if it has not ended.
    """

    reference: JobRef
    context: _WorkspaceContext
    listed: ListedRun
    is_active: bool


class DatabricksBackend(RemoteBackend[DatabricksConfig]):
    """A backend that runs jobs as one-time runs (``runs/submit``) of Databricks workspaces.

    The workspace is that of ``profile`` in ``backend_config``, else that of the tracking URI. Closing the backend
    cancels the runs that it submitted; runs that it attached to go on.

    Args:
        timing: The intervals and rates of requests; None: those that suit Databricks.
    """

    name: ClassVar[str] = "databricks"

    def __init__(self, *, timing: Timing | None = None) -> None:
        super().__init__()
        self._timing = timing or Timing()
        self._contexts: SingleFlight[tuple[str | None, str], _WorkspaceContext] = SingleFlight(keep=True)
        self._references: dict[str, JobRef] = {}  # of jobs that are not submitted yet, by the id of the MLflow run

    def configure(self, config: Mapping[str, Any]) -> DatabricksConfig:
        """Parse ``backend_config``: a cluster, or a mapping of settings; see `parse_config`.

        Raises:
            UsageError: A key is unknown, a value is wrong, or the profile does not exist.
        """
        parsed = parse_config(config)
        if parsed.profile is not None:
            check_profile(parsed.profile)
        return parsed

    def check(self, docker: DockerRequest | None, folder: Path) -> None:
        """Refuse projects with ``docker_env``; see `Backend.check`."""
        if docker is not None:
            raise UsageError(
                "projects with docker_env cannot run on Databricks: run them with the backend 'docker' or 'kubernetes',"
                " or give the project a python_env"
            )

    def check_variables(self, names: Collection[str], config: DatabricksConfig | None = None) -> None:
        """Refuse variables without a secret scope for them; see `Backend.check_variables`."""
        if config is None or config.secret_scope is None:
            raise UsageError(_describe_missing_scope(names))

    def place(self, path: str, index: int, folder: Path) -> str | None:
        """Return the path in Databricks of a file there, a file of the project, or a download; see `Backend.place`."""
        return request.place_path(path, index, folder)

    def check_tracking(self, uri: str, config: object = None) -> None:
        """Refuse tracking that only this machine can reach; see `Backend.check_tracking`."""
        if not (is_databricks(uri) or uri.startswith(("http://", "https://"))):
            raise UsageError(
                f"the tracking URI {uri!r} is on this machine, where Databricks cannot reach it: use 'databricks',"
                " 'databricks://<profile>', or the http(s) address of a server that both can reach"
            )

    def reference(self, job: Job) -> JobRef:
        """Return the workspace's profile, the time and the place of the output, by which `attach` finds the run."""
        if job.run_id not in self._references:
            config = _config(job)
            data: dict[str, Any] = {
                "profile": _profile(config, job.tracking_uri),
                "attempt": uuid.uuid4().hex[:12],  # an MLflow run may be run again
                "upload": str(config.upload.kind),
                "path": config.upload.path,
                "api_version": str(config.api_version),
                "since": int(time.time() * 1000),
                "owner": self._this_process,
            }
            if request.variables(job, config)[1]:
                data["secret_scope"] = config.secret_scope
            self._references[job.run_id] = JobRef(self.name, job.run_id, data)
        return self._references[job.run_id]

    def variables(self, job: Job) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return the variables of the job, without the login of this machine where a run has its own."""
        return request.variables(job, _config(job))

    def preview(self, job: Job) -> str:
        """Return the body of ``runs/submit``, with ``<…>`` for values that only the workspace knows."""
        config = _config(job)
        root = config.upload.path or HOME.format(user="<user>")
        paths = request.RunPaths(
            script=f"{config.script_upload.path or HOME.format(user='<user>')}/bootstrap-<sha256>.py",
            archive=f"{root}/projects/<sha256>.tar.gz",
            sha256="<sha256>",
            output=f"{root}/output/{job.run_id}-<attempt>",
            secret=secret_key(job.run_id) if config.secret_scope and request.variables(job, config)[1] else None,
        )
        body = request.request_body(
            job, config, paths, token=f"{job.run_id}-<attempt>", requirements=read_requirements(job)
        )
        return json.dumps(request.mask_request(body), indent=2, ensure_ascii=False)

    async def submit(self, job: Job) -> DatabricksRun:
        """Upload the project if the workspace does not have it yet, and submit the run.

        Raises:
            SubmitError: The workspace does not take the project or the request; no run is left.
            WorkspaceError: The workspace cannot be reached, or the login has no permission to use it.
        """
        config = _config(job)
        secret = request.variables(job, config)[1]
        if secret and config.secret_scope is None:
            raise SubmitError(_describe_missing_scope(secret), backend=self.name)
        requirements = await PROJECTS.run(partial(read_requirements, job))
        reference = self.reference(job)
        del self._references[job.run_id]
        context = await self._context_of(reference)
        storage = await open_storage(context.workspace, config.upload)
        submission = _Submission(job, config, reference, context, storage)
        try:
            body = await self._upload(submission, secret, requirements)
            job.on_progress(f"submitting to {context.workspace.url}")
            return await self._submit(submission, body)
        except BaseException as error:
            await complete(partial(_withdraw, context.workspace, reference))
            if isinstance(error, WorkspaceError) and error.status in (400, 403, 404):
                raise SubmitError(f"Databricks does not take the run: {error}", backend=self.name) from error
            raise

    def tags(self, run: BackendRun) -> Mapping[str, str]:
        """Return the tags with the run's page in Databricks, by the names that mlflow gives them."""
        return run.tags if isinstance(run, DatabricksRun) else {}

    async def attach(self, ref: JobRef) -> DatabricksRun:
        """Return the handle of a run that an earlier process submitted, found as `RecentRuns.find` says.

        Raises:
            RunLost: The workspace does not have the run any more.
            WorkspaceError: The workspace cannot be reached.
        """
        context = await self._context_of(ref)
        found = await _find(context, ref)
        if found is None:
            secret = secret_of(ref)
            if secret is not None and await FILES.run(partial(owner_lives, ref.data.get("owner"))) is False:
                await remove_secret(context.workspace, *secret)
            text = f"the workspace {context.workspace.url} has no run of the MLflow run {ref.run_id}, or has it no more"
            raise RunLost(text, backend=self.name)
        storage = await open_storage(context.workspace, upload_of(ref))
        await FILES.run(partial(change_owner, ref.run_id, self._this_process))
        output = run_folder(ref.run_id) / "output.log"
        number = str(found["run_id"])
        return self._supervise(ref, number, context, storage, read_state(found), output=output, submitted=False)

    # ---- runs of other processes ------------------------------------------------------------------------------------

    def select_service(self, config: Mapping[str, Any], tracking_uri: str) -> None:
        """Select the workspace in which a run with these settings would be; see `Backend.select_service`."""
        parsed = self.configure(config)
        self._selected = replace(parsed, profile=_profile(parsed, tracking_uri))

    async def list_runs(self) -> Sequence[ListedRun]:
        """Return the active runs in the workspace that was selected, or else that of databricks-sdk's login.

        Of ended runs, which Databricks keeps for 60 days, only those are listed that a dead process of this machine
        left something of; see `Backend.list_runs`.

        Raises:
            WorkspaceError: The workspace cannot be reached, or no way to log in was found.
        """
        context = await self._own_context()
        left = {each.listed.run_id: each.listed for each in await self._find_left()}
        active = (
            _listed(run_id, str(run["run_id"]), read_state(run)) for run_id, run in await context.recent.list_active()
        )
        return [*(run for run in active if run.run_id not in left), *left.values()]

    async def prune(
        self, run_ids: Collection[str] = (), *, running: bool = False, dry_run: bool = False
    ) -> Sequence[ListedRun]:
        """Remove what dead processes of this machine left in workspaces: secrets and files; see `Backend.prune`.

        These are the secret variables and the output of a run, and secret variables that any machine left more than a
        week ago in the workspace of `list_runs`. Packed projects stay, since other runs may use them, and so do
        Databricks' own entries of runs.
        """
        chosen = await self._prune_old_secrets(run_ids, dry_run=dry_run)
        for left in await self._find_left():
            if (run_ids and left.listed.run_id not in run_ids) or (left.is_active and not running):
                continue
            if not dry_run:
                await self._remove(left)
            chosen.append(left.listed)
        return chosen

    async def _prune_old_secrets(self, run_ids: Collection[str], *, dry_run: bool) -> list[ListedRun]:
        context = await self._own_context()
        known = {record.reference.run_id for record in await FILES.run(read_records)}
        active = {run_id for run_id, _ in await context.recent.list_active()}
        chosen: list[ListedRun] = []
        for run in await find_old_secrets(context.workspace, known | active):
            if run_ids and run.run_id not in run_ids:
                continue
            if not dry_run:
                await remove_secret(context.workspace, str(run.detail["secret_scope"]), secret_key(run.run_id))
            chosen.append(run)
        return chosen

    async def _find_left(self) -> list[_Left]:
        """Return the runs with a record on this machine whose process is gone."""
        found: list[_Left] = []
        for record in await FILES.run(_read_abandoned):
            reference = replace(record.reference, tags={NUMBER_TAG: record.number})
            try:
                context = await self._context_of(reference)
                run = await _find(context, reference)
            except BackendError as error:
                _log.warning(
                    "the run %s cannot be looked for: %s",
                    reference.run_id,
                    error,
                    extra={"run_id": reference.run_id},
                )
                continue
            state = read_state(run) if run is not None else replace(LOST, start_time=submitted_at(reference))
            number = str(run["run_id"]) if run is not None else record.number
            listed = replace(_listed(reference.run_id, number, state), supervised=False)
            found.append(_Left(reference, context, listed, not state.is_terminal))
        return found

    async def _remove(self, left: _Left) -> None:
        """Remove what a run has left, and end it before if it is active."""
        reference, workspace = left.reference, left.context.workspace
        if left.is_active:
            handle = await self.attach(reference)
            await handle.cancel()
        if (secret := secret_of(reference)) is not None:
            await remove_secret(workspace, *secret)
        storage = await open_storage(workspace, upload_of(reference))
        await storage.remove_folder(output_folder(reference))
        await FILES.run(partial(remove_record, reference.run_id))

    async def presence(self, ref: JobRef) -> Presence:
        """Return the state of the run; see `Backend.presence`."""
        found = await _find(await self._context_of(ref), ref)
        if found is None:
            return Presence.MISSING
        return Presence.ENDED if read_state(found).is_terminal else Presence.ACTIVE

    # ---- one run ----------------------------------------------------------------------------------------------------

    async def _own_context(self) -> _WorkspaceContext:
        """Return the context of the workspace that was selected, or else that of databricks-sdk's login."""
        config = await self._selected_config()
        return await self._open_context(config.profile, config.api_version)

    async def _context_of(self, ref: JobRef) -> _WorkspaceContext:
        profile = ref.data.get("profile")
        version = str(ref.data.get("api_version") or DatabricksConfig().api_version)
        return await self._open_context(str(profile) if profile else None, version)

    async def _open_context(self, profile: str | None, version: str) -> _WorkspaceContext:
        """Return the shared context of a workspace; the first call opens it."""

        async def enter() -> _WorkspaceContext:
            workspace = Workspace(profile, self._timing, version=version)
            await workspace.open()
            context = _WorkspaceContext(workspace, self._timing)
            self._stack.push_async_callback(workspace.close)
            await self._stack.enter_async_context(context.poller)
            return context

        return await self._contexts((profile, version), enter)

    async def _upload(
        self, submission: _Submission, secret: Mapping[str, str], requirements: tuple[str, ...]
    ) -> dict[str, Any]:
        """Upload what the run needs in the workspace, and return the request."""
        job, config, context, storage = submission.job, submission.config, submission.context, submission.storage
        secret_place, folder = secret_of(submission.reference), output_folder(submission.reference)
        script_storage = await open_storage(context.workspace, config.script_upload)
        required = request.project_files(job.placed)
        archive = await context.uploads.upload_project(storage, job.project_dir, job.on_progress, required=required)
        paths = request.RunPaths(
            script=await context.uploads.upload_script(script_storage),
            archive=archive.path,
            sha256=archive.sha256,
            output=storage.path(folder),
            secret=None if secret_place is None else secret_place[1],
        )
        await FILES.run(partial(write_record, Record(submission.reference)))
        content = request.argument_file(job, config, paths)
        if content is not None:
            await storage.write(f"{folder}/{request.ARGUMENT}", io.BytesIO(content), len(content))
        if secret_place is not None:
            await put_secret(context.workspace, secret_place, secret)
        token = f"{job.run_id}-{submission.reference.data['attempt']}"
        return request.request_body(job, config, paths, token=token, requirements=requirements)

    async def _submit(self, submission: _Submission, body: Mapping[str, Any]) -> DatabricksRun:
        """Submit the run. If that is cancelled, the run is cancelled, too, before the cancellation goes on."""
        job, context, storage = submission.job, submission.context, submission.storage
        reference = submission.reference
        runs = "/api/2.0/jobs/runs" if submission.config.task is TaskKind.SHELL_COMMAND else context.workspace.runs
        made: list[str] = []

        async def submit() -> None:
            answer = await context.workspace.call("POST", f"{runs}/submit", body=body)
            made.append(str(answer["run_id"]))

        try:
            # Wait for the answer also when cancelled: without it the run, if there is one, could not be cancelled.
            await context.quota.submit(
                partial(complete, submit, limit=_GRACE),
                limit=job.queue_timeout,
                on_progress=job.on_progress,
            )
            await FILES.run(partial(write_record, Record(reference, made[0])))
            state = await _first_state(context.workspace, made[0])
        except BaseException:
            if made:
                handle = self._supervise(reference, made[0], context, storage, None, output=job.output)
                await complete(partial(_cancel, handle), restart=True)
            raise
        tags = _tags(made[0], state, context.workspace.url)
        return self._supervise(reference, made[0], context, storage, state, output=job.output, tags=tags)

    def _supervise(
        self,
        ref: JobRef,
        number: str,
        context: _WorkspaceContext,
        storage: Storage,
        state: State | None,
        *,
        output: Path | None,
        tags: Mapping[str, str] | None = None,
        submitted: bool = True,
    ) -> DatabricksRun:
        run = DatabricksRun(
            ref,
            number,
            context.workspace,
            storage,
            context.poller,
            output=output,
            tags=tags or {},
            submitted=submitted,
            state=state,
        )
        self._runs.start(run, name=f"mlfleet Databricks run {number}")
        return run


def _config(job: Job) -> DatabricksConfig:
    return job.config if isinstance(job.config, DatabricksConfig) else DatabricksConfig()


def _profile(config: DatabricksConfig, tracking_uri: str) -> str | None:
    """Return the profile of a run's workspace: that of the configuration, else that of the tracking URI."""
    if config.profile is not None:
        return config.profile
    return profile_of(tracking_uri) if is_databricks(tracking_uri) else None


def _read_abandoned() -> list[Record]:
    """Return the records of runs whose process is gone. Blocking."""
    return [record for record in read_records() if owner_lives(record.reference.data.get("owner")) is False]


def _listed(run_id: str, number: str, state: State) -> ListedRun:
    return ListedRun(
        run_id=run_id,
        backend=DatabricksBackend.name,
        created=datetime.fromtimestamp(state.start_time / 1000, UTC),
        state=state.life.lower(),
        supervised=True,  # the process that submitted it may be on another machine
        detail={"databricks_run": number, "url": state.page_url},
    )


async def _find(context: _WorkspaceContext, ref: JobRef) -> dict[str, Any] | None:
    """Return the entry of ``runs/get`` for a run; None if the workspace does not have it."""
    return await context.recent.find(ref.run_id, number=ref.tags.get(NUMBER_TAG, ""), since=submitted_at(ref))


async def _cancel(run: DatabricksRun) -> None:
    """Cancel a run whose submission was cancelled, and wait for its end for some time."""
    with anyio.move_on_after(_GRACE):
        await run.cancel()


async def _withdraw(workspace: Workspace, ref: JobRef) -> None:
    """Remove the secret variables and the record of a run whose submission failed."""
    if (secret := secret_of(ref)) is not None:
        await remove_secret(workspace, *secret)
    await FILES.run(partial(remove_record, ref.run_id))


async def _first_state(workspace: Workspace, number: str) -> State:
    """Return the state of a new run; WAITING if it cannot be read yet, so that the poller reads it later."""
    try:
        return read_state(await workspace.get_run(number))
    except WorkspaceError as error:
        _log.info("the state of the new run %s is not known yet: %s", number, error)
        return State(phase=Phase.WAITING)


def _describe_missing_scope(variables: Collection[str]) -> str:
    return (
        f"the run needs secret variables ({', '.join(sorted(variables))}), which Databricks shows to others unless they"
        " are in a secret scope: name one in backend_config {'secret_scope': …} (databricks secrets create-scope NAME)"
    )


def _tags(run_id: str, state: State, url: str) -> dict[str, str]:
    tags = {
        "mlflow.databricks.runURL": state.page_url,
        NUMBER_TAG: run_id,
        "mlflow.databricks.shellJobID": str(state.job_id or ""),
        "mlflow.databricks.webappURL": url,
    }
    return {name: value for name, value in tags.items() if value}
