"""Brings the remote files of ``path`` parameters to this machine."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import anyio

from mlfleet._concurrency.threads import PROJECTS
from mlfleet._project.object_stores import DRIVERS, download_objects
from mlfleet._project.parameters import Download
from mlfleet.errors import MlfleetError

__all__ = ["Artifacts", "download_all"]

Artifacts = Callable[[str, Path], Awaitable[Path]]
"""Downloads an artifact of MLflow into a folder and returns its path there (`Tracking.download`)."""

_ARTIFACTS = ("runs", "models", "mlflow-artifacts")
_AT_ONCE = 4


async def download_all(downloads: Sequence[Download], storage: Path, artifacts: Artifacts) -> dict[str, str]:
    """Download the values of ``path`` parameters, each into ``param_<index>`` of a folder, several at once.

    When one fails, or the call is cancelled, what was downloaded is removed.

    Args:
        downloads: what to download.
        storage: the folder of one run.
        artifacts: for ``runs:/``, ``models:/`` and ``mlflow-artifacts:/``.

    Returns:
        Parameter name → local path of the file or folder.

    Raises:
        FetchError: with the parameter's name and the URI without its secrets.
        TrackingError: from `artifacts`.
    """
    failed: list[MlfleetError] = []
    paths: dict[str, str] = {}
    slots = anyio.CapacityLimiter(_AT_ONCE)

    async def one(download: Download) -> None:
        async with slots:
            try:
                paths[download.name] = str(await _download(download, storage, artifacts))
            except MlfleetError as error:
                failed.append(error)
                group.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            for download in downloads:
                group.start_soon(one, download)
        if failed:
            raise failed[0]
    except BaseException:
        folders = [_folder(download, storage) for download in downloads]
        await PROJECTS.finish(lambda: _remove(folders))
        raise
    return paths


async def _download(download: Download, storage: Path, artifacts: Artifacts) -> Path:
    folder = _folder(download, storage)
    scheme = download.uri.partition(":")[0].lower()
    try:
        await PROJECTS.run(partial(folder.mkdir, parents=True))
        if scheme in _ARTIFACTS:
            return await artifacts(download.uri, folder)
        if scheme in ("http", "https"):
            # The import of httpx takes long, and reads files.
            return await (await PROJECTS.run(_http))(download, folder)
        if scheme in DRIVERS:
            return await download_objects(download, folder)
    except OSError as error:
        raise download.failed(f"it cannot be stored, {error}") from error
    known = ", ".join(sorted({*_ARTIFACTS, "http", "https", *DRIVERS}))
    raise download.failed(f"the scheme {scheme}: is unknown, give a local path or one of {known}")


def _http() -> Callable[[Download, Path], Awaitable[Path]]:
    from mlfleet._project.http_file import download_file

    return download_file


def _folder(download: Download, storage: Path) -> Path:
    return storage / f"param_{download.index}"


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
