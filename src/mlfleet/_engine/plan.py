"""From a request to a plan: all that can be known, and all that can be wrong, before anything exists elsewhere."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from mlfleet._concurrency.single_flight import Coalescing
from mlfleet._concurrency.threads import PROJECTS
from mlfleet._concurrency.throttle import Throttle
from mlfleet._engine.request import RunRequest
from mlfleet._environments.manager import EnvironmentPlan, choose_manager, create_manager, validate_manager
from mlfleet._project.command import render
from mlfleet._project.fetch import Project, ProjectFetcher
from mlfleet._project.parameters import ResolvedParameters, resolve
from mlfleet._project.spec import EntryPoint, ProjectSpec, read_project
from mlfleet.backends.base import Backend, DockerRequest
from mlfleet.backends.registry import find

__all__ = ["Plan", "Planner", "ProjectPlan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectPlan:
    """What plans that differ in nothing but parameters, tags and their place have in common.

    Attributes:
        project: where its code is.
        spec: what the project says of itself.
        entry_point: what is to be run.
        backend: the name of the backend that will run it; a local project with ``docker_env`` runs on ``docker``.
        config: what that backend made of ``backend_config``.
        environment: what to build on this machine; None where the backend brings its own.
        docker: what a project with ``docker_env`` asks for.
    """

    project: Project
    spec: ProjectSpec
    entry_point: EntryPoint
    backend: str
    config: object = None
    environment: EnvironmentPlan | None = None
    docker: DockerRequest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(ProjectPlan):
    """A run that can be made.

    Attributes:
        request: what was asked for.
        parameters: resolved for it.
        tags: of the MLflow run.
        provisional_command: the command, with the URIs of the parameters that must be downloaded.
    """

    request: RunRequest
    parameters: ResolvedParameters
    tags: Mapping[str, str] = field(default_factory=dict)
    provisional_command: str = ""

    @property
    def project_name(self) -> str:
        """As MLproject says, or the folder's name."""
        return self.spec.name or self.spec.folder.name

    def command(self, downloaded: Mapping[str, str]) -> str:
        """The command for bash.

        Args:
            downloaded: the local paths of the parameters that must be downloaded.
        """
        if not self.parameters.downloads:
            return self.provisional_command
        return render(self.entry_point, self.parameters, downloaded)


class Planner:
    """Makes plans for one Fleet.

    Args:
        fetcher: of the Fleet, so that one fetch serves all its runs.
        backend: gives the Fleet's instance of a backend class, not yet opened.
    """

    def __init__(self, fetcher: ProjectFetcher, backend: Callable[[type[Backend]], Backend]) -> None:
        self._fetcher = fetcher
        self._backend = backend
        self._specs: dict[Path, tuple[object, ProjectSpec]] = {}
        self._known_names: set[tuple[str, str | None]] = set()
        self._shared_plans: Coalescing[object, ProjectPlan] = Coalescing()
        self._throttle = Throttle()

    async def plan(
        self, request: RunRequest, *, like: ProjectPlan | None = None, on_progress: Callable[[str], None] | None = None
    ) -> Plan:
        """Fetch and check all that `request` names. Nothing is left behind but the cache of projects.

        Args:
            request: what is asked for.
            like: of a request that differs in nothing but parameters, tags and its place: so that many runs are of one
                commit, and are planned at no cost.
            on_progress: is called with lines of the fetching.

        Raises:
            MlfleetError: the mistake, whatever it is.
        """
        if like is None:
            # Hundreds of runs of one project that are asked for at the same time are looked at together.
            like = await self._shared_plans(_key(request), lambda: self._project_plan(request, on_progress))
            await self._throttle.wait()
        if any(parameter.type == "path" for parameter in like.entry_point.parameters.values()):
            return await PROJECTS.run(lambda: self._plan(like, request))
        return self._plan(like, request)

    async def _project_plan(self, request: RunRequest, on_progress: Callable[[str], None] | None) -> ProjectPlan:
        # What needs no project comes first: nobody wants to wait for a clone to hear of a mistyped backend.
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
        """Blocking only if there are parameters of the type ``path``."""
        backend = self._backend(find(shared.backend))
        parameters = _parameters(shared.entry_point, request, backend, shared.spec.folder)
        return Plan(
            request=request,
            project=shared.project,
            spec=shared.spec,
            entry_point=shared.entry_point,
            parameters=parameters,
            backend=shared.backend,
            config=shared.config,
            environment=shared.environment,
            docker=shared.docker,
            tags=_tags(request, shared),
            provisional_command=_provisional_command(shared.entry_point, parameters),
        )

    def _plan_fetched_project(self, request: RunRequest) -> ProjectPlan | None:
        """If nothing need be fetched: one turn in a thread rather than two."""
        project = self._fetcher.look(request.uri, request.version)
        return None if project is None else self._plan_project(request, project)

    def _plan_project(self, request: RunRequest, project: Project) -> ProjectPlan:
        spec = self._read(project.folder)
        backend = self._backend(find(_backend_name(request, spec)))
        config = backend.configure(request.read_backend_config())
        entry_point = spec.entry_point(request.entry_point)
        environment = None
        docker = None
        if spec.docker is not None:
            docker = DockerRequest(
                env=spec.docker,
                args=request.docker_args or {},
                build_image=request.build_image,
                auth=request.docker_auth,
            )
        backend.check(docker, spec.folder)
        if docker is None and backend.needs_environment:
            name = choose_manager(request.env_manager, spec.environment)
            environment = create_manager(name).plan(spec.folder, spec.environment)
        _user()  # which may have to read files: the event loop shall find it known
        return ProjectPlan(
            project=project,
            spec=spec,
            entry_point=entry_point,
            backend=backend.name,
            config=config,
            environment=environment,
            docker=docker,
        )

    def _read(self, folder: Path) -> ProjectSpec:
        """The project's spec, read again only when something in the folder's root has changed."""
        signature = _signature(folder)
        known = self._specs.get(folder)
        if known is not None and known[0] == signature:
            return known[1]
        spec = read_project(folder)
        self._specs[folder] = (signature, spec)
        return spec


def _key(request: RunRequest) -> object:
    """Return a key that is equal for requests that share a `ProjectPlan`."""
    config = request.backend_config
    if request.docker_args or request.docker_auth or not (config is None or isinstance(config, str | os.PathLike)):
        return object()  # it could hold anything: this one is planned by itself
    return (
        request.uri,
        request.version,
        request.entry_point,
        request.backend,
        config,
        request.env_manager,
        request.build_image,
    )


def _parameters(entry_point: EntryPoint, request: RunRequest, backend: Backend, folder: Path) -> ResolvedParameters:
    return resolve(
        entry_point,
        request.parameters,
        lambda path, index: backend.place(path, index, folder),
        project_dir=folder,
    )


def _provisional_command(entry_point: EntryPoint, parameters: ResolvedParameters) -> str:
    return render(entry_point, parameters, {each.name: each.uri for each in parameters.downloads})


def _signature(folder: Path) -> object:
    """Changes whenever what `read_project` looks at changes: the folder's names, and the files that it may read."""
    stats = [folder.stat()]
    stats += [entry.stat() for entry in folder.iterdir() if entry.name.lower() == "mlproject"]
    return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats]


def _check_names(backend: str, env_manager: str | None) -> None:
    find(backend)
    validate_manager(env_manager)


def _backend_name(request: RunRequest, spec: ProjectSpec) -> str:
    """Return the backend to use: some run projects with ``docker_env`` by another one."""
    instead = find(request.backend).docker_backend if spec.docker is not None else None
    return instead or request.backend


def _tags(request: RunRequest, shared: ProjectPlan) -> dict[str, str]:
    """The tags that the reference sets (mlflow/utils/mlflow_tags.py), and the caller's."""
    project, environment = shared.project, shared.environment
    tags = {
        "mlflow.user": _user(),
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
    """What was made for the run; the reference has no word for the caller's own environment."""
    if docker is not None:
        return "docker"
    return None if environment is None or environment.manager == "local" else environment.manager


@cache
def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # no such user in this container
        return "unknown"
