"""The Docker backend: from a job to a running container, and from a reference back to its handle."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.threads import FILES
from mlfleet._oci import login
from mlfleet._paths import run_folder
from mlfleet._process.reattach import machine
from mlfleet._run_log import get_logger
from mlfleet.backends._remote.backend import RemoteBackend
from mlfleet.backends.base import DRIVER_DIED, BackendRun, DockerRequest, Job, ListedRun, Presence
from mlfleet.backends.docker.client import Endpoint, Engine, EngineError
from mlfleet.backends.docker.container import TrackingMounts, container_body, tracking_mounts
from mlfleet.backends.docker.image import Image, Images, check_reference
from mlfleet.backends.docker.output import ContainerLock
from mlfleet.backends.docker.run import Container, DockerRun
from mlfleet.backends.docker.run_options import ContainerOptions, parse_arguments
from mlfleet.backends.docker.values import FlagValueError, add_volume
from mlfleet.backends.docker.watch import (
    DRIVER_LABEL,
    OUTPUT_LABEL,
    RUN_LABEL,
    ContainerWatch,
    list_containers,
    prune_containers,
    remove_container,
)
from mlfleet.errors import RunLost, SubmitError, UsageError
from mlfleet.runs import JobRef, RunStatus

__all__ = ["DockerBackend"]

_log = get_logger("mlfleet.docker")

_AT_ONCE = 16  # containers that are created and started at the same time; more only wait inside the engine
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")  # as the engine allows (moby/moby daemon/names)
_GRACE = 60.0  # seconds to take back a container whose submission is cancelled


class DockerBackend(RemoteBackend[None]):
    """Runs jobs in containers of one engine: that of ``DOCKER_HOST``, ``DOCKER_CONTEXT`` or Docker's current context.

    Leaving the backend ends the containers that it submitted, and leaves those that it attached to alone.

    Args:
        end_patience: Seconds for the engine's answer to a request to stop a container. After that its run counts as
            lost: it may still run.
    """

    name: ClassVar[str] = "docker"
    needs_login: ClassVar[bool] = False

    def __init__(self, *, end_patience: float = 60.0) -> None:
        super().__init__()
        self._end_patience = end_patience
        self._engine = Engine()
        self._images = Images(self._engine)
        self._watch = ContainerWatch(self._engine)
        self._missing: set[str] = set()
        self._starting = anyio.CapacityLimiter(_AT_ONCE)

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self._engine.locate()
        await self._stack.enter_async_context(self._engine)
        await self._stack.enter_async_context(self._watch)
        return self

    def check(self, docker: DockerRequest | None, folder: Path) -> None:
        """Check image, flags, volumes, variables and credentials; see `Backend.check`."""
        if docker is None:
            raise UsageError(
                "the backend 'docker' runs projects whose MLproject has a docker_env with an image; this one has none"
            )
        check_reference(docker.env.image)
        login.check_auth(docker.auth)
        _options(docker, folder)

    def reference(self, job: Job) -> JobRef:
        """Return the engine's address and the container's name."""
        endpoint = self._engine.endpoint
        url = endpoint.url if endpoint is not None else ""
        data = {"engine": url, "container": _name(job), "host": machine()}
        return JobRef(self.name, job.run_id, data)

    async def submit(self, job: Job) -> DockerRun:
        """Pull or build the image if necessary, and start the job's container.

        Raises:
            SubmitError: There is no image, or the engine does not create or start the container; nothing is left.
            EngineError: There is no engine, or no permission to use it.
        """
        docker = job.docker
        if docker is None:
            raise SubmitError("the job brings no docker_env", backend=self.name)
        endpoint = await self._engine.locate()
        prepared = await FILES.run(partial(_prepare, job, docker, endpoint))
        for source in prepared.missing:
            if source not in self._missing:
                self._missing.add(source)
                _log.warning("the source %s of a volume does not exist: the engine makes an empty folder", source)
        image = await self._images.base(
            docker.env.image,
            pull=prepared.options.pull,
            platform=prepared.options.platform,
            credentials=docker.auth,
            on_progress=job.on_progress,
        )
        if docker.build_image:
            image = await self._images.built(
                image, job.project_dir, project=job.project_name, on_progress=job.on_progress
            )
        return await self._launch(job, prepared, image)

    def tags(self, run: BackendRun) -> Mapping[str, str]:
        """Return the tags that name the image."""
        return run.tags if isinstance(run, DockerRun) else {}

    async def attach(self, ref: JobRef) -> DockerRun:
        """Return the handle of a container that an earlier process submitted.

        If that process is gone, this one copies the output from its beginning and removes the container at its end.
        Where the engine rotates logs, what was copied before is kept.

        Raises:
            RunLost: The container does not exist any more.
            EngineError: The engine cannot be reached.
        """
        name = str(ref.data.get("container") or f"mlfleet-{ref.run_id}")
        if not _NAME.fullmatch(name):  # it becomes a part of the request's path
            text = f"the tag {JobRef.TAG} of the run {ref.run_id} names no container, but {name!r}"
            raise RunLost(text, backend=self.name)
        try:
            found = await self._engine.call(
                "asked for a container", lambda docker: docker.containers.container(name).show()
            )
        except EngineError as error:
            if error.status != 404:
                raise
            text = f"the container {name} of the run {ref.run_id} is not on the engine (any more)"
            there, here = ref.data.get("engine"), (await self._engine.locate()).url
            if there and there != here:
                text += f"; it was started by that at {there}, and this one is at {here}: set DOCKER_HOST"
            raise RunLost(text, backend=self.name) from error
        config = found["Config"]
        labels: Mapping[str, str] = config.get("Labels") or {}
        if labels.get(RUN_LABEL) != ref.run_id:
            raise RunLost(f"the container {name} is not that of the run {ref.run_id}", backend=self.name)
        # From the container and not from the reference: those who may write tags must not choose a file to write to.
        output = labels.get(OUTPUT_LABEL)
        container = Container(
            id=str(found["Id"]),
            name=name,
            run_id=ref.run_id,
            tty=bool(config.get("Tty")),
            memory=int(found["HostConfig"].get("Memory") or 0),
            output=Path(output) if output else run_folder(ref.run_id) / "output.log",
            stop_signal=str(config.get("StopSignal") or "SIGTERM"),
            rotates=_rotates(found["HostConfig"].get("LogConfig") or {}),
        )
        lock = ContainerLock.from_label(labels.get(DRIVER_LABEL, ""), ref.run_id)
        await FILES.run(partial(_acquire, lock), undo=lambda _: FILES.run(lock.release))
        state: Mapping[str, Any] = found.get("State") or {}
        if state.get("Status") == "created" and lock.is_held:
            try:
                await remove_container(self._engine, container.id)
            finally:
                await FILES.finish(lock.release)
            raise RunLost(f"the container {name} was never started: {DRIVER_DIED}", backend=self.name)
        ended_as = None
        if state.get("Status") in ("exited", "dead"):
            ended_as = RunStatus.FAILED if state.get("ExitCode") else RunStatus.FINISHED
        return self._supervise(container, lock, submitted=False, ended_as=ended_as)

    async def list_runs(self) -> Sequence[ListedRun]:
        """Return the runs whose container the engine has; see `Backend.list_runs`."""
        return await list_containers(self._engine)

    async def prune(
        self, run_ids: Collection[str] = (), *, running: bool = False, dry_run: bool = False
    ) -> Sequence[ListedRun]:
        """Remove the containers that no process of this machine looks after; see `Backend.prune`."""
        return await prune_containers(self._engine, run_ids, running=running, dry_run=dry_run)

    async def is_abandoned(self, ref: JobRef) -> bool:
        """Return True if the run's container has ended and no process looks after it."""
        found = await list_containers(self._engine, ref.run_id)
        return bool(found) and not found[0].supervised and found[0].state in ("created", "exited", "dead")

    async def presence(self, ref: JobRef) -> Presence | None:
        """Return the state of the run's container; None if it may be on the engine of another machine."""
        is_from_here = ref.data.get("host") == machine()
        found = await list_containers(self._engine, ref.run_id)
        if found:
            if is_from_here and found[0].supervised:
                return Presence.ACTIVE  # a process of this machine copies its output, and will remove it
            if found[0].state == "created" and not found[0].supervised:
                return Presence.MISSING  # `attach` removes it
            return Presence.ENDED if found[0].state in ("exited", "dead") else Presence.ACTIVE
        here = (await self._engine.locate()).url
        return Presence.MISSING if is_from_here and ref.data.get("engine") == here else None

    # ---- one container ----------------------------------------------------------------------------------------------

    async def _launch(self, job: Job, prepared: _Prepared, image: Image) -> DockerRun:
        options = prepared.options
        name = _name(job)
        lock = ContainerLock.of_run(job.run_id)
        made: list[str] = []
        body: dict[str, Any] = {}

        async def create() -> None:
            params = {"name": name} if options.platform is None else {"name": name, "platform": options.platform}
            answer = await self._engine.call(
                "asked to create a container",
                # Not containers.create, which knows no platform.
                lambda docker: docker._query_json("containers/create", "POST", params=params, data=body),
            )
            made.append(str(answer["Id"]))

        async def start() -> None:
            await self._engine.call(
                "asked to start a container", lambda docker: docker.containers.container(made[0]).start()
            )

        run: DockerRun | None = None
        try:
            async with self._starting:
                # Wait for the answer although this call is cancelled: otherwise the container, if any, is unknown.
                await FILES.run(partial(_acquire, lock))
                body = container_body(job, options, image, prepared.mounts, driver=lock.label)
                if not lock.is_held:
                    text = f"another process of this machine looks after a container of the run {job.run_id}"
                    raise SubmitError(text, backend=self.name)
                await complete(create, limit=_GRACE)
                run = self._supervise(_container(made[0], name, job, body, image), lock, submitted=True)
                await run.attached()
                await complete(start, limit=_GRACE)
            return run
        except BaseException as error:
            await complete(partial(self._take_back, run, lock, made), restart=True)
            if isinstance(error, EngineError) and not error.unreachable:
                raise SubmitError(_refusal(name, image, error), backend=self.name) from error
            raise

    async def _take_back(self, run: DockerRun | None, lock: ContainerLock, containers: Sequence[str]) -> None:
        with anyio.move_on_after(_GRACE):
            if run is None:
                await FILES.run(lock.release)
            else:
                run.detach()
                await run.outcome()
            for container in containers:
                await remove_container(self._engine, container)

    def _supervise(
        self, container: Container, lock: ContainerLock, *, submitted: bool, ended_as: RunStatus | None = None
    ) -> DockerRun:
        run = DockerRun(
            container,
            self._engine,
            self._watch,
            lock,
            submitted=submitted,
            patience=self._end_patience,
            ended_as=ended_as,
        )
        self._runs.start(run, name=f"mlfleet container {container.name}")
        return run


@dataclass(frozen=True, slots=True)
class _Prepared:
    options: ContainerOptions
    mounts: TrackingMounts
    missing: tuple[str, ...]
    """The sources of volumes that should be on this machine and are not."""


def _prepare(job: Job, docker: DockerRequest, engine: Endpoint) -> _Prepared:
    """Read and make the files of this machine that the container needs. Blocking."""
    options = _options(docker, job.project_dir)
    environ = {**job.environ, **job.secrets}
    mounts = tracking_mounts(
        environ,
        job.artifact_uri,
        paths=job.paths,
        here=job.inherited(),
        home=Path.home(),
        engine=engine.url,
        local=engine.local,
    )
    for folder in mounts.folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"the folder {folder} cannot be made for the container: {error.strerror}"
            raise SubmitError(text, backend="docker") from error
    sources = [bind.partition(":")[0] for bind in options.host.get("Binds", ())] if engine.local else []
    missing = tuple(source for source in sources if source.startswith("/") and not os.path.lexists(source))
    return _Prepared(options, mounts, missing)


def _options(docker: DockerRequest, folder: Path) -> ContainerOptions:
    """Return the flags, with the volumes and variables of docker_env. Blocking where a flag names a file.

    Raises:
        UsageError: A flag or a volume is wrong, or a variable that is to be copied is not set.
    """
    options = parse_arguments(docker.args, environ=dict(os.environ), folder=folder)
    environ = docker.inherited()
    for volume in docker.env.volumes:
        try:
            add_volume(options.config, options.host, volume, environ=environ, folder=folder)
        except FlagValueError as error:
            raise UsageError(f"docker_env: volumes: {error}") from error
    copied = [name for name, value in docker.env.environment if value is None]
    copied = [name for name in copied if name not in docker.caller_variables]
    missing = [name for name in copied if name not in environ and name not in options.environ]
    if missing:
        raise UsageError(docker.not_set(missing))
    options.environ = {**{name: environ[name] for name in copied if name in environ}, **options.environ}
    return options


def _name(job: Job) -> str:
    """Return the name of the job's container: that of docker_args, if they hold one."""
    args: Mapping[str, Any] = job.docker.args if job.docker is not None else {}
    named = {key: value for key, value in args.items() if str(key).lstrip("-") == "name"}
    return parse_arguments(named, environ={}, folder=job.project_dir).name or f"mlfleet-{job.run_id}"


def _container(container_id: str, name: str, job: Job, body: Mapping[str, Any], image: Image) -> Container:
    return Container(
        id=container_id,
        name=name,
        run_id=job.run_id,
        tty=bool(body.get("Tty")),
        memory=int(body["HostConfig"].get("Memory") or 0),
        output=job.output,
        grace=job.cancel_grace,
        tags={"mlflow.docker.image.uri": image.uri, "mlflow.docker.image.id": image.id},
        stop_signal=str(body.get("StopSignal") or image.stop_signal or "SIGTERM"),
    )


def _acquire(lock: ContainerLock) -> None:
    try:
        lock.acquire()
    except OSError as error:
        text = f"the lock of the container cannot be written to {error.filename}: {error.strerror}"
        raise SubmitError(text, backend="docker") from error


def _rotates(log: Mapping[str, Any]) -> bool:
    """Return True if a log driver may discard the older part of a log."""
    # https://docs.docker.com/engine/logging/drivers/local/
    return log.get("Type") == "local" or "max-size" in (log.get("Config") or {})


def _refusal(name: str, image: Image, error: EngineError) -> str:
    message = error.message
    if error.status == 409 and "already in use" in message:
        return (
            f"there is a container {name} already: another process may look after it. Attach to its run, or remove it"
            " with 'mlfleet prune'"
        )
    if "docker-init" in message:
        return f"the engine has no docker-init: {message}. Give docker_args={{'init': False}}"
    if '"sh": executable file not found' in message:
        return f"the image {image.uri} has no shell (sh), which the project's command needs"
    if "could not select device driver" in message:
        return f"the engine cannot give GPUs to containers: {message}. Install the vendor's container toolkit there"
    return f"the engine does not run the container of the image {image.uri}: {message}"
