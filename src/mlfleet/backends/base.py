"""What a backend is: it takes a `Job` and gives a handle. It sees no MLproject, no Git and no tracking."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from mlfleet._environments.base import PreparedEnvironment
from mlfleet._project.spec import DockerEnv, EnvironmentFile
from mlfleet.errors import BackendError, UsageError
from mlfleet.resources import Resources
from mlfleet.runs import DEFAULT_CANCEL_GRACE, JobRef, Outcome, SubmittedRun

__all__ = ["Backend", "BackendRun", "DockerRequest", "Job", "ProjectCall"]


@dataclass(frozen=True, slots=True)
class DockerRequest:
    """What a project with ``docker_env`` and its caller ask for.

    Attributes:
        env: the project's ``docker_env``.
        args: flags of ``docker run`` (values of ``env`` may be secret).
        build_image: build an image of base and project, rather than run the base image itself.
        auth: credentials for the registry (secret).
    """

    env: DockerEnv
    args: Mapping[str, Any] = field(default_factory=dict, repr=False)
    build_image: bool = False
    auth: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectCall:
    """The call as it was made, for backends that read the project themselves.

    Attributes:
        uri: of a Git project elsewhere; None: `Job.project_dir` is the project.
        version: the commit that `uri` was found to be at.
        entry_point: its name, or a script of the project.
        parameters: as they were given: without defaults, and nothing downloaded.
        env_manager: None: by the project's files.
        storage_dir: where ``path`` parameters are to be downloaded to.
        docker_args: flags of ``docker run``.
        build_image: build an image of base and project.
        docker_auth: credentials for the registry (secret).
    """

    uri: str | None
    version: str | None
    entry_point: str
    parameters: Mapping[str, Any]
    env_manager: str | None = None
    storage_dir: str | None = None
    docker_args: Mapping[str, Any] | None = field(default=None, repr=False)
    build_image: bool = False
    docker_auth: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that a backend may know of a run.

    Attributes:
        run_id: of the MLflow run; names of remote things derive from it.
        experiment_id: of its experiment.
        project_name: as MLproject says, or the folder's name.
        project_dir: the folder of the project on this machine; the command's working directory.
        commit: the Git commit of the folder, if it is a clean checkout.
        command: the rendered command, for ``bash -c``.
        environ: variables to set for the command, on top of the caller's where the backend runs on this machine.
        secrets: more such variables, which must never be seen in logs, tags, argv or errors.
        environment: prepared on this machine; None where the backend brings its own.
        docker: what a project with ``docker_env`` asks for.
        config: what this backend's `configure` made of ``backend_config``.
        output: the file to capture stdout and stderr into; None: they are inherited from this process.
        cancel_grace: seconds between the request to stop and the end by force.
        resources: what the run needs, where the backend can see to it.
        durable: whether the run must go on, and be found again by `Backend.attach`, if this process dies. For runs on
            this machine; those elsewhere do so anyway.
        paths: what the command's ``path`` parameters name on this machine: files and folders, absolute.
        placed: text in the command → value, of those to which `Backend.place` gave a place.
        environment_file: of the project, for backends that bring their own environment.
        spark_job: the project's ``databricks_spark_job``.
        tracking_uri: of the tracking server or store, without credentials.
        artifact_uri: where the artifacts of the MLflow run are; empty if that is not known.
        on_progress: takes one line on what `Backend.submit` is at, such as how far an image is pulled.
        call: gives what the caller asked for, for backends that read the project themselves.
        sweep_id: the MLflow run of the sweep that the run belongs to.
    """

    run_id: str
    experiment_id: str
    project_name: str
    project_dir: Path
    command: str
    commit: str | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    environment: PreparedEnvironment | None = None
    docker: DockerRequest | None = None
    config: object = None
    output: Path | None = None
    cancel_grace: float = DEFAULT_CANCEL_GRACE
    resources: Resources | None = None
    durable: bool = False
    paths: tuple[Path, ...] = ()
    placed: Mapping[str, str] = field(default_factory=dict)
    environment_file: EnvironmentFile | None = None
    spark_job: Mapping[str, Any] | None = None
    tracking_uri: str = ""
    artifact_uri: str = ""
    on_progress: Callable[[str], None] = field(default=lambda line: None, repr=False, compare=False)
    call: Callable[[], ProjectCall] | None = field(default=None, repr=False, compare=False)
    sweep_id: str | None = None


class BackendRun(SubmittedRun, Protocol):
    """The handle that a backend gives: a `SubmittedRun` that also tells when it began and how it ended."""

    async def started(self) -> None:
        """Wait until the command runs, or has ended, or never will. Any number of waiters."""
        ...

    async def cancel(self, *, grace: float | None = None) -> None:
        """End the run, as `SubmittedRun` says.

        Args:
            grace: seconds between the request to stop and the end by force; None: as the job says. Of several calls the
                shortest grace counts.
        """
        ...

    async def outcome(self) -> Outcome:
        """Wait for the end and tell how it was. KILLED only if `cancel` ended it. Any number of waiters."""
        ...


class Backend(ABC):
    """Runs jobs somewhere. One instance serves all runs of a Fleet.

    Attributes:
        name: by which it is asked for.
        needs_environment: whether the Fleet prepares the project's Python environment on this machine for it.
    """

    name: ClassVar[str]
    needs_environment: ClassVar[bool] = False

    async def __aenter__(self) -> Self:
        """Open clients; start what is shared by all runs."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def configure(self, config: Mapping[str, Any]) -> object:
        """Check ``backend_config`` and make a frozen dataclass of it, which comes back as ``Job.config``.

        Called before anything exists. The mapping is the caller's and is not changed.

        Raises:
            UsageError: an unknown key (naming the known ones) or a wrong value.
        """
        if config:
            raise UsageError(
                f"the backend {self.name!r} takes no configuration, but backend_config has {', '.join(sorted(config))}"
            )
        return None

    def check(self, docker: DockerRequest | None, folder: Path) -> None:  # noqa: B027 - most need not look
        """Check what the project and its caller ask of Docker. Blocking; called in a thread before anything exists.

        Args:
            docker: None for a project without ``docker_env``.
            folder: of the project.

        Raises:
            UsageError: the backend cannot run it.
        """

    def place(self, path: str, index: int, folder: Path) -> str | None:
        """Where the command finds what a ``path`` parameter names, if not on this machine. Blocking.

        Args:
            path: a URI, or the absolute path of what may or may not exist.
            index: of the parameter, for a name of its own.
            folder: of the project.

        Returns:
            The text for the command. None: a file of this machine is meant, to which URIs are downloaded.

        Raises:
            ValueError: the command would not find it; the text says why and what to do.
        """
        return None

    def check_tracking(self, uri: str, config: object = None) -> None:  # noqa: B027 - most need not look
        """Check whether runs can reach their tracking server or store. Called before anything exists.

        Args:
            uri: of the tracking that this process uses.
            config: what `configure` made of ``backend_config``, which may name another address for runs.

        Raises:
            UsageError: they cannot.
        """

    def preview(self, job: Job) -> str | None:
        """What `submit` would ask for, for people; None: there is nothing to see. Blocking; makes and asks nothing.

        Raises:
            MlfleetError: the job cannot be submitted.
        """
        return None

    @abstractmethod
    async def submit(self, job: Job) -> BackendRun:
        """Start the job and return its handle as soon as it is on its way.

        A cancelled call leaves nothing running.

        Raises:
            BackendError: it cannot be started; nothing of it is left.
        """

    def reference(self, job: Job) -> JobRef | None:
        """Where the job will be found after this process died; None: it cannot be.

        Asked before the job starts, when `Job.command`, `Job.environment` and `Job.project_dir` may still be
        provisional.
        """
        return None

    def tags(self, run: BackendRun) -> Mapping[str, str]:
        """Tags for the MLflow run that are known only now that it was submitted."""
        return {}

    def second_run(self, run: BackendRun) -> str | None:
        """The id of an MLflow run that the job logs to instead of its own, because something made it one; else None."""
        return None

    async def attach(self, ref: JobRef) -> BackendRun:
        """The handle of a job that an earlier process submitted.

        Raises:
            RunLost: it is not there any more.
            BackendError: this backend's runs cannot be attached to.
        """
        raise BackendError(
            f"runs of the backend {self.name!r} end with the process that started them", backend=self.name
        )
