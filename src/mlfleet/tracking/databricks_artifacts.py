"""Artifacts in the storage of a Databricks workspace, which signed URLs of its cloud give access to.

The API is the one that mlflow's own client uses (``mlflow.store.artifact.databricks_artifact_repo``).
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote

import anyio

from mlfleet._concurrency.threads import TRANSFERS
from mlfleet._hosts import has_loopback_host
from mlfleet._request_log import unlogged_requests
from mlfleet._retry import RETRIED
from mlfleet.tracking.artifacts import Artifacts
from mlfleet.tracking.errors import Transient
from mlfleet.tracking.http import ServerClient
from mlfleet.tracking.locations import safe_name, safe_path, split_uri

if TYPE_CHECKING:
    import httpx

__all__ = ["DatabricksArtifacts"]

_AT_ONCE = 4
_LONGEST_APPEND = 64 * 2**20  # bytes of one request to ADLS Gen2
_TIMEOUT = 60.0  # seconds without a byte
_ROOT = re.compile(
    r"/databricks/mlflow-tracking/[^/]+/(?P<model>logged_models/)?(?P<id>[^/]+)/artifacts(/(?P<path>.*))?"
)


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of a file or folder among the artifacts of a run, or of a logged model.

    Attributes:
        owner: The id of the run or logged model.
        is_model: True if `owner` is a logged model.
        path: The path below the root of its artifacts; empty: the root.
    """

    owner: str
    is_model: bool
    path: str


@dataclass(frozen=True, slots=True)
class _SignedUrl:
    """Access to one file in the storage of a cloud; the URL is a secret.

    Attributes:
        url: The URL.
        kind: The kind of the storage, such as ``AWS_PRESIGNED_URL``.
        headers: The headers to send.
    """

    url: str
    kind: str
    headers: Mapping[str, str]


class DatabricksArtifacts(Artifacts):
    """The artifacts that a Databricks workspace knows.

    Those at ``dbfs:/databricks/mlflow-tracking`` are transferred by signed URLs, all others as `Artifacts` does it.
    """

    def __init__(self, client: ServerClient) -> None:
        super().__init__(client)
        self._slots = anyio.Semaphore(_AT_ONCE)

    async def _store(self, path: Path, root: str, target: str) -> None:
        place = _parse(root)
        if place is None or place.is_model:
            await super()._store(path, root, target)
            return
        place = replace(place, path=str(PurePosixPath(place.path) / target))
        async with _storage_client(self._client.login.url) as storage, self._slots:
            await self._client.retry(partial(self._put_signed, storage, place, path))

    async def _fetch(self, root: str, target: Path) -> None:
        place = _parse(root)
        if place is None:
            await super()._fetch(root, target)
            return
        async with _storage_client(self._client.login.url) as storage:

            async def fetch_file(path: str, target: Path) -> None:
                async with self._slots:
                    await self._client.retry(partial(self._get_signed, storage, replace(place, path=path), target))

            listed = await self._list_place(place)
            await self._fetch_listed(
                place.path, listed, target, lambda path: self._list_place(replace(place, path=path)), fetch_file
            )

    async def _list_place(self, place: _Place) -> dict[str, bool]:
        """Return the names in a folder, with True for folders; nothing for a file."""
        params = {"artifact_directory_path" if place.is_model else "path": place.path} if place.path else {}
        path = f"logged-models/{quote(place.owner, safe='')}/artifacts/directories"
        if not place.is_model:
            path, params = "artifacts/list", {"run_id": place.owner, **params}
        found: dict[str, bool] = {}
        while True:
            answer = await self._client.call("GET", path, params=params)
            for file in answer.get("files") or ():
                if file.get("path") != place.path or file.get("is_dir"):
                    found[safe_name(PurePosixPath(str(file.get("path"))).name)] = bool(file.get("is_dir"))
            token = answer.get("next_page_token")
            if not token:
                return found
            params = {**params, "page_token": str(token)}

    async def _sign(self, place: _Place, purpose: str) -> _SignedUrl:
        """Request a signed URL, once.

        Args:
            place: The file.
            purpose: ``read`` or ``write``.
        """
        path = f"artifacts/credentials-for-{purpose}"
        body: dict[str, Any] = {"run_id": place.owner, "path": [place.path]}
        if place.is_model:
            path, body = f"logged-models/{quote(place.owner, safe='')}/artifacts/credentials-for-download", {}
            body["paths"] = [place.path]
        answer = await self._client.attempt("POST", path, body=body)
        try:
            found = answer["credentials"][0]["credential_info"] if place.is_model else answer["credential_infos"][0]
            headers = {str(each["name"]): str(each["value"]) for each in found.get("headers") or ()}
            return _SignedUrl(str(found["signed_uri"]), str(found["type"]), headers)
        except (LookupError, TypeError, AttributeError) as error:
            text = f"the Databricks workspace answered {path} without a URL for the artifact {place.path!r}"
            raise self._client.failures.error(text) from error

    async def _put_signed(self, storage: httpx.AsyncClient, place: _Place, path: Path) -> None:
        signed = await self._sign(place, "write")
        async with self._open(path) as (file, size):
            if signed.kind == "AZURE_ADLS_GEN2_SAS_URI":
                await self._put_adls(storage, signed, place, file, size)
                return
            # https://learn.microsoft.com/rest/api/storageservices/put-blob
            more = {"x-ms-blob-type": "BlockBlob"} if signed.kind == "AZURE_SAS_URI" else {}
            headers = {**signed.headers, **more, "Content-Length": str(size)}
            content = self._chunks(file, size)
            async with self._exchange(storage, "PUT", signed.url, place, headers=headers, content=content):
                pass

    async def _put_adls(
        self, storage: httpx.AsyncClient, signed: _SignedUrl, place: _Place, file: IO[bytes], size: int
    ) -> None:
        """Create a file in ADLS Gen2, append to it and flush it.

        https://learn.microsoft.com/rest/api/storageservices/datalakestoragegen2/path
        """

        async def send(method: str, query: str, content: AsyncIterator[bytes] | None = None, length: int = 0) -> None:
            url = f"{signed.url}{'&' if '?' in signed.url else '?'}{query}"
            headers = {**signed.headers, "Content-Length": str(length)}
            async with self._exchange(storage, method, url, place, headers=headers, content=content):
                pass

        await send("PUT", "resource=file")
        position = 0
        while position < size:
            length = min(_LONGEST_APPEND, size - position)
            await send("PATCH", f"action=append&position={position}", self._chunks(file, length), length)
            position += length
        await send("PATCH", f"action=flush&position={size}")

    async def _get_signed(self, storage: httpx.AsyncClient, place: _Place, target: Path) -> None:
        signed = await self._sign(place, "read")
        await self._save(self._exchange(storage, "GET", signed.url, place, headers=signed.headers), target)

    @asynccontextmanager
    async def _exchange(
        self,
        storage: httpx.AsyncClient,
        method: str,
        url: str,
        place: _Place,
        *,
        headers: Mapping[str, str],
        content: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """Send a request to the storage once; the signature in its URL appears in no message.

        Raises:
            Transient: The request may succeed at the next attempt.
            TrackingError: It will not.
        """
        import httpx

        what = f"the storage {split_uri(url).hostname} of the artifact {place.path!r}"
        try:
            with unlogged_requests():
                async with storage.stream(method, url, headers=headers, content=content) as response:
                    if response.is_success:
                        yield response
                        return
        except httpx.HTTPError as problem:
            reason = str(problem) or type(problem).__name__
            raise Transient(self._client.failures.error(f"{what} did not answer: {reason}")) from problem
        status = response.status_code
        if status == 404 and method == "GET":
            raise self._client.failures.error(f"there is no artifact {place.path!r} of {place.owner}", status=status)
        error = self._client.failures.error(f"{what} answered with {status}", status=status)
        raise Transient(error) if status in RETRIED else error


def _parse(uri: str) -> _Place | None:
    """Return the place that an artifact URI names; None if it is elsewhere than in the storage of the workspace."""
    parts = split_uri(uri)
    if parts.scheme != "dbfs" or parts.netloc.rpartition("@")[2] not in ("", "databricks"):
        return None
    match = _ROOT.fullmatch(parts.path.rstrip("/"))
    if match is None:
        return None
    return _Place(match["id"], match["model"] is not None, safe_path(match["path"] or "", uri))


@asynccontextmanager
async def _storage_client(workspace: str) -> AsyncIterator[httpx.AsyncClient]:
    """Open a client for the storage: without our login, through the proxy that the environment names."""
    import httpx

    tls = await TRANSFERS.run(httpx.create_ssl_context)
    client = httpx.AsyncClient(verify=tls, timeout=_TIMEOUT, trust_env=not has_loopback_host(workspace))
    async with client:
        yield client
