"""The backend: from a job to a run in Databricks, and back from a reference to its handle."""

from __future__ import annotations

import io
import json
import logging
import uuid
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import LOGINS
from mlfleet._environments.env_files import read_python_requirements
from mlfleet._paths import runs_folder
from mlfleet.backends._remote.run import SupervisedRuns
from mlfleet.backends.base import Backend, BackendRun, DockerRequest, Job
from mlfleet.backends.databricks import request
from mlfleet.backends.databricks.client import Timing, Workspace, WorkspaceError
from mlfleet.backends.databricks.config import DatabricksConfig, TaskKind, Upload, UploadKind, parse_config
from mlfleet.backends.databricks.run import DatabricksRun, RemoteRun, remove_secret
from mlfleet.backends.databricks.states import Phase, State, read_state
from mlfleet.backends.databricks.storage import HOME, Storage, Uploads, storage_of
from mlfleet.backends.databricks.watch import Poller, RecentRuns
from mlfleet.errors import RunLost, SubmitError, UsageError
from mlfleet.runs import JobRef
from mlfleet.tracking.databricks import check_profile, is_databricks, profile_of

__all__ = ["DatabricksBackend"]

_log = logging.getLogger("mlfleet.databricks")
_GRACE = 60.0  # seconds to take back a run whose submission is cancelled


class _Site:
    """One workspace, and what all runs in it share."""

    def __init__(self, workspace: Workspace, timing: Timing) -> None:
        self.workspace = workspace
        self.poller = Poller(workspace, timing)
        self.uploads = Uploads()
        self.recent = RecentRuns(workspace)


@dataclass(frozen=True, slots=True)
class _Submission:
    """A job on its way.

    Attributes:
        job: itself.
        config: of it.
        site: where it goes.
        storage: where its project and output are.
        attempt: tells this execution of the MLflow run from others.
    """

    job: Job
    config: DatabricksConfig
    site: _Site
    storage: Storage
    attempt: str

    @property
    def token(self) -> str:
        """By which Databricks knows a second submission of it; at most 64 characters."""
        return f"{self.job.run_id}-{self.attempt}"[:64]

    @property
    def folder(self) -> str:
        """For its output."""
        return _output_folder(self.job.run_id, self.attempt)

    @property
    def secret_place(self) -> tuple[str, str]:
        """Scope and key of its secret variables."""
        return str(self.config.secret_scope), _secret_key(self.job.run_id)

    def remote(self, number: str, tags: Mapping[str, str]) -> RemoteRun:
        """The run that came of it."""
        secret = self.secret_place if request.public_variables(self.job, self.config)[1] else None
        return RemoteRun(
            run_id=self.job.run_id,
            id=number,
            folder=self.folder,
            output=self.job.output,
            tags=tags,
            secret=secret,
        )


class DatabricksBackend(Backend[DatabricksConfig]):
    """Runs jobs as one-time runs (``runs/submit``) in Databricks workspaces: that of the tracking URI, or of a profile.

    Leaving the backend cancels the runs that it submitted, and leaves those that it attached to alone.

    Args:
        timing: how often to ask; None: as suits Databricks.
    """

    name: ClassVar[str] = "databricks"
    needs_login: ClassVar[bool] = True

    def __init__(self, *, timing: Timing | None = None) -> None:
        self._timing = timing or Timing()
        self._stack = AsyncExitStack()
        self._sites: SingleFlight[tuple[str | None, str], _Site] = SingleFlight(keep=True)
        self._runs = SupervisedRuns()
        self._attempts: dict[str, str] = {}

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self._runs.close()
            await self._stack.aclose()

    def configure(self, config: Mapping[str, Any]) -> DatabricksConfig:
        """A cluster, a mapping with ``new_cluster``, or one without any: then the compute is serverless.

        Raises:
            UsageError: an unknown key or a wrong value, or there is no such profile.
        """
        parsed = parse_config(config)
        if parsed.profile is not None:
            check_profile(parsed.profile)
        return parsed

    def check(self, docker: DockerRequest | None, folder: Path) -> None:
        """Projects with ``docker_env`` are refused; see `Backend.check`."""
        if docker is not None:
            raise UsageError(
                "projects with docker_env cannot run on Databricks: run them with the backend 'docker' or 'kubernetes',"
                " or give the project a python_env"
            )

    def place(self, path: str, index: int, folder: Path) -> str | None:
        """Volumes, workspace files and DBFS are there; files of the project are unpacked, and URIs downloaded there."""
        return request.place(path, index, folder)

    def check_tracking(self, uri: str, config: object = None) -> None:
        """Refuse what only this machine can reach; see `Backend.check_tracking`."""
        if not (is_databricks(uri) or uri.startswith(("http://", "https://"))):
            raise UsageError(
                f"the tracking URI {uri!r} is on this machine, where Databricks cannot reach it: use 'databricks',"
                " 'databricks://<profile>', or the http(s) address of a server that both can reach"
            )

    def reference(self, job: Job) -> JobRef:
        """The workspace's profile, where the output will be, and what the run's name in Databricks ends with."""
        config = _config(job)
        attempt = self._attempts.setdefault(job.run_id, _new_attempt())
        upload = config.upload
        data = {"profile": _profile(job, config), "attempt": attempt, "upload": str(upload.kind), "path": upload.path}
        data["api_version"] = str(config.api_version)
        if request.public_variables(job, config)[1]:
            data["secret_scope"] = config.secret_scope
        return JobRef(self.name, job.run_id, data)

    def preview(self, job: Job) -> str:
        """The body of ``runs/submit``, with ``<…>`` for what only the workspace knows."""
        config = _config(job)
        root = config.upload.path or HOME.format(user="<user>")
        places = request.Places(
            script=f"{HOME.format(user='<user>')}/bootstrap-<sha256>.py",
            archive=f"{root}/projects/<sha256>.tar.gz",
            sha256="<sha256>",
            output=f"{root}/output/{job.run_id}",
            secret=f"mlfleet-{job.run_id}"
            if config.secret_scope and request.public_variables(job, config)[1]
            else None,
        )
        body = request.request_body(
            job, config, places, token=f"{job.run_id}-<attempt>", requirements=_requirements(job)
        )
        return json.dumps(request.masked(body), indent=2, ensure_ascii=False)

    async def submit(self, job: Job) -> DatabricksRun:
        """Upload the project if it is not there yet, and submit the run.

        Raises:
            SubmitError: the workspace does not take the project or the request; no run is left.
            WorkspaceError: there is no such workspace, or no permission to use it.
        """
        config = _config(job)
        secret = request.public_variables(job, config)[1]
        if secret and config.secret_scope is None:
            raise SubmitError(_needs_scope(secret), backend=self.name)
        requirements = await LOGINS.run(partial(_requirements, job))
        site = await self._site(_profile(job, config), config.api_version)
        storage = await storage_of(site.workspace, config.upload)
        attempt = self._attempts.pop(job.run_id, None) or _new_attempt()
        submission = _Submission(job, config, site, storage, attempt)
        try:
            body = await self._deliver(submission, secret, requirements)
            job.on_progress(f"submitting to {site.workspace.url}")
            return await self._launch(submission, body)
        except BaseException as error:
            if secret:
                with anyio.CancelScope(shield=True):
                    await remove_secret(site.workspace, *submission.secret_place)
            if isinstance(error, WorkspaceError) and error.status in (400, 403, 404):
                raise SubmitError(f"Databricks does not take the run: {error}", backend=self.name) from error
            raise

    def tags(self, run: BackendRun) -> Mapping[str, str]:
        """Where Databricks shows the run, by the reference's names."""
        return run.tags if isinstance(run, DatabricksRun) else {}

    async def attach(self, ref: JobRef) -> DatabricksRun:
        """The handle of a run that an earlier process submitted, found by the id in its name.

        Raises:
            RunLost: there is no such run in the workspace.
            WorkspaceError: the workspace cannot be reached.
        """
        profile = ref.data.get("profile")
        version = str(ref.data.get("api_version") or DatabricksConfig().api_version)
        site = await self._site(str(profile) if profile else None, version)
        found = await site.recent.find(ref.run_id)
        if found is None:
            text = f"the workspace {site.workspace.url} has no run of the MLflow run {ref.run_id}, or none any more"
            raise RunLost(text, backend=self.name)
        upload = Upload(UploadKind(ref.data.get("upload") or "workspace"), str(ref.data.get("path") or ""))
        storage = await storage_of(site.workspace, upload)
        folder = _output_folder(ref.run_id, str(ref.data.get("attempt")))
        output = runs_folder() / ref.run_id / "output.log"
        scope = ref.data.get("secret_scope")
        secret = (str(scope), _secret_key(ref.run_id)) if scope else None
        remote = RemoteRun(run_id=ref.run_id, id=str(found["run_id"]), folder=folder, output=output, secret=secret)
        return self._supervise(remote, site, storage, read_state(found), submitted=False)

    # ---- one run ----------------------------------------------------------------------------------------------------

    async def _site(self, profile: str | None, version: str) -> _Site:
        async def enter() -> _Site:
            workspace = Workspace(profile, self._timing, version=version)
            await workspace.open()
            site = _Site(workspace, self._timing)
            self._stack.push_async_callback(workspace.close)
            await self._stack.enter_async_context(site.poller)
            return site

        return await self._sites((profile, version), enter)

    async def _deliver(
        self, submission: _Submission, secret: Mapping[str, str], requirements: tuple[str, ...]
    ) -> dict[str, Any]:
        """Bring to the workspace what the run needs there; the request for it."""
        job, config, site, storage = submission.job, submission.config, submission.site, submission.storage
        home = await storage_of(site.workspace, Upload())
        needs = request.files_of_project(job.placed)
        archive = await site.uploads.project(storage, job.project_dir, job.on_progress, needs=needs)
        places = request.Places(
            script=await site.uploads.script(home),
            archive=archive.path,
            sha256=archive.sha256,
            output=storage.path(submission.folder),
            secret=submission.secret_place[1] if secret else None,
        )
        argument = request.bootstrap_argument(request.bootstrap_spec(job, config, places))
        if request.too_long(argument):
            name, content = f"arguments/{submission.token}.json", argument.encode()
            await home.write(name, io.BytesIO(content), len(content))
            places = request.with_argument(places, home.path(name))
        if secret:
            await _put_secret(site.workspace, submission.secret_place, secret)
        return request.request_body(job, config, places, token=submission.token, requirements=requirements)

    async def _launch(self, submission: _Submission, body: Mapping[str, Any]) -> DatabricksRun:
        config, site = submission.config, submission.site
        version = "2.0" if config.task is TaskKind.SHELL_COMMAND else None
        made: list[str] = []

        async def submit() -> None:
            answer = await site.workspace.jobs("POST", "runs/submit", body=body, version=version)
            made.append(str(answer["run_id"]))

        try:
            # Cut off in the middle, nobody would know whether there is a run: an answer is waited for.
            await complete(submit, limit=_GRACE)
            state = await _first_state(site.workspace, made[0])
        except BaseException:
            if made:
                with anyio.move_on_after(_GRACE, shield=True):
                    await self._supervise(submission.remote(made[0], {}), site, submission.storage, None).cancel()
            raise
        remote = submission.remote(made[0], _tags(made[0], state, site.workspace.url))
        return self._supervise(remote, site, submission.storage, state)

    def _supervise(
        self, remote: RemoteRun, site: _Site, storage: Storage, state: State | None, *, submitted: bool = True
    ) -> DatabricksRun:
        run = DatabricksRun(remote, site.workspace, storage, site.poller, submitted=submitted)
        if state is not None:
            run.told(state)
        self._runs.start(run, name=f"mlfleet Databricks run {remote.id}")
        return run


def _config(job: Job) -> DatabricksConfig:
    return job.config if isinstance(job.config, DatabricksConfig) else DatabricksConfig()


def _profile(job: Job, config: DatabricksConfig) -> str | None:
    """The workspace is where the runs are tracked, unless the configuration says otherwise."""
    if config.profile is not None:
        return config.profile
    return profile_of(job.tracking_uri) if is_databricks(job.tracking_uri) else None


def _requirements(job: Job) -> tuple[str, ...]:
    """What the project needs, as lines for pip. Blocking."""
    spark = tuple((job.spark_job or {}).get("python_libraries", ()))
    needs = read_python_requirements(job.project_dir, job.environment_file)
    if needs.packages.arguments:
        found = " ".join(needs.packages.arguments)[:200]
        text = (
            f"the project's environment has {found!r}, which Databricks cannot install: name packages of an index there"
        )
        raise SubmitError(text, backend="databricks")
    if needs.python is not None:
        _log.info("Python %s of the project is not seen to: the cluster or environment_version decides", needs.python)
    lines = (line.strip() for line in needs.packages.lines)
    return (*spark, *(line for line in lines if line and not line.startswith("#")))


def _secret_key(run_id: str) -> str:
    return f"mlfleet-{run_id}"


def _output_folder(run_id: str, attempt: str) -> str:
    return f"output/{run_id}-{attempt}"


def _new_attempt() -> str:
    return uuid.uuid4().hex[:12]


async def _first_state(workspace: Workspace, number: str) -> State:
    """What a new run looks like; if that cannot be had now, the poller will tell later."""
    try:
        return read_state(await workspace.jobs("GET", "runs/get", params={"run_id": number}))
    except WorkspaceError as error:
        _log.info("nothing is told of the new run %s yet: %s", number, error)
        return State(phase=Phase.WAITING)


async def _put_secret(workspace: Workspace, place: tuple[str, str], variables: Mapping[str, str]) -> None:
    scope, key = place
    body = {"scope": scope, "key": key, "string_value": json.dumps(dict(variables))}
    try:
        await workspace.call("POST", "/api/2.0/secrets/put", body=body)
    except WorkspaceError as error:
        names = ", ".join(sorted(variables))
        text = f"the secret variables {names} cannot be put into the secret scope {scope!r}: {error}"
        raise SubmitError(text, backend="databricks") from error


def _needs_scope(variables: Mapping[str, str]) -> str:
    return (
        f"the run needs secret variables ({', '.join(sorted(variables))}), which Databricks shows to others unless they"
        " are in a secret scope: name one in backend_config {'secret_scope': …} (databricks secrets create-scope NAME)"
    )


def _tags(run_id: str, state: State, url: str) -> dict[str, str]:
    tags = {
        "mlflow.databricks.runURL": state.page_url,
        "mlflow.databricks.shellJobRunID": run_id,
        "mlflow.databricks.shellJobID": str(state.job_id or ""),
        "mlflow.databricks.webappURL": url,
    }
    return {name: value for name, value in tags.items() if value}
