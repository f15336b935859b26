"""Brings the remote files of ``path`` parameters to this machine: over HTTP, from MLflow, from object stores."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import anyio

from mlfleet._concurrency.threads import PROJECTS
from mlfleet._object_stores import DRIVERS, StoreError, list_objects, open_store
from mlfleet._project.blocking import Stopped, stoppable
from mlfleet._project.http_downloads import download_file
from mlfleet._project.parameters import Download
from mlfleet.errors import MlfleetError

__all__ = ["Artifacts", "download_all"]

Artifacts = Callable[[str, Path], Awaitable[Path]]
"""Downloads an artifact of MLflow into a folder and returns its path there (`Tracking.download`)."""

T = TypeVar("T")

_ARTIFACTS = ("runs", "models", "mlflow-artifacts")
_CHUNK = 2**20
_AT_ONCE = 4


async def download_all(downloads: Sequence[Download], storage: Path, artifacts: Artifacts) -> dict[str, str]:
    """Download the values of ``path`` parameters, each into ``param_<index>`` of a folder, several at once.

    When one fails, or the call is cancelled, what was downloaded is removed.

    Args:
        downloads: What to download.
        storage: The folder of one run.
        artifacts: A function that downloads ``runs:/``, ``models:/`` and ``mlflow-artifacts:/``.

    Returns:
        Parameter name → local path of the file or folder.

    Raises:
        FetchError: A download fails; the text names the parameter and hides the secrets of the URI.
        TrackingError: Raised by `artifacts`.
    """
    paths: dict[str, str] = {}

    async def fetch(download: Download) -> None:
        paths[download.name] = str(await _download(download, storage, artifacts))

    try:
        await _for_each(downloads, fetch)
    except BaseException:
        folders = [_folder(download, storage) for download in downloads]
        await PROJECTS.finish(lambda: _remove(folders))
        raise
    return paths


async def _for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    """Do some work for each item, a few at a time; the first error ends the others and is raised."""
    failed: list[Exception] = []
    limiter = anyio.CapacityLimiter(_AT_ONCE)

    async def one(item: T) -> None:
        async with limiter:
            try:
                await work(item)
            except (MlfleetError, OSError) as error:
                failed.append(error)
                group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for item in items:
            group.start_soon(one, item)
    if failed:
        raise failed[0]


async def _download(download: Download, storage: Path, artifacts: Artifacts) -> Path:
    folder = _folder(download, storage)
    scheme = download.uri.partition(":")[0].lower()
    try:
        await PROJECTS.run(partial(folder.mkdir, parents=True))
        if scheme in _ARTIFACTS:
            return await artifacts(download.uri, folder)
        if scheme in ("http", "https"):
            return await download_file(download, folder)
        if scheme in DRIVERS:
            return await _download_objects(download, folder)
    except OSError as error:
        raise download.failed(f"it cannot be stored, {error}") from error
    known = ", ".join(sorted({*_ARTIFACTS, "http", "https", *DRIVERS}))
    raise download.failed(f"the scheme {scheme}: is unknown, give a local path or one of {known}")


def _folder(download: Download, storage: Path) -> Path:
    return storage / f"param_{download.index}"


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


async def _download_objects(download: Download, folder: Path) -> Path:
    """Download the file or prefix of an object store, and return the path of the file or of a folder with its files.

    A cancelled call returns when its threads have ended, after one chunk or the store's own time-out.
    """
    store, path, files = await PROJECTS.run(lambda: _list(download))
    top = folder / (PurePosixPath(path).name or "download")

    async def copy(remote: str) -> None:
        await stoppable(lambda stop: _copy(download, store, remote, top.joinpath(*files[remote]), stop))

    await _for_each(files, copy)
    return top


def _list(download: Download) -> tuple[Any, str, dict[str, tuple[str, ...]]]:
    """Return the store of a download, the path in it, and the files there as `list_objects` does."""
    try:
        store, path = open_store(download.uri)
        files = list_objects(store, path)
    except StoreError as error:
        raise download.failed(str(error)) from error
    except Exception as error:
        raise download.failed(error) from error
    if not files:
        raise download.failed("there is nothing of that name")
    return store, path, files


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
