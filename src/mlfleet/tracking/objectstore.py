"""Artifacts in an object store (S3, Google, Azure, …), by fsspec. Everything here blocks: call it in a thread."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlfleet._text.masking import mask, mask_uri
from mlfleet.errors import TrackingError
from mlfleet.tracking.locations import split_uri

__all__ = ["download", "upload"]

_DRIVERS = {
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
    "sftp": "paramiko",
}
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCESS_KEY")
# What fsspec calls a scheme, where it has another name for it.
_NAMES = {"wasb": "abfs", "wasbs": "abfs", "abfss": "abfs", "s3a": "s3"}


def upload(path: Path, uri: str) -> None:
    """Store a file as the object `uri`.

    Raises:
        TrackingError: the store refused, or cannot be reached, or its driver is not installed.
    """
    store, key = _open(uri)
    try:
        store.makedirs(key.rpartition("/")[0], exist_ok=True)
        store.put_file(str(path), key)
    except Exception as error:
        raise _failed("stored as", uri, error) from error


def download(uri: str, target: Path) -> None:
    """Copy the object, or all objects below the folder `uri`, to `target`.

    Raises:
        TrackingError: there is no such thing, or as above.
    """
    store, key = _open(uri)
    try:
        if store.isfile(key):
            store.get_file(key, str(target))
        else:
            _download_folder(store, key.rstrip("/"), target)
    except TrackingError:
        raise
    except Exception as error:
        raise _failed("read from", uri, error) from error


def _download_folder(store: Any, key: str, target: Path) -> None:
    names = [str(name) for name in store.find(key)]
    if not names:
        raise TrackingError(f"there is no artifact {key}")
    for name in names:
        inside = name.removeprefix(key).lstrip("/")
        place = target / inside
        if ".." in Path(inside).parts or not place.is_relative_to(target):
            raise TrackingError(f"the artifact store lists {name!r}, which is not safe to write")
        place.parent.mkdir(parents=True, exist_ok=True)
        store.get_file(name, str(place))


def _open(uri: str) -> tuple[Any, str]:
    scheme = split_uri(uri).scheme
    driver = _DRIVERS.get(scheme)
    if driver is None:
        raise TrackingError(
            f"artifacts at {scheme}: URIs are not supported by mlfleet ({mask_uri(uri)}); supported are "
            f"mlflow-artifacts:, folders, and {', '.join(f'{name}:' for name in sorted(_DRIVERS))}. "
            "Code in the run itself may use mlflow for it"
        )
    try:
        from fsspec.core import url_to_fs

        rest = uri[len(scheme) + 1 :]
        # Without the slashes fsspec would take hdfs:/runs for a folder of this machine.
        place = f"{_NAMES.get(scheme, scheme)}:{rest if rest.startswith('//') else f'//{rest}'}"
        store, key = url_to_fs(place, **_options(scheme))
    except ImportError as error:
        text = f"artifacts at {scheme}: URIs need fsspec and {driver}: pip install 'mlfleet[remote]' {driver}"
        raise TrackingError(text) from error
    except Exception as error:
        raise _failed("found at", uri, error) from error
    return store, str(key)


def _options(scheme: str) -> dict[str, Any]:
    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    # A cached listing would hide what was stored meanwhile.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if _DRIVERS[scheme] == "adlfs" and (account_key := os.environ.get("AZURE_STORAGE_ACCESS_KEY")):
        # MLflow's name for it.
        return {**options, "account_key": account_key}
    return {**options, "endpoint_url": endpoint} if endpoint and scheme in ("s3", "s3a") else options


def _failed(what: str, uri: str, error: Exception) -> TrackingError:
    secrets = [os.environ.get(name, "") for name in _SECRETS]
    reason = mask(" ".join(str(error).split())[:500] or type(error).__name__, secrets)
    return TrackingError(f"the artifact cannot be {what} {mask_uri(uri)}: {reason}")
