"""Artifacts of runs: through the MLflow server, in a folder, or in an object store by fsspec."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from mlfleet._concurrency.threads import TRANSFERS
from mlfleet._object_stores import ARTIFACT_SCHEMES, list_objects, open_store
from mlfleet._text.masking import mask, mask_uri
from mlfleet.errors import TrackingError
from mlfleet.tracking.http import ARTIFACTS, ServerClient
from mlfleet.tracking.locations import (
    ModelRef,
    join,
    local_path,
    parse_model_uri,
    parse_run_uri,
    safe_name,
    safe_path,
    split_uri,
)

if TYPE_CHECKING:
    import httpx

__all__ = ["Artifacts", "download_object", "upload_object"]

_CHUNK = 2**20
_DEPTH = 100
_REDIRECTIONS = 4

_STORE_SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
)

T = TypeVar("T")


class Artifacts:
    """The artifacts that one tracking server knows."""

    def __init__(self, client: ServerClient) -> None:
        self._client = client

    async def upload(self, root: str, path: Path, artifact_path: str | None) -> None:
        """Store the file `path` in the folder `artifact_path` below the URI `root`."""
        folder = safe_path(artifact_path or "", artifact_path or "")
        await self._store(path, root, str(PurePosixPath(folder) / path.name))

    async def _store(self, path: Path, root: str, target: str) -> None:
        served = self._served(root)
        if served is not None:
            await self._client.retry(partial(self._put, _url(str(PurePosixPath(served) / target)), path))
            return
        local = local_path(root)
        work = (
            partial(_copy_into, path, local / target)
            if local is not None
            else partial(upload_object, path, join(root, target))
        )
        await self._in_thread(work)

    async def download(self, uri: str, folder: Path) -> Path:
        """Download a file or folder of artifacts into `folder`; an error or a cancellation leaves nothing there."""
        root = await self._resolve(uri)
        name = safe_name(PurePosixPath(split_uri(root).path).name or "artifacts")
        half = folder / f".{name}.{os.urandom(4).hex()}.part"
        try:
            await self._fetch(root, half)
            await self._in_thread(partial(os.replace, half, folder / name))
        except BaseException:
            await TRANSFERS.finish(partial(_remove, half))
            raise
        return folder / name

    async def _resolve(self, uri: str) -> str:
        """Return the URI of the storage of artifacts that ``runs:/`` or ``models:/`` name."""
        place = uri
        for _ in range(_REDIRECTIONS):
            scheme = split_uri(place).scheme
            if scheme == "runs":
                run = parse_run_uri(place)
                place = join(await self._run_root(run.run_id), run.path)
            elif scheme == "models":
                model = parse_model_uri(place)
                place = join(await self._model_root(model), model.path)
            else:
                return place
        raise TrackingError(f"{uri!r} leads from URI to URI without an end", uri=uri)

    async def _run_root(self, run_id: str) -> str:
        answer = await self._client.call("GET", "runs/get", params={"run_id": run_id})
        return str(answer.get("run", {}).get("info", {}).get("artifact_uri", ""))

    async def _model_root(self, model: ModelRef) -> str:
        if model.model_id:
            answer = await self._client.call("GET", f"logged-models/{quote(model.model_id, safe='')}")
            return str(answer.get("model", {}).get("info", {}).get("artifact_uri", ""))
        params = {"name": model.name, "version": model.version or await self._model_version(model)}
        answer = await self._client.call("GET", "model-versions/get-download-uri", params=params)
        return str(answer.get("artifact_uri", ""))

    async def _model_version(self, model: ModelRef) -> str:
        if model.alias:
            params = {"name": model.name, "alias": model.alias}
            answer = await self._client.call("GET", "registered-models/alias", params=params)
            return str(answer.get("model_version", {}).get("version", ""))
        body: dict[str, Any] = {"name": model.name}
        if model.stage.lower() != "latest":
            body["stages"] = [model.stage]
        answer = await self._client.call("POST", "registered-models/get-latest-versions", body=body)
        versions = [int(version["version"]) for version in answer.get("model_versions") or ()]
        if not versions:
            raise TrackingError(f"the model {model.name!r} has no version in the stage {model.stage!r}")
        return str(max(versions))

    def _served(self, root: str) -> str | None:
        """Return the path of `root` on the server if the server itself serves it; None if it is kept elsewhere."""
        parts = split_uri(root)
        if parts.scheme == "mlflow-artifacts":
            path, own = parts.path, not parts.netloc or parts.netloc == split_uri(self._client.login.url).netloc
        elif parts.scheme in ("http", "https") and ARTIFACTS in parts.path:
            path = parts.path.partition(ARTIFACTS)[2]
            own = parts.netloc == split_uri(self._client.login.url).netloc
        else:
            return None
        if not own:
            raise TrackingError(f"{mask_uri(root)} is on another server than {self._client.login.url}: open that one")
        return safe_path(path, root)

    async def _fetch(self, root: str, target: Path) -> None:
        served = self._served(root)
        if served is not None:
            listed = await self._list(served)
            is_file = not listed or listed == {PurePosixPath(served).name: False}
            await self._fetch_listed(served, {} if is_file else listed, target, self._list, self._fetch_file)
            return
        local = local_path(root)
        work = partial(_copy_from, local, target) if local is not None else partial(download_object, root, target)
        await self._in_thread(work)

    async def _fetch_listed(
        self,
        path: str,
        listed: Mapping[str, bool],
        target: Path,
        list_folder: Callable[[str], Awaitable[Mapping[str, bool]]],
        fetch_file: Callable[[str, Path], Awaitable[None]],
        *,
        depth: int = 0,
    ) -> None:
        """Download a file, or a folder with all that is in it.

        Args:
            path: The path of the file or folder.
            listed: The names in the folder; nothing for a file.
            target: The file or folder to make.
            list_folder: Returns the names in a folder, with True for folders.
            fetch_file: Downloads one file.
            depth: The number of folders above that this call has come from.
        """
        if depth > _DEPTH:
            raise TrackingError(f"the artifacts {path!r} are nested more than {_DEPTH} folders deep")
        if not listed and depth == 0:
            await fetch_file(path, target)
            return
        await self._in_thread(partial(target.mkdir, parents=True, exist_ok=True))
        for name, is_folder in listed.items():
            inside = f"{path}/{name}" if path else name
            if is_folder:
                below = await list_folder(inside)
                await self._fetch_listed(inside, below, target / name, list_folder, fetch_file, depth=depth + 1)
            else:
                await fetch_file(inside, target / name)

    async def _fetch_file(self, path: str, target: Path) -> None:
        await self._client.retry(lambda: self._save(self._client.stream("GET", _url(path)), target))

    async def _list(self, path: str) -> dict[str, bool]:
        """Return the names in a folder; the value is True for folders."""
        answer = await self._client.call("GET", ARTIFACTS, params={"path": path} if path else {})
        return {safe_name(file.get("path")): bool(file.get("is_dir")) for file in answer.get("files") or ()}

    async def _put(self, url: str, path: Path) -> None:
        async with self._open(path) as (file, size):
            content = self._chunks(file, size)
            async with self._client.stream("PUT", url, content=content, size=size) as answer:
                await answer.aread()

    @asynccontextmanager
    async def _open(self, path: Path) -> AsyncIterator[tuple[IO[bytes], int]]:
        """Open a file to upload it, and return it with its size in bytes."""
        try:
            async with TRANSFERS.open(path, "rb") as file:
                yield file, (await self._in_thread(partial(os.fstat, file.fileno()))).st_size
        except OSError as error:
            raise TrackingError(f"the artifact {path} cannot be read: {error.strerror or error}") from error

    async def _chunks(self, file: IO[bytes], size: int) -> AsyncIterator[bytes]:
        """Read exactly `size` bytes: what is appended to the file meanwhile does not belong to this upload."""
        while size > 0:
            chunk = await self._in_thread(partial(file.read, min(_CHUNK, size)))
            if not chunk:
                raise TrackingError(f"the artifact {file.name} became shorter while it was uploaded")
            size -= len(chunk)
            yield chunk

    async def _save(self, opening: AbstractAsyncContextManager[httpx.Response], target: Path) -> None:
        try:
            async with TRANSFERS.open(target, "wb") as file, opening as answer:
                async for chunk in answer.aiter_bytes(_CHUNK):
                    await self._in_thread(partial(file.write, chunk))
        except OSError as error:
            raise TrackingError(
                f"the artifact cannot be written to {target.parent}: {error.strerror or error}"
            ) from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await TRANSFERS.run(work)
        except TrackingError as error:
            error.uri = error.uri or self._client.login.url
            raise


def _url(path: str) -> str:
    return f"{ARTIFACTS}/{quote(path, safe='/')}"


def _copy_into(source: Path, target: Path) -> None:
    half = target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, half)
        half.replace(target)
    except OSError as error:
        half.unlink(missing_ok=True) if half.parent.is_dir() else None
        raise TrackingError(
            f"the artifact {source.name} cannot be stored in {target.parent}: {error.strerror or error}. The tracking "
            "server keeps artifacts in a folder: share it with this machine, or start the server with --serve-artifacts"
        ) from error


def _copy_from(source: Path, target: Path) -> None:
    try:
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    except (OSError, shutil.Error) as error:
        raise TrackingError(
            f"the artifact {source} cannot be read: {getattr(error, 'strerror', None) or error}. If the tracking "
            "server keeps artifacts in a folder of its own machine, start it with --serve-artifacts"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def upload_object(path: Path, uri: str) -> None:
    """Store a file as the object `uri`. It blocks: call it in a thread.

    Raises:
        TrackingError: The store refused or cannot be reached, or its driver is not installed.
    """
    try:
        store, key = _open_store(uri)
        store.makedirs(key.rpartition("/")[0], exist_ok=True)
        store.put_file(str(path), key)
    except TrackingError:
        raise
    except Exception as error:
        raise _store_error("stored as", uri, error) from error


def download_object(uri: str, target: Path) -> None:
    """Copy the object, or all objects below the folder `uri`, to `target`. It blocks: call it in a thread.

    Raises:
        TrackingError: Nothing has that name, or the store refused or cannot be reached, or its driver is not installed.
    """
    try:
        store, key = _open_store(uri)
        objects = list_objects(store, key)
        if not objects:
            raise TrackingError(f"there is no artifact {key}")
        for name, parts in objects.items():
            place = target.joinpath(*parts)
            place.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(name, str(place))
    except TrackingError:
        raise
    except Exception as error:
        raise _store_error("read from", uri, error) from error


def _open_store(uri: str) -> tuple[Any, str]:
    scheme = split_uri(uri).scheme
    if scheme not in ARTIFACT_SCHEMES:
        raise TrackingError(
            f"artifacts at {scheme}: URIs are not supported by mlfleet ({mask_uri(uri)}); supported are "
            f"mlflow-artifacts:, folders, and {', '.join(f'{name}:' for name in sorted(ARTIFACT_SCHEMES))}. "
            "Code in the run itself may use mlflow for it"
        )
    return open_store(uri)


def _store_error(what: str, uri: str, error: Exception) -> TrackingError:
    secrets = [os.environ.get(name, "") for name in _STORE_SECRETS]
    reason = mask(" ".join(str(error).split())[:500] or type(error).__name__, secrets)
    return TrackingError(f"the artifact cannot be {what} {mask_uri(uri)}: {reason}")
