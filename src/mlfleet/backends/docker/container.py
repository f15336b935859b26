"""From a job to the body of the request that creates its container. Pure."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from mlfleet.backends.base import Job
from mlfleet.backends.docker.image import Image
from mlfleet.backends.docker.run_options import ContainerOptions
from mlfleet.backends.docker.tracking import Reach
from mlfleet.backends.docker.watch import DRIVER_LABEL, EXPERIMENT_LABEL, OUTPUT_LABEL, PROJECT_LABEL, RUN_LABEL

__all__ = ["container_body", "container_name"]

# Programs whose only job is to be process 1; a second one above them would only complain.
_INITS = ("tini", "docker-init", "dumb-init", "catatonit", "init", "s6-svscan")
# The command is for bash, but not every image has one. $0 is the command, so that it stays one argument.
_SHELL = 'if command -v bash >/dev/null 2>&1; then exec bash -c "$0"; else exec sh -c "$0"; fi'


# The engine reads stdout and stderr each by itself. One file for both has their order and whole lines only if they are
# one stream inside already.
_ONE_STREAM = "exec 2>&1; "


def container_name(run_id: str, options: ContainerOptions) -> str:
    """The name of the container of a run."""
    return options.name or f"mlfleet-{run_id}"


def container_body(
    job: Job, options: ContainerOptions, image: Image, reach: Reach, *, driver: str = ""
) -> dict[str, Any]:
    """What the engine is asked to create.

    Of several settings of one variable, the caller's docker_args win over docker_env, and that over mlfleet's own.
    """
    docker = job.docker
    assert docker is not None  # noqa: S101 - checked when the run was planned
    config, host = dict(options.config), dict(options.host)
    environ = {**job.environ, **reach.environ, **job.secrets}
    environ |= {name: value for name, value in docker.env.environment if value is not None}
    environ |= options.environ
    init = host.get("Init", not _is_init(image))
    host["Init"] = init
    if init:
        # tini passes signals to the group of its child then: a shell in front of the program does not keep them.
        environ.setdefault("TINI_KILL_PROCESS_GROUP", "1")
    host["Binds"] = _binds(job, [*reach.binds, *host.get("Binds", ())])
    _limit(host, job)
    if reach.host_network:
        host.setdefault("NetworkMode", "host")
    if options.endpoint:
        config["NetworkingConfig"] = {"EndpointsConfig": {options.network or "default": options.endpoint}}
    labels = {
        RUN_LABEL: job.run_id,
        PROJECT_LABEL: job.project_name,
        EXPERIMENT_LABEL: job.experiment_id,
        DRIVER_LABEL: driver,
    }
    if job.output is not None:
        labels[OUTPUT_LABEL] = str(job.output)
    return {
        **config,
        "Image": image.uri,
        "Cmd": ["sh", "-c", _SHELL if job.output is None else _ONE_STREAM + _SHELL, job.command],
        "Env": [f"{name}={value}" for name, value in environ.items()],
        "Labels": {**config.get("Labels", {}), **labels},
        "AttachStdin": False,
        "OpenStdin": False,
        "HostConfig": host,
    }


def _binds(job: Job, binds: list[str]) -> list[str]:
    """`binds`, and what the command's parameters name, under the same path, unless something else is mounted there."""
    taken = {bind.split(":")[1] for bind in binds}
    return [*binds, *(f"{path}:{path}" for path in dict.fromkeys(map(str, job.paths)) if path not in taken)]


def _limit(host: dict[str, Any], job: Job) -> None:
    """The run's resources as limits, where docker_args set none."""
    resources = job.resources
    if resources is None:
        return
    if resources.cpus and not {"NanoCpus", "CpuQuota"} & host.keys():
        host["NanoCpus"] = round(resources.cpus * 1e9)
    if resources.memory_bytes:
        host.setdefault("Memory", resources.memory_bytes)
    if resources.gpus:
        host.setdefault("DeviceRequests", [{"Driver": "", "Count": resources.gpus, "Capabilities": [["gpu"]]}])


def _is_init(image: Image) -> bool:
    return bool(image.entrypoint) and PurePosixPath(image.entrypoint[0]).name in _INITS
