"""Downloads over HTTP: zips of projects, which are asked for changes, and single files for ``path`` parameters."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

from mlfleet._concurrency.threads import PROJECTS
from mlfleet._project.archive import ArchiveLimits
from mlfleet._project.parameters import Download
from mlfleet._project.uri import ProjectUri
from mlfleet._request_log import unlogged_requests
from mlfleet._retry import RetryPolicy, parse_retry_after
from mlfleet._store.content_store import read_facts, write_facts
from mlfleet._text.masking import mask
from mlfleet.errors import FetchError

if TYPE_CHECKING:
    from hashlib import _Hash

    import httpx

__all__ = ["HttpArchive", "download_file"]

T = TypeVar("T")

_RETRIES = RetryPolicy(seconds=600, attempts=4)
_CONNECT, _READ = 30.0, 60.0  # seconds
_REDIRECTS = 10
_CHUNK = 1 << 20
_LONGEST_NAME = 200
_VALIDATORS = {"etag": "If-None-Match", "last-modified": "If-Modified-Since"}


class HttpArchive:
    """One URL of a zip, and what is known of it from the last time.

    Args:
        uri: A URI of kind ARCHIVE.
        folder: The folder for the zip and what is known of it; shared by all URLs and processes.
        limits: The limits of archives. A larger zip is refused.

    Attributes:
        lock_path: The lock file to hold while `changed` is used.
    """

    def __init__(self, uri: ProjectUri, folder: Path, limits: ArchiveLimits) -> None:
        self._uri = uri
        self._limits = limits
        key = hashlib.sha256(uri.location.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self._state = folder / f"{key}.json"
        self._part = folder / f"{key}.part"
        self.lock_path = folder / f"{key}.lock"

    async def read_last(self) -> Mapping[str, str]:
        """Return what to ask the server by whether its content has changed, with the hash of that of the last download.

        The hash is under ``sha256``; without it the server cannot be asked.
        """
        return await PROJECTS.run(lambda: {name: str(value) for name, value in (read_facts(self._state) or {}).items()})

    @asynccontextmanager
    async def changed(self, last: Mapping[str, str]) -> AsyncIterator[tuple[str, Path | None]]:
        """Yield the hash of the content now, and the file; no file if the content is still that of `last`.

        The lock must be held. The file is removed at the end.

        Args:
            last: What `read_last` returned, if that content is at hand; else empty.

        Raises:
            FetchError: The zip cannot be downloaded.
        """
        try:
            yield await self._download(last)
        finally:
            await PROJECTS.finish(lambda: self._part.unlink(missing_ok=True))

    async def _download(self, last: Mapping[str, str]) -> tuple[str, Path | None]:
        headers = {header: last[name] for name, header in _VALIDATORS.items() if name in last}

        async def receive(response: httpx.Response) -> tuple[str, Path | None]:
            if response.status_code == 304 and last:
                return last["sha256"], None
            _raise_for_status(response)
            return await self._save(response), self._part

        try:
            return await _get(self._uri.location, headers, receive, auth=self._auth)
        except _StatusError as error:
            hint = ": it needs (other) credentials: put them into ~/.netrc" if error.status in (401, 403) else ""
            raise self._failure(f"HTTP {error.status} {error.reason}".strip() + hint) from None
        except _HttpError as error:
            raise self._failure(mask(error.text or error.kind, self._uri.secrets)) from None
        except OSError as error:
            raise self._failure(str(error)) from error

    def _auth(self) -> httpx.Auth | None:
        import httpx

        if given := self._uri.credentials:
            return httpx.BasicAuth(given.username, given.password or "")
        if (Path.home() / ".netrc").is_file():
            try:
                return httpx.NetRCAuth()
            except (OSError, SyntaxError):  # What netrc raises for a broken file.
                return None
        return None

    async def _save(self, response: httpx.Response) -> str:
        digest, size = hashlib.sha256(), 0
        async with PROJECTS.open(self._part, "wb") as part:
            async for data in response.aiter_bytes(_CHUNK):
                size += len(data)
                if size > self._limits.size:
                    raise self._failure(f"it is larger than {self._limits.size} bytes (MLFLEET_MAX_ARCHIVE_BYTES)")
                await PROJECTS.run(partial(_append, part, digest, data))
        state = {name: response.headers[name] for name in _VALIDATORS if name in response.headers}
        if state:
            state["sha256"] = digest.hexdigest()
        await PROJECTS.run(lambda: write_facts(self._state, state))
        return digest.hexdigest()

    def _failure(self, why: str) -> FetchError:
        return FetchError(f"cannot download {self._uri.text}: {why}", uri=self._uri.text)


async def download_file(download: Download, folder: Path) -> Path:
    """Download the file that ``download.uri`` names into a folder, and return its path.

    Args:
        download: What to download.
        folder: An existing empty folder.

    Raises:
        FetchError: The file cannot be downloaded; the text hides the secrets of its URI.
        OSError: The folder cannot be written to.
    """

    async def receive(response: httpx.Response) -> Path:
        _raise_for_status(response)
        path = folder / _file_name(download.uri, response)
        async with PROJECTS.open(path, "wb") as file:
            async for chunk in response.aiter_bytes(_CHUNK):
                await PROJECTS.run(partial(file.write, chunk))
        return path

    try:
        return await _get(download.uri, {}, receive, auth=lambda: None)
    except _StatusError as error:
        raise download.failed(f"the server answers {error.status} {error.reason}".rstrip()) from None
    except _HttpError as error:
        raise download.failed(f"{error.kind}: {error.text}") from None


class _StatusError(Exception):
    """An HTTP status that is not a success. It never leaves this module."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.reason = response.reason_phrase
        self.retry_after = parse_retry_after(response.headers)
        super().__init__(f"{self.status} {self.reason}")


class _HttpError(Exception):
    """A request that failed, without the request, which holds the URL with its secrets. It never leaves this module."""

    def __init__(self, error: Exception, *, is_transient: bool) -> None:
        self.kind = type(error).__name__
        self.text = str(error)
        self.is_transient = is_transient
        super().__init__(self.kind)


async def _get(
    url: str,
    headers: dict[str, str],
    receive: Callable[[httpx.Response], Awaitable[T]],
    *,
    auth: Callable[[], httpx.Auth | None],
) -> T:
    """Send a GET request and receive its answer, by the policy for downloads.

    Args:
        url: The URL.
        headers: More headers.
        receive: Reads the answer; it is called again for each attempt.
        auth: Makes the authentication; called in a thread.

    Raises:
        _StatusError: The server answers with an error.
        _HttpError: The request fails.
    """
    # Importing them reads hundreds of files.
    await PROJECTS.run(lambda: (importlib.import_module("httpx"), importlib.import_module("tenacity")))
    import httpx

    def open_client() -> httpx.AsyncClient:
        # The bytes as they are: a .gz must not arrive unpacked.
        return httpx.AsyncClient(
            auth=auth(),
            headers={"Accept-Encoding": "identity"},
            timeout=httpx.Timeout(_READ, connect=_CONNECT),
            limits=httpx.Limits(max_connections=1),
            follow_redirects=True,
            max_redirects=_REDIRECTS,
        )

    async with await PROJECTS.run(open_client) as client:

        async def attempt() -> T:
            try:
                with unlogged_requests():
                    async with client.stream("GET", url, headers=headers) as response:
                        return await receive(response)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                is_transient = isinstance(error, httpx.TransportError) and not isinstance(
                    error, httpx.UnsupportedProtocol
                )
                raise _HttpError(error, is_transient=is_transient) from None
            except ValueError as error:  # What httpx lets through of a broken URL or header.
                raise _HttpError(error, is_transient=False) from None

        return await _RETRIES.call(attempt, retry_if=_may_succeed_later)


def _may_succeed_later(error: BaseException) -> bool:
    if isinstance(error, _StatusError):
        return error.status == 429 or error.status >= 500
    return isinstance(error, _HttpError) and error.is_transient


def _raise_for_status(response: httpx.Response) -> None:
    if not response.is_success:
        raise _StatusError(response)


def _file_name(uri: str, response: httpx.Response) -> str:
    """Return a name for the file, from what the server or else the URI says; never one that leaves its folder."""
    from email.message import Message

    header = Message()
    header["Content-Disposition"] = response.headers.get("Content-Disposition", "")
    for candidate in (header.get_filename(), unquote(urlsplit(uri).path)):
        name = re.split(r"[/\\]", candidate or "")[-1]
        name = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "_", name).strip()
        # The end is kept, for the sake of the suffix.
        name = name.encode()[-_LONGEST_NAME:].decode(errors="ignore")
        if name not in ("", ".", ".."):
            return name
    return "download"


def _append(file: IO[bytes], digest: _Hash, data: bytes) -> None:
    file.write(data)
    digest.update(data)
