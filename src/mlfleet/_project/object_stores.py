"""Files and whole prefixes of object stores, through fsspec and the driver of each store."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import anyio

from mlfleet._concurrency.threads import PROJECTS
from mlfleet._project.blocking import Stopped, stoppable
from mlfleet._project.parameters import Download
from mlfleet.errors import FetchError

__all__ = ["DRIVERS", "download_objects"]

DRIVERS: Mapping[str, str] = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "wasb": "adlfs",
    "wasbs": "adlfs",
    "az": "adlfs",
    "hdfs": "pyarrow",
    "webhdfs": "requests",
    "dbfs": "requests",
    "sftp": "paramiko",
    "ftp": "",
}
"""Scheme → the package that fsspec needs for it. Others of fsspec's (``file``, ``memory``, chains) are refused."""

_NAMES: Mapping[str, str] = {"wasb": "abfs", "wasbs": "abfs", "abfss": "abfs", "s3a": "s3"}
"""What fsspec calls a scheme, where it has another name for it. Azure's host is the same account by any of them."""

_CHUNK = 2**20
_AT_ONCE = 4


async def download_objects(download: Download, folder: Path) -> Path:
    """Download the file or prefix that ``download.uri`` names.

    A cancelled call returns when its threads have ended, which takes them one chunk or the store's own time-out.

    Args:
        download: what to download.
        folder: an existing empty folder to put it into.

    Returns:
        The path inside `folder`: of the file, or of a folder with all that is under the prefix.

    Raises:
        FetchError: with the URI without its secrets, and what to install if a driver is missing.
        OSError: `folder` cannot be written to.
    """
    store, path = await PROJECTS.run(lambda: _open_store(download))
    files = await PROJECTS.run(lambda: _list(download, store, path))
    top = folder / (PurePosixPath(path).name or "download")
    if not files:
        await stoppable(lambda stop: _copy(download, store, path, top, stop))
        return top
    limiter = anyio.CapacityLimiter(_AT_ONCE)
    failed: list[Exception] = []

    async def one(remote: str, local: Path) -> None:
        async with limiter:
            try:
                await stoppable(lambda stop: _copy(download, store, remote, local, stop))
            except (FetchError, OSError) as error:
                failed.append(error)
                group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for remote, parts in files.items():
            group.start_soon(one, remote, top.joinpath(*parts))
    if failed:
        raise failed[0]
    return top


def _open_store(download: Download) -> tuple[Any, str]:
    """The file system of fsspec, and the path in it."""
    scheme = download.uri.partition(":")[0].lower()
    if "::" in download.uri:
        raise download.failed("chained URLs are not supported")
    try:
        import fsspec

        # A driver that is missing is an ImportError, or a protocol that is not known.
        fsspec.get_filesystem_class(_NAMES.get(scheme, scheme))
    except (ImportError, ValueError) as error:
        driver = f" {DRIVERS[scheme]}" if DRIVERS[scheme] else ""
        reason = f"a driver is missing; run: pip install 'mlfleet[remote]'{driver}"
        raise download.failed(reason) from error
    try:
        rest = download.uri[len(scheme) + 1 :]
        # Without the slashes fsspec would take dbfs:/data for a file of this machine.
        uri = f"{_NAMES.get(scheme, scheme)}:{rest if rest.startswith('//') else f'//{rest}'}"
        store, path = fsspec.core.url_to_fs(uri, **_options(download, scheme))
        # Instances are shared, and what they listed earlier may have changed.
        store.invalidate_cache()
    except FetchError:
        raise
    except Exception as error:
        if scheme == "hdfs":
            # pyarrow's own words are a list of all places where it has looked.
            reason = str(error).partition("\n")[0]
            raise download.failed(f"{reason}; hdfs: needs Java and Hadoop's client here, webhdfs: does not") from error
        raise download.failed(error) from error
    return store, str(path)


def _options(download: Download, scheme: str) -> dict[str, Any]:
    """What the store's driver does not find out itself."""
    if scheme == "dbfs":
        host, token = os.environ.get("DATABRICKS_HOST", ""), os.environ.get("DATABRICKS_TOKEN", "")
        if not host or not token:
            raise download.failed("set DATABRICKS_HOST and DATABRICKS_TOKEN")
        return {"instance": host.removeprefix("https://").rstrip("/"), "token": token}
    if DRIVERS[scheme] == "adlfs":
        # The first is MLflow's name. adlfs reads the second itself, but would share an instance that was made before it
        # changed.
        names = {"account_key": "AZURE_STORAGE_ACCESS_KEY", "connection_string": "AZURE_STORAGE_CONNECTION_STRING"}
        return {option: os.environ[name] for option, name in names.items() if os.environ.get(name)}
    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    if scheme in ("s3", "s3a") and endpoint:
        return {"client_kwargs": {"endpoint_url": endpoint}}
    return {}


def _list(download: Download, store: Any, path: str) -> dict[str, tuple[str, ...]]:
    """Each file under a prefix, and where it belongs below the prefix. Empty if `path` is a file itself."""
    try:
        if store.isfile(path):
            return {}
        names = [name for name, entry in store.find(path, detail=True).items() if entry["type"] == "file"]
    except Exception as error:
        raise download.failed(error) from error
    prefix = path.rstrip("/") + "/"
    files = {}
    for name in names:
        below = name.removeprefix(prefix)
        parts = tuple(part for part in below.split("/") if part not in ("", "."))
        if below == name or ".." in parts or "\0" in name:
            raise download.failed(f"the name {name!r} leads out of the folder")
        if parts and not name.endswith("/"):
            files[name] = parts
    if not files:
        raise download.failed("there is nothing of that name")
    return files


def _copy(download: Download, store: Any, remote: str, local: Path, stop: threading.Event) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    with local.open("wb") as target:
        try:
            with store.open(remote, "rb") as source:
                while chunk := source.read(_CHUNK):
                    if stop.is_set():
                        raise Stopped
                    target.write(chunk)
        except Stopped:
            raise
        except Exception as error:
            raise download.failed(error) from error
