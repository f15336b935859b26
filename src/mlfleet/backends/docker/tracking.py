"""How code in a container reaches the tracking store and the artifacts of its run."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlfleet._hosts import has_loopback_host
from mlfleet.errors import SubmitError

__all__ = ["Reach", "reach"]

TRACKING_FOLDER = "/mlflow/tmp/mlruns"
_URI = "MLFLOW_TRACKING_URI"
_log = logging.getLogger("mlfleet.docker")

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


@dataclass(slots=True)
class Reach:
    """What a container needs.

    Attributes:
        binds: folders and files of this machine, as ``source:target[:ro]``.
        folders: of those, the ones to make first.
        environ: variables, in place of what they were.
        host_network: whether it must share the network of this machine.
    """

    binds: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=dict)
    host_network: bool = False


def reach(
    environ: Mapping[str, str],
    artifact_uri: str,
    *,
    paths: Sequence[Path] = (),
    here: Mapping[str, str],
    home: Path,
    engine: str,
    local: bool,
) -> Reach:
    """What makes the tracking store and the artifacts reachable from a container.

    Args:
        environ: the variables of the run.
        artifact_uri: of the run; empty if it is not known.
        paths: what the command's parameters name on this machine.
        here: the variables of this process, whose credentials for the artifacts go along.
        home: of this user.
        engine: where it is, for the error.
        local: whether the engine is on this machine.

    Raises:
        SubmitError: something is on this machine, and the engine is not.
    """
    made = Reach()
    uri = environ.get(_URI, "")
    store = _local_store(uri)
    if store is not None:
        _check_local(f"the tracking store {uri}", engine, local=local)
        folder, inside = store
        made.folders.append(folder)
        made.binds.append(f"{folder}:{TRACKING_FOLDER}")
        made.environ[_URI] = inside
    for path in paths:
        _check_local(f"the parameter's file {path}", engine, local=local)
    artifacts = _local_folder(artifact_uri)
    if artifacts is not None:
        _check_local(f"the artifact folder {artifact_uri}", engine, local=local)
        made.folders.append(artifacts)
        made.binds.append(f"{artifacts}:{artifacts}")
    _forward(made, urlsplit(artifact_uri).scheme, here, home)
    urls = [uri if store is None else "", made.environ.get("MLFLOW_S3_ENDPOINT_URL", "")]
    made.host_network = any(has_loopback_host(url) for url in urls)
    if made.host_network:
        _check_local(f"the server {next(url for url in urls if has_loopback_host(url))}", engine, local=local)
    return made


def _local_store(uri: str) -> tuple[Path, str] | None:
    """The folder of a local store, and the store's URI where that folder is mounted."""
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


def _forward(made: Reach, scheme: str, here: Mapping[str, str], home: Path) -> None:
    """Credentials for the kind of artifact store that the run has, and no others."""
    names: tuple[str, ...] = ()
    match scheme:
        case "s3":
            names = _S3
            if (home / ".aws").is_dir():
                # The reference mounts it at /.aws, where only a user without a home finds it.
                made.binds.append(f"{home / '.aws'}:/.aws:ro")
                made.environ["AWS_SHARED_CREDENTIALS_FILE"] = "/.aws/credentials"
                made.environ["AWS_CONFIG_FILE"] = "/.aws/config"
        case "wasb" | "wasbs" | "abfs" | "abfss":
            names = _AZURE
        case "gs":
            path = here.get("GOOGLE_APPLICATION_CREDENTIALS")
            if path:
                made.binds.append(f"{Path(path).expanduser().absolute()}:/.gcs:ro")
                made.environ["GOOGLE_APPLICATION_CREDENTIALS"] = "/.gcs"
        case "hdfs" | "viewfs":
            names = _HDFS
            cache = here.get("MLFLOW_KERBEROS_TICKET_CACHE")
            if cache:
                made.binds.append(f"{cache}:{cache}:ro")
    made.environ.update({name: here[name] for name in names if name in here})


def _check_local(what: str, engine: str, *, local: bool) -> None:
    if not local:
        text = (
            f"{what} is on this machine, and the Docker engine at {engine} may not be: a container there cannot reach"
            " it. Use a tracking server that it can reach"
        )
        raise SubmitError(text, backend="docker")
