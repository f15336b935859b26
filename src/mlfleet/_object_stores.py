"""The object stores that fsspec reaches: their schemes, drivers and options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

__all__ = ["ARTIFACT_SCHEMES", "DRIVERS", "fsspec_name", "fsspec_uri", "store_options"]

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


def fsspec_name(scheme: str) -> str:
    """Return fsspec's name for a scheme."""
    return _FSSPEC_NAMES.get(scheme, scheme)


def fsspec_uri(uri: str) -> str:
    """Return the URI as fsspec reads it."""
    scheme, _, rest = uri.partition(":")
    # Without the slashes fsspec would take hdfs:/runs or dbfs:/data for a folder of this machine.
    return f"{fsspec_name(scheme.lower())}:{rest if rest.startswith('//') else f'//{rest}'}"


def store_options(scheme: str) -> dict[str, Any]:
    """Return the options that the store's driver does not find out itself, from MLflow's variables."""
    if DRIVERS[scheme] == "adlfs":
        # The first is MLflow's name. adlfs reads the second itself, but would share an instance that was made before it
        # changed.
        names = {"account_key": "AZURE_STORAGE_ACCESS_KEY", "connection_string": "AZURE_STORAGE_CONNECTION_STRING"}
        return {option: os.environ[name] for option, name in names.items() if os.environ.get(name)}
    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    return {"endpoint_url": endpoint} if endpoint and scheme in ("s3", "s3a") else {}
