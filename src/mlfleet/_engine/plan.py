"""Plans of runs: everything that can be known and checked before anything is created."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlfleet._concurrency.single_flight import Coalescing
from mlfleet._concurrency.threads import PROJECTS
from mlfleet._concurrency.throttle import Throttle
from mlfleet._engine.request import RunRequest
from mlfleet._environments.manager import EnvironmentPlan, choose_manager, create_manager, validate_manager
from mlfleet._process.inherit import read_inherit_env
from mlfleet._project.command import render
from mlfleet._project.fetch import Project, ProjectFetcher
from mlfleet._project.parameters import ResolvedParameters, resolve
from mlfleet._project.spec import EntryPoint, ProjectSpec, read_project
from mlfleet.backends.base import Backend, DockerRequest
from mlfleet.backends.registry import find
from mlfleet.errors import UsageError
from mlfleet.tracking.models import user_name

__all__ = ["Plan", "Planner", "ProjectPlan"]


# A command of so many characters is read within about a millisecond; a longer one is read in a thread.
_LONG = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectPlan:
    """The part of a plan shared by all runs of one project and entry point.

    Attributes:
        project: The fetched project.
        spec: The contents of its MLproject file.
        entry_point: The entry point to run.
        backend: The name of the backend that will run it. With the backend ``local`` a project with ``docker_env`` runs
            on ``docker``.
        config: The value of ``backend_config`` as the backend has read it.
        environment: The environment to build on this machine; None if the backend brings its own.
        docker: The image and the flags of a project with ``docker_env``; None for other projects.
        inherit_env: The variables of this process that the command inherits; see `Job.inherit_env`.
    """

    project: Project
    spec: ProjectSpec
    entry_point: EntryPoint
    backend: str
    config: object = None
    environment: EnvironmentPlan | None = None
    docker: DockerRequest | None = None
    inherit_env: bool | tuple[str, ...] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(ProjectPlan):
    """The plan of one run, checked as far as that is possible in advance.

    Attributes:
        request: The request.
        parameters: The parameters, resolved for the entry point.
        tags: The tags of the MLflow run.
        provisional_command: The command, with URIs in place of parameters that must be downloaded.
    """

    request: RunRequest
    parameters: ResolvedParameters
    tags: Mapping[str, str] = field(default_factory=dict)
    provisional_command: str = ""

    @property
    def project_name(self) -> str:
        """The name of the project by its MLproject file, or else that of its folder."""
        return self.spec.name or self.spec.folder.name

    def tracking_uri(self, default: str) -> str:
        """Return the tracking URI that the run gets: that of ``docker_env``, if it sets one.

        Args:
            default: The URI of the tracking that this process uses.
        """
        given = {} if self.docker is None else dict(self.docker.env.environment)
        return given.get("MLFLOW_TRACKING_URI") or default

    def command(self, downloaded: Mapping[str, str]) -> str:
        """Return the command for bash.

        Args:
            downloaded: Name → local path of the parameters that had to be downloaded.
        """
        if not self.parameters.downloads:
            return self.provisional_command
        return render(self.entry_point, self.parameters, downloaded)


class Planner:
    """A maker of plans for one Fleet.

    Args:
        fetcher: The fetcher of the Fleet, so that one fetch serves all its runs.
        backend: Returns the Fleet's instance of a backend class, which need not be open.
        inherit_env: The variables of this process that commands inherit, for requests that do not say it.
    """

    def __init__(
        self,
        fetcher: ProjectFetcher,
        backend: Callable[[type[Backend]], Backend],
        inherit_env: bool | tuple[str, ...] = True,
    ) -> None:
        self._inherit_env = inherit_env
        self._fetcher = fetcher
        self._backend = backend
        self._specs: dict[Path, tuple[object, ProjectSpec]] = {}
        self._known_names: set[tuple[str, str | None]] = set()
        self._shared_plans: Coalescing[object, ProjectPlan] = Coalescing()
        self._throttle = Throttle()

    async def plan(
        self, request: RunRequest, *, like: ProjectPlan | None = None, on_progress: Callable[[str], None] | None = None
    ) -> Plan:
        """Fetch the project and check the whole request. Only the cache of projects may have changed afterwards.

        Args:
            request: The request.
            like: The plan of a request for the same project and entry point, so that many runs use one commit and are
                planned at no cost. Default: the project is fetched and read.
            on_progress: Called with each line of the fetching.

        Raises:
            MlfleetError: The request, the project or the parameters are wrong.
        """
        if like is None:
            # Hundreds of runs of one project may be submitted at the same time: their project is planned once.
            like = await self._shared_plans(_key(request), lambda: self._project_plan(request, on_progress))
            await self._throttle.wait()
        entry_point = like.entry_point
        if len(entry_point.command) > _LONG or any(
            parameter.type == "path" for parameter in entry_point.parameters.values()
        ):
            return await PROJECTS.run(lambda: self._plan(like, request))
        return self._plan(like, request)

    async def _project_plan(self, request: RunRequest, on_progress: Callable[[str], None] | None) -> ProjectPlan:
        # Check what needs no project first: a mistyped backend is reported without waiting for a clone.
        names = request.backend, request.env_manager
        if names not in self._known_names:
            await PROJECTS.run(lambda: _check_names(*names))
            self._known_names.add(names)
        shared = await PROJECTS.run(lambda: self._plan_fetched_project(request))
        if shared is not None:
            return shared
        project = await self._fetcher.fetch(request.uri, request.version, on_progress=on_progress)
        return await PROJECTS.run(lambda: self._plan_project(request, project))

    def _plan(self, shared: ProjectPlan, request: RunRequest) -> Plan:
        """Plan one run of a planned project. It blocks on ``path`` parameters and on long commands."""
        backend = self._backend(find(shared.backend))
        folder, entry_point = shared.spec.folder, shared.entry_point
        parameters = resolve(
            entry_point,
            request.parameters,
            lambda path, index: backend.place(path, index, folder),
            project_dir=folder,
        )
        return Plan(
            request=request,
            project=shared.project,
            spec=shared.spec,
            entry_point=entry_point,
            parameters=parameters,
            backend=shared.backend,
            config=shared.config,
            environment=shared.environment,
            docker=shared.docker,
            inherit_env=shared.inherit_env,
            tags=_tags(request, shared),
            provisional_command=render(entry_point, parameters, {each.name: each.uri for each in parameters.downloads}),
        )

    def _plan_fetched_project(self, request: RunRequest) -> ProjectPlan | None:
        """Plan a project that needs no fetching, in the same call of a thread; None if it must be fetched. Blocking."""
        project = self._fetcher.look(request.uri, request.version)
        return None if project is None else self._plan_project(request, project)

    def _plan_project(self, request: RunRequest, project: Project) -> ProjectPlan:
        spec = self._read(project)
        backend = self._backend(find(_backend_name(request, spec)))
        config = backend.configure(request.read_backend_config())
        entry_point = spec.entry_point(request.entry_point)
        environment = None
        docker = None
        inherit_env = self._inherit_env if request.inherit_env is None else read_inherit_env(request.inherit_env)
        if inherit_env is not True and not backend.hides_environment:
            raise UsageError(
                f"the backend {backend.name!r} decides itself which variables of this process its runs see: leave out"
                " inherit_env, or use another backend"
            )
        if spec.docker is not None:
            docker = DockerRequest(
                env=spec.docker,
                args=request.docker_args or {},
                build_image=request.build_image,
                auth=request.docker_auth,
                caller_variables=frozenset(request.env or ()),
                inherit_env=inherit_env,
            )
        backend.check(docker, spec.folder)
        if request.env:
            backend.check_variables(request.env.keys(), config)
        if docker is None and backend.needs_environment:
            name = choose_manager(request.env_manager, spec.environment)
            environment = create_manager(name).plan(spec.folder, spec.environment)
            environment = replace(environment, inherit_env=inherit_env)
        user_name()  # fill the cache here, in a thread: getuser() may read /etc/passwd
        return ProjectPlan(
            project=project,
            spec=spec,
            entry_point=entry_point,
            backend=backend.name,
            config=config,
            environment=environment,
            docker=docker,
            inherit_env=inherit_env,
        )

    def _read(self, project: Project) -> ProjectSpec:
        """Read the project's spec, or return the known one if nothing in the root of the folder has changed."""
        folder = project.folder
        signature = _signature(folder)
        known = self._specs.get(folder)
        if known is not None and signature is not None and known[0] == signature:
            return known[1]
        spec = read_project(folder, project.root)
        self._specs[folder] = (signature, spec)
        return spec


def _key(request: RunRequest) -> object:
    """Return a key that is equal for requests that share a `ProjectPlan`."""
    config = request.backend_config
    if request.docker_args or request.docker_auth or not (config is None or isinstance(config, str | os.PathLike)):
        return object()  # mappings need not be hashable: this request is planned by itself
    return (
        request.uri,
        request.version,
        request.entry_point,
        request.backend,
        config,
        request.env_manager,
        request.build_image,
        frozenset(request.env or ()),
        request.inherit_env,
    )


def _signature(folder: Path) -> object:
    """Return a value that changes with all that `read_project` reads: the names in the folder, and two of its files.

    None if that is not known (a link that leads nowhere, a folder that is gone): `read_project` says what is wrong.
    """
    try:
        stats = [folder.stat()]
        stats += [entry.stat() for entry in folder.iterdir() if entry.name.lower() in ("mlproject", "pyproject.toml")]
    except OSError:
        return None
    return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats]


def _check_names(backend: str, env_manager: str | None) -> None:
    find(backend)
    validate_manager(env_manager)


def _backend_name(request: RunRequest, spec: ProjectSpec) -> str:
    """Return the name of the backend to use. Some backends pass projects with ``docker_env`` to another one."""
    instead = find(request.backend).docker_backend if spec.docker is not None else None
    return instead or request.backend


def _tags(request: RunRequest, shared: ProjectPlan) -> dict[str, str]:
    """Return the tags that mlflow.projects.run sets (mlflow/utils/mlflow_tags.py), and those of the request."""
    project, environment = shared.project, shared.environment
    tags = {
        "mlflow.user": user_name(),
        "mlflow.source.name": project.source_name,
        "mlflow.source.type": "PROJECT",
        "mlflow.project.entryPoint": request.entry_point,
        "mlflow.project.backend": request.backend,
    }
    optional = {
        "mlflow.source.git.commit": project.commit,
        "mlflow.source.git.repoURL": project.repo_url,
        "mlflow.source.git.branch": project.branch,
        "mlflow.parentRunId": request.parent_run_id,
        "mlflow.project.env": _environment_tag(environment, shared.docker),
    }
    tags.update({name: value for name, value in optional.items() if value})
    tags.update({str(name): str(value) for name, value in (request.tags or {}).items()})
    if request.member is not None:
        tags.update(request.member.tags())
    return tags


def _environment_tag(environment: EnvironmentPlan | None, docker: DockerRequest | None) -> str | None:
    """Return the kind of environment that is made for the run; None for the caller's own, which mlflow does not tag."""
    if docker is not None:
        return "docker"
    return None if environment is None or environment.manager == "local" else environment.manager
