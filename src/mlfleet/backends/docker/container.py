"""From a job to the request that creates its container, and to the mounts by which it reaches tracking. Pure."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from mlfleet._hosts import has_loopback_host
from mlfleet.backends.base import Job
from mlfleet.backends.docker.image import Image
from mlfleet.backends.docker.run_options import ContainerOptions
from mlfleet.backends.docker.watch import DRIVER_LABEL, EXPERIMENT_LABEL, OUTPUT_LABEL, PROJECT_LABEL, RUN_LABEL
from mlfleet.errors import SubmitError

__all__ = ["TrackingMounts", "container_body", "tracking_mounts"]

# Programs whose only job is to be process 1; a second one above them would only complain.
_INITS = ("tini", "docker-init", "dumb-init", "catatonit", "init", "s6-svscan")
# The command is for bash, but not every image has one. $0 is the command, so that it stays one argument.
_SHELL = 'if command -v bash >/dev/null 2>&1; then exec bash -c "$0"; else exec sh -c "$0"; fi'


# The engine reads stdout and stderr each by itself. One file for both has their order and whole lines only if they are
# one stream inside already.
_ONE_STREAM = "exec 2>&1; "


TRACKING_FOLDER = "/mlflow/tmp/mlruns"
_URI = "MLFLOW_TRACKING_URI"

_S3 = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_PROFILE",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_S3_IGNORE_TLS",
    "MLFLOW_S3_UPLOAD_EXTRA_ARGS",
)
_AZURE = ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCESS_KEY")
_HDFS = ("MLFLOW_KERBEROS_TICKET_CACHE", "MLFLOW_KERBEROS_USER", "MLFLOW_PYARROW_EXTRA_CONF")


def container_body(
    job: Job, options: ContainerOptions, image: Image, mounts: TrackingMounts, *, driver: str = ""
) -> dict[str, Any]:
    """Return the body of the request that creates the container.

    Of several settings of one variable, the caller's docker_args win over the caller's env, that over docker_env, and
    that over mlfleet's own.

    Args:
        job: The job.
        options: The flags of ``docker run``.
        image: The image.
        mounts: The mounts and variables by which the container reaches tracking.
        driver: The label that names the ownership lock.
    """
    docker = job.docker
    assert docker is not None  # noqa: S101 - checked when the run was planned
    config, host = dict(options.config), dict(options.host)
    environ = {**job.environ, **mounts.environ, **job.secrets}
    environ |= {
        name: value
        for name, value in docker.env.environment
        if value is not None and name not in docker.caller_variables
    }
    environ |= options.environ
    init = host.get("Init", not _is_init(image))
    host["Init"] = init
    if init:
        # tini passes signals to the group of its child then: a shell in front of the program does not keep them.
        environ.setdefault("TINI_KILL_PROCESS_GROUP", "1")
    host["Binds"] = _binds(job, [*mounts.binds, *host.get("Binds", ())])
    _limit(host, job)
    if mounts.host_network:
        host.setdefault("NetworkMode", "host")
    if options.endpoint:
        config["NetworkingConfig"] = {"EndpointsConfig": {options.host.get("NetworkMode", "default"): options.endpoint}}
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
    """Return `binds`, and the files of the command's parameters at their own paths where these are free."""
    taken = {bind.split(":")[1] for bind in binds}
    return [*binds, *(f"{path}:{path}" for path in dict.fromkeys(map(str, job.paths)) if path not in taken)]


def _limit(host: dict[str, Any], job: Job) -> None:
    """Set the run's resources as limits, where docker_args set none."""
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


# ---- tracking and artifacts ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class TrackingMounts:
    """The mounts and variables by which a container reaches the tracking store and the artifacts of its run.

    Attributes:
        binds: Folders and files of this machine, as ``source:target[:ro]``.
        folders: The folders among them that must be made first.
        environ: Variables that replace those of the run.
        host_network: True if the container must share the network of this machine.
    """

    binds: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=dict)
    host_network: bool = False


def tracking_mounts(
    environ: Mapping[str, str],
    artifact_uri: str,
    *,
    paths: Sequence[Path] = (),
    here: Mapping[str, str],
    home: Path,
    engine: str,
    local: bool,
) -> TrackingMounts:
    """Return what makes the tracking store and the artifacts reachable from a container.

    Args:
        environ: The variables of the run.
        artifact_uri: The place of the run's artifacts; empty if unknown.
        paths: The files of this machine that the command's parameters name.
        here: The variables of this process, whose credentials for the artifacts are passed on.
        home: The home folder of this user.
        engine: The engine's address, for the error.
        local: True if the engine is on this machine.

    Raises:
        SubmitError: A store, file or server is on this machine, and the engine is not.
    """
    mounts = TrackingMounts()
    uri = environ.get(_URI, "")
    store = _local_store(uri)
    if store is not None:
        _check_local(f"the tracking store {uri}", engine, local=local)
        folder, inside = store
        mounts.folders.append(folder)
        mounts.binds.append(f"{folder}:{TRACKING_FOLDER}")
        mounts.environ[_URI] = inside
    for path in paths:
        _check_local(f"the parameter's file {path}", engine, local=local)
    artifacts = _local_folder(artifact_uri)
    if artifacts is not None:
        _check_local(f"the artifact folder {artifact_uri}", engine, local=local)
        mounts.folders.append(artifacts)
        mounts.binds.append(f"{artifacts}:{artifacts}")
    _forward(mounts, urlsplit(artifact_uri).scheme, here, home)
    urls = [uri if store is None else "", mounts.environ.get("MLFLOW_S3_ENDPOINT_URL", "")]
    mounts.host_network = any(has_loopback_host(url) for url in urls)
    if mounts.host_network:
        _check_local(f"the server {next(url for url in urls if has_loopback_host(url))}", engine, local=local)
    return mounts


def _local_store(uri: str) -> tuple[Path, str] | None:
    """Return the folder of a local store, and the store's URI where that folder is mounted."""
    parts = urlsplit(uri)
    if parts.scheme.startswith("sqlite") and not parts.netloc:
        # The folder, not only the file: sqlite keeps its journal beside it, and without that a run that is killed in
        # the middle of a write would leave a broken database.
        path = Path(uri.partition(":///")[2].partition("?")[0])
        query = f"?{parts.query}" if parts.query else ""
        return path.parent, f"{parts.scheme}:///{posixpath.join(TRACKING_FOLDER, path.name)}{query}"
    folder = _local_folder(uri)
    return None if folder is None else (folder, f"file://{TRACKING_FOLDER}")


def _local_folder(uri: str) -> Path | None:
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(uri) if uri.startswith("/") else None


def _forward(mounts: TrackingMounts, scheme: str, here: Mapping[str, str], home: Path) -> None:
    """Pass on the credentials for the run's kind of artifact store, and no others."""
    names: tuple[str, ...] = ()
    match scheme:
        case "s3":
            names = _S3
            if (home / ".aws").is_dir():
                # The reference mounts it at /.aws, where only a user without a home finds it.
                mounts.binds.append(f"{home / '.aws'}:/.aws:ro")
                mounts.environ["AWS_SHARED_CREDENTIALS_FILE"] = "/.aws/credentials"
                mounts.environ["AWS_CONFIG_FILE"] = "/.aws/config"
        case "wasb" | "wasbs" | "abfs" | "abfss":
            names = _AZURE
        case "gs":
            path = here.get("GOOGLE_APPLICATION_CREDENTIALS")
            if path:
                mounts.binds.append(f"{Path(path).expanduser().absolute()}:/.gcs:ro")
                mounts.environ["GOOGLE_APPLICATION_CREDENTIALS"] = "/.gcs"
        case "hdfs" | "viewfs":
            names = _HDFS
            cache = here.get("MLFLOW_KERBEROS_TICKET_CACHE")
            if cache:
                mounts.binds.append(f"{cache}:{cache}:ro")
    mounts.environ.update({name: here[name] for name in names if name in here})


def _check_local(what: str, engine: str, *, local: bool) -> None:
    if not local:
        text = (
            f"{what} is on this machine, and the Docker engine at {engine} may not be: a container there cannot reach"
            " it. Use a tracking server that it can reach"
        )
        raise SubmitError(text, backend="docker")
