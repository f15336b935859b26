"""Brings the remote files of ``path`` parameters to this machine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Awaitable, Callable, Sequence
from email.message import Message
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import anyio

from mlfleet.concurrency.shield import finish
from mlfleet.errors import FetchError, MlfleetError
from mlfleet.masking import mask_query
from mlfleet.project.blocking import in_thread
from mlfleet.project.object_stores import DRIVERS, download_objects
from mlfleet.project.parameters import Download

if TYPE_CHECKING:
    import httpx

__all__ = ["Artifacts", "download_all"]

Artifacts = Callable[[str, Path], Awaitable[Path]]
"""Downloads an artifact of MLflow into a folder and returns its path there (`Tracking.download`)."""

_ARTIFACTS = ("runs", "models", "mlflow-artifacts")
_AT_ONCE = 4
_ATTEMPTS = 4
_FIRST_DELAY = 0.5
_CHUNK = 2**20
_LONGEST_NAME = 200
# Seconds that a cancelled download has to clean up.
_CLEANING = 30


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
        await finish(lambda: in_thread(lambda: _remove(folders)), within=_CLEANING)
        raise
    return paths


async def _download(download: Download, storage: Path, artifacts: Artifacts) -> Path:
    folder = _folder(download, storage)
    scheme = download.uri.partition(":")[0].lower()
    try:
        await in_thread(partial(folder.mkdir, parents=True))
        if scheme in _ARTIFACTS:
            return await artifacts(download.uri, folder)
        if scheme in ("http", "https"):
            return await _download_http(download, folder)
        if scheme in DRIVERS:
            return await download_objects(download, folder)
    except OSError as error:
        raise FetchError(f"{_subject(download)} cannot be stored: {error}", uri=mask_query(download.uri)) from error
    known = ", ".join(sorted({*_ARTIFACTS, "http", "https", *DRIVERS}))
    raise FetchError(
        f"{_subject(download)} cannot be downloaded: {scheme}: is unknown, give a local path or one of {known}",
        uri=mask_query(download.uri),
    )


async def _download_http(download: Download, folder: Path) -> Path:
    import httpx

    timeout = httpx.Timeout(60, connect=30)
    # The bytes as they are: a .gz must not arrive unpacked.
    headers = {"Accept-Encoding": "identity"}
    client = await in_thread(
        lambda: httpx.AsyncClient(timeout=timeout, headers=headers, follow_redirects=True, max_redirects=10)
    )
    async with client:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                async with client.stream("GET", download.uri) as response:
                    if response.is_success:
                        return await _store(response, folder / _file_name(download.uri, response))
                    problem = f"the server answers {response.status_code} {response.reason_phrase}".rstrip()
                    if response.status_code != 429 and response.status_code < 500:
                        break
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {mask_query(str(error))}".rstrip()
                if isinstance(error, httpx.UnsupportedProtocol):
                    break
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                problem = f"{type(error).__name__} {mask_query(str(error))}".rstrip()
                break
            if attempt < _ATTEMPTS:
                await anyio.sleep(_FIRST_DELAY * 2 ** (attempt - 1))
    raise FetchError(f"{_subject(download)} cannot be downloaded: {problem}", uri=mask_query(download.uri))


async def _store(response: httpx.Response, path: Path) -> Path:
    file = await in_thread(lambda: path.open("wb"))
    try:
        async for chunk in response.aiter_bytes(_CHUNK):
            await in_thread(partial(file.write, chunk))
    finally:
        await finish(lambda: in_thread(file.close), within=_CLEANING)
    return path


def _file_name(uri: str, response: httpx.Response) -> str:
    """A name for the file, from what the server or else the URI says; never one that leaves its folder."""
    header = Message()
    header["Content-Disposition"] = response.headers.get("Content-Disposition", "")
    for candidate in (header.get_filename(), unquote(urlsplit(uri).path)):
        name = re.split(r"[/\\]", candidate or "")[-1]
        name = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "_", name).strip()
        # The end, for the sake of the suffix.
        name = name.encode()[-_LONGEST_NAME:].decode(errors="ignore")
        if name not in ("", ".", ".."):
            return name
    return "download"


def _folder(download: Download, storage: Path) -> Path:
    return storage / f"param_{download.index}"


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _subject(download: Download) -> str:
    return f"{mask_query(download.uri)} of the parameter {download.name!r}"
