"""The contract of backends: a backend takes a `Job` and returns a handle. It sees no MLproject, Git or tracking."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self

from mlfleet._environments.manager import PreparedEnvironment
from mlfleet._process.inherit import inherited
from mlfleet._project.spec import DockerEnv, EnvironmentFile, EnvironmentFileKind
from mlfleet.errors import BackendError, RunLost, UsageError
from mlfleet.resources import Resources
from mlfleet.runs import DEFAULT_CANCEL_GRACE, JobRef, Outcome, SubmittedRun

if TYPE_CHECKING:
    # Defaults of type variables (PEP 696) are for type checkers only until Python 3.13.
    from typing_extensions import TypeVar

    Config = TypeVar("Config", default=Any)
else:
    from typing import TypeVar

    Config = TypeVar("Config")

__all__ = [
    "DRIVER_DIED",
    "Backend",
    "BackendRun",
    "DockerEnv",
    "DockerRequest",
    "EnvironmentFile",
    "EnvironmentFileKind",
    "Job",
    "ListedRun",
    "PreparedEnvironment",
    "Presence",
    "ProjectCall",
]

DRIVER_DIED = "its driver died"
"""The reason of runs that ended with the process that supervised them."""


class Presence(StrEnum):
    """The state of a run at its backend, as far as it matters for concluding the run."""

    ACTIVE = "active"
    ENDED = "ended"
    MISSING = "missing"
    """The backend does not have it. It was removed, or is still to be made."""


@dataclass(frozen=True, slots=True)
class DockerRequest:
    """The Docker settings of a project with ``docker_env`` and of its caller.

    Attributes:
        env: The project's ``docker_env``.
        args: Flags of ``docker run`` (values of ``env`` may be secret).
        build_image: True to build an image of base and project, rather than run the base image itself.
        auth: Credentials for the registry (secret).
        caller_variables: The names of the variables that the caller gives the run. Their values are in `Job.secrets`,
            and count more than those of ``docker_env``.
        inherit_env: `Job.inherit_env`, which also says what ``docker_env`` may copy.
    """

    env: DockerEnv
    args: Mapping[str, Any] = field(default_factory=dict, repr=False)
    build_image: bool = False
    auth: Mapping[str, Any] | None = field(default=None, repr=False)
    caller_variables: frozenset[str] = frozenset()
    inherit_env: bool | tuple[str, ...] = True

    def inherited(self) -> dict[str, str]:
        """Return the variables of this process that ``docker_env`` may copy."""
        return inherited(self.inherit_env)

    def not_set(self, names: Collection[str]) -> str:
        """Return the message about variables that ``docker_env`` copies and that there are not."""
        reason = "that are not set here" if self.inherit_env is True else "that are not set here, or not inherited"
        return f"docker_env copies variables {reason}: {', '.join(names)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectCall:
    """The caller's arguments, for backends that read the project themselves.

    Attributes:
        uri: The URI of a Git project elsewhere. None: `Job.project_dir` is the project.
        version: The commit that `uri` was resolved to.
        entry_point: The entry point's name, or a script of the project.
        parameters: The parameters as given: without defaults, and nothing downloaded.
        env_manager: The environment manager. None: chosen by the project's files.
        storage_dir: The folder to download ``path`` parameters to.
        docker_args: Flags of ``docker run``.
        build_image: True to build an image of base and project.
        docker_auth: Credentials for the registry (secret).
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
    """All that a backend may know about a run.

    Attributes:
        run_id: The id of the MLflow run; names of remote things derive from it.
        experiment_id: The id of its experiment.
        project_name: The name in MLproject, or the folder's name.
        project_dir: The folder of the project on this machine; the command's working directory.
        commit: The Git commit of the folder, if it is a clean checkout.
        command: The rendered command, for ``bash -c``.
        environ: Variables to set for the command, on top of the caller's where the backend runs on this machine.
        secrets: More such variables, which must never appear in logs, tags, argv or errors: the credentials of
            tracking, and all that the caller gives.
        environment: The Python environment, prepared on this machine; None where the backend brings its own.
        docker: The Docker settings of a project with ``docker_env``.
        config: The result of this backend's `Backend.configure` for ``backend_config``.
        output: The file to capture stdout and stderr into; None: they are inherited from this process.
        cancel_grace: Seconds between the request to stop and the end by force.
        queue_timeout: Seconds for which `Backend.submit` may wait while a service takes no new runs; None: no limit was
            set.
        resources: The resources that the run needs, where the backend can provide them.
        durable: True if the run must go on, and be found again by `Backend.attach`, when this process dies. For runs
            on this machine; those elsewhere go on anyway.
        paths: The files and folders of this machine, absolute, that the command's ``path`` parameters name.
        placed: Text in the command → value, for parameters that `Backend.place` gave a place.
        environment_file: The project's environment file, for backends that bring their own environment.
        spark_job: The project's ``databricks_spark_job``.
        tracking_uri: The URI of the tracking server or store, without credentials.
        artifact_uri: The place of the MLflow run's artifacts; empty if unknown.
        on_progress: Called with one line on the progress of `Backend.submit`, such as the layers pulled so far.
        call: Returns the caller's arguments, for backends that read the project themselves.
        sweep_id: The MLflow run of the sweep that the run belongs to.
        inherit_env: The variables of this process that the command inherits, as `inherited` reads it: True for all,
            False for a minimal set, names for these as well.
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
    queue_timeout: float | None = None
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
    inherit_env: bool | tuple[str, ...] = True

    def inherited(self) -> dict[str, str]:
        """Return the variables of this process that the command inherits. `environ` and `secrets` come on top."""
        return inherited(self.inherit_env)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedRun:
    """A run that exists at its backend, running or ended, whichever process submitted it.

    Attributes:
        run_id: The id of the MLflow run.
        backend: The backend's name.
        created: The time at which the backend's part of the run was made.
        state: The backend's own word for the run's state, such as ``running`` or ``exited``.
        supervised: False if no process will conclude the run; True also if that cannot be seen from this machine.
        detail: More facts by name: ``pid``, ``container``, ``project``, ``image``, … They become fields of
            ``mlfleet ps --json``.
        output: The file on this machine with the run's output; None if there is none.
        size: Bytes that `Backend.prune` frees by removing it; None if unknown.
    """

    run_id: str
    backend: str
    created: datetime
    state: str
    supervised: bool
    detail: Mapping[str, str | int] = field(default_factory=dict)
    output: Path | None = None
    size: int | None = None


class BackendRun(SubmittedRun, Protocol):
    """The handle that a backend returns: a `SubmittedRun` that also reports its start and its outcome."""

    async def started(self) -> None:
        """Wait until the command runs, has ended, or can never run. Any number of tasks may wait."""
        ...

    async def cancel(self, *, grace: float | None = None) -> None:
        """End the run, as `SubmittedRun` says.

        Args:
            grace: Seconds between the request to stop and the end by force; None: as the job says. Of several calls the
                shortest grace counts.
        """
        ...

    async def outcome(self) -> Outcome:
        """Wait for the end and return the outcome. KILLED only if `cancel` ended the run. Any number may wait."""
        ...


class Backend(ABC, Generic[Config]):
    """A place where jobs run. One instance serves all runs of a Fleet.

    ``Backend[MyConfig]`` names the type that `configure` returns.

    Attributes:
        name: The name to ask for it by.
        needs_environment: True if the Fleet must prepare the project's Python environment on this machine.
        runs_here: True if runs use this machine's CPUs, memory and GPUs, so that the Fleet reserves them, and write
            their output to `Job.output` without help of the process that submitted them.
        docker_backend: The name of the backend to use in this one's place for projects with ``docker_env``.
        hides_environment: True if runs see no variables of this process but those that `Job.inherited` returns.
            Otherwise a caller who says ``inherit_env`` is refused.
        needs_login: True if `list_runs` may begin a login: ``mlfleet ps`` then asks it only on request.
        path_keys: The keys of `configure` whose values are paths of this machine. In a settings file they may be
            relative to its folder.
    """

    name: ClassVar[str]
    needs_environment: ClassVar[bool] = False
    runs_here: ClassVar[bool] = False
    docker_backend: ClassVar[str | None] = None
    hides_environment: ClassVar[bool] = False
    needs_login: ClassVar[bool] = False
    path_keys: ClassVar[frozenset[str]] = frozenset()

    async def __aenter__(self) -> Self:
        """Open clients; start what is shared by all runs."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    # ---- before anything exists -------------------------------------------------------------------------------------

    def configure(self, config: Mapping[str, Any]) -> Config:
        """Check ``backend_config`` and make a frozen dataclass of it, which comes back as ``Job.config``.

        Called before anything exists. The mapping is the caller's and must not be changed.

        Raises:
            UsageError: An unknown key (the message names the known ones) or a wrong value.
        """
        if config:
            raise UsageError(
                f"the backend {self.name!r} takes no configuration, but backend_config has {', '.join(sorted(config))}"
            )
        return None  # type: ignore[return-value]

    def check(self, docker: DockerRequest | None, folder: Path) -> None:
        """Check the Docker settings of the project and its caller. Blocking; called before anything exists.

        Args:
            docker: The settings; None for a project without ``docker_env``.
            folder: The folder of the project.

        Raises:
            UsageError: The backend cannot run it.
        """

    def place(self, path: str, index: int, folder: Path) -> str | None:
        """Return where the command finds what a ``path`` parameter names, if not on this machine. Blocking.

        Args:
            path: A URI, or an absolute path, which need not exist.
            index: The number of the parameter, for a name of its own.
            folder: The folder of the project.

        Returns:
            The text for the command; None for a file of this machine, to which a URI is downloaded.

        Raises:
            ValueError: The command would not find it; the text says why and what to do.
        """
        return None

    def check_variables(self, names: Collection[str], config: Config | None = None) -> None:
        """Check that the command can get variables of the caller in secret. Called before anything exists.

        Args:
            names: The names of the variables, which will be in `Job.secrets`.
            config: The result of `configure`.

        Raises:
            UsageError: It cannot.
        """

    def check_tracking(self, uri: str, config: Config | None = None) -> None:
        """Check that runs can reach their tracking server or store. Called before anything exists.

        Args:
            uri: The URI of the tracking that this process uses.
            config: The result of `configure`, which may name another address for runs.

        Raises:
            UsageError: They cannot.
        """

    def check_config(self, config: Config, docker: DockerRequest | None, variables: Collection[str]) -> None:
        """Check that the configuration fits the project. Called before anything exists, and quick.

        Args:
            config: The result of `configure`.
            docker: The Docker settings of the project; None for a project without ``docker_env``.
            variables: The names of the variables that mlfleet sets for the run.

        Raises:
            UsageError: The configuration sets what the run must set, or lacks what the project does not say.
        """

    def shared_folder(self, config: Config) -> Path | None:
        """Return the folder for what is prepared on this machine and used elsewhere: environments and downloads.

        Args:
            config: The result of `configure`.

        Returns:
            The folder, which is at the same path where the runs are; None if they run on this machine, or need neither.
        """
        return None

    def variables(self, job: Job) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return the plain and the secret variables that the command gets, for people to read. Makes and asks nothing.

        The default is for backends that pass on those of the job as they are.
        """
        return job.environ, job.secrets

    def preview(self, job: Job) -> str | None:
        """Return the request that `submit` would make, for people to read. Blocking; makes and asks nothing.

        Returns:
            The text; None if there is nothing to show.

        Raises:
            MlfleetError: The job cannot be submitted.
        """
        return None

    # ---- one run ----------------------------------------------------------------------------------------------------

    @abstractmethod
    async def submit(self, job: Job) -> BackendRun:
        """Start the job and return its handle as soon as it is on its way.

        A cancelled call leaves nothing running.

        Raises:
            BackendError: It cannot be started; nothing of it is left.
        """

    def reference(self, job: Job) -> JobRef | None:
        """Return where the job can be found after this process died; None if it cannot be.

        Called before the job starts, when `Job.command`, `Job.environment` and `Job.project_dir` may still be
        provisional.
        """
        return None

    def tags(self, run: BackendRun) -> Mapping[str, str]:
        """Return tags for the MLflow run that are known only after the submit."""
        return {}

    def second_run(self, run: BackendRun) -> str | None:
        """Return the id of an MLflow run that the job logs to instead of its own, if there is one."""
        return None

    async def attach(self, ref: JobRef) -> BackendRun:
        """Return the handle of a job that an earlier process submitted.

        Raises:
            RunLost: It does not exist any more.
            BackendError: This backend's runs cannot be attached to.
        """
        raise BackendError(
            f"runs of the backend {self.name!r} end with the process that started them", backend=self.name
        )

    def detach(self, run: BackendRun) -> None:
        """Let go of a run that `attach` returned, and leave it alone: its handle is used no more.

        The default is for handles that hold nothing.
        """

    # ---- runs of other processes ------------------------------------------------------------------------------------

    def select_service(self, config: Mapping[str, Any], tracking_uri: str) -> None:
        """Select where `list_runs` and `prune` look: where a run with these settings would be. Blocking.

        Without a call they look where a run without settings would be.

        Args:
            config: The ``backend_config``, which need not have what only a run needs.
            tracking_uri: The URI of the tracking that such a run would use; empty: the default.

        Raises:
            UsageError: An unknown key or a wrong value.
        """

    async def list_runs(self) -> Sequence[ListedRun]:
        """Return the runs that exist at the backend, in any order, whichever process submitted them.

        A run exists as long as the backend has its process, container or job, which may have ended; `prune` removes it.
        The default is for backends whose runs end with the process that started them.

        Raises:
            BackendError: The backend cannot be asked.
        """
        return ()

    async def prune(
        self, run_ids: Collection[str] = (), *, running: bool = False, dry_run: bool = False
    ) -> Sequence[ListedRun]:
        """Remove what is left of runs that no process looks after.

        Args:
            run_ids: The ids of the runs to look at; empty: all.
            running: True to remove also what still runs, which ends it. Otherwise it is left for `attach`.
            dry_run: True to remove nothing.

        Returns:
            The runs whose leftovers were removed, or would be.

        Raises:
            BackendError: The backend cannot be asked.
        """
        return ()

    async def is_abandoned(self, ref: JobRef) -> bool:
        """Return True if a run is over or gone, and so is the process that should write its status to MLflow.

        `attach` then gives its outcome or raises `RunLost`. Called again and again while somebody waits for the run.

        Raises:
            BackendError: The backend cannot be asked.
        """
        return False

    async def presence(self, ref: JobRef) -> Presence | None:
        """Return if the backend has a run now, and if that has ended, whatever its driver does.

        Called again and again, with pauses, while somebody waits for the run of a driver that cannot be seen.

        Returns:
            None if the backend cannot tell, which is the default.

        Raises:
            BackendError: The backend cannot be asked.
        """
        return None

    async def find_left(self, run_id: str, *, grace: float) -> BackendRun:
        """Return the handle of what runs of a run without a reference that another process supervises, or did.

        Args:
            run_id: The id of the MLflow run.
            grace: Seconds between the request to stop and the end by force, for calls of `cancel` that name none.

        Raises:
            RunLost: Nothing of it is left, as the default says.
        """
        raise RunLost(DRIVER_DIED, backend=self.name)

    async def withdraw(self, ref: JobRef) -> bool:
        """Keep a run from beginning, if it has not begun yet.

        Returns:
            True if the run never begins. False if it has begun, or cannot be kept from it, and so must be cancelled.

        Raises:
            BackendError: It can be ended only elsewhere.
        """
        return False
