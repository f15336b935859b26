"""The object stores that fsspec reaches: their schemes and drivers, and how they are opened and listed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

__all__ = ["ARTIFACT_SCHEMES", "DRIVERS", "StoreError", "list_objects", "open_store"]

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

ARTIFACT_SCHEMES = DRIVERS.keys() - {"webhdfs", "dbfs", "ftp"}
"""The schemes of folders for artifacts. The three others are read only, for ``path`` parameters."""

# Azure's host is the same account by any of its schemes.
_FSSPEC_NAMES = {"wasb": "abfs", "wasbs": "abfs", "abfss": "abfs", "s3a": "s3"}


class StoreError(Exception):
    """An object store cannot be used; the text says why."""


def open_store(uri: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URI, and the path in it. Blocking: imports the driver.

    Raises:
        StoreError: The driver is not installed, or lacks what it needs.
        Exception: An error of the driver.
    """
    scheme = uri.partition(":")[0].lower()
    if "::" in uri:
        raise StoreError("chained URLs are not supported")
    try:
        import fsspec

        # A driver that is missing is an ImportError, or a protocol that is not known.
        fsspec.get_filesystem_class(_fsspec_name(scheme))
    except (ImportError, ValueError) as error:
        driver = f" {DRIVERS[scheme]}" if DRIVERS[scheme] else ""
        raise StoreError(f"a driver is missing; run: pip install 'mlfleet[remote]'{driver}") from error
    # A cached instance has the credentials of then, and listings without the objects that were stored meanwhile.
    try:
        store, path = fsspec.core.url_to_fs(_fsspec_uri(uri), skip_instance_cache=True, **_options(scheme))
    except Exception as error:
        if scheme != "hdfs" or isinstance(error, StoreError):
            raise
        # pyarrow's own words are a list of all places where it has looked.
        reason = str(error).partition("\n")[0]
        raise StoreError(f"{reason}; hdfs: needs Java and Hadoop's client here, webhdfs: does not") from error
    return store, str(path)


def list_objects(store: Any, path: str) -> dict[str, tuple[str, ...]]:
    """Return each object at or below a path, with the parts of its path from there. Blocking.

    Returns:
        The objects by their names in the store. The one that has `path` itself has no parts. Empty: there is none.

    Raises:
        StoreError: A name leads out of the folder.
        Exception: An error of the driver.
    """
    if store.isfile(path):
        return {path: ()}
    prefix = path.rstrip("/") + "/"
    found = {}
    for name, entry in store.find(path, detail=True).items():
        if entry["type"] != "file":
            continue
        below = name.removeprefix(prefix)
        parts = tuple(part for part in below.split("/") if part not in ("", "."))
        if below == name or ".." in parts or "\0" in name:
            raise StoreError(f"the name {name!r} leads out of the folder")
        if parts and not name.endswith("/"):
            found[name] = parts
    return found


def _fsspec_name(scheme: str) -> str:
    return _FSSPEC_NAMES.get(scheme, scheme)


def _fsspec_uri(uri: str) -> str:
    scheme, _, rest = uri.partition(":")
    # Without the slashes fsspec would take hdfs:/runs or dbfs:/data for a folder of this machine.
    return f"{_fsspec_name(scheme.lower())}:{rest if rest.startswith('//') else f'//{rest}'}"


def _options(scheme: str) -> dict[str, Any]:
    """Return the options that the store's driver does not find out itself."""
    if scheme == "dbfs":
        host, token = os.environ.get("DATABRICKS_HOST", ""), os.environ.get("DATABRICKS_TOKEN", "")
        if not host or not token:
            raise StoreError("set DATABRICKS_HOST and DATABRICKS_TOKEN")
        return {"instance": host.removeprefix("https://").rstrip("/"), "token": token}
    if DRIVERS[scheme] == "adlfs":
        key = os.environ.get("AZURE_STORAGE_ACCESS_KEY")  # MLflow's name; adlfs reads its own ones itself
        return {"account_key": key} if key else {}
    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    return {"endpoint_url": endpoint} if endpoint and scheme in ("s3", "s3a") else {}
