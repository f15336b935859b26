"""Downloads zips over HTTP, and asks whether they changed before it downloads them again."""

from __future__ import annotations

import hashlib
import importlib
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mlfleet._concurrency.threads import PROJECTS
from mlfleet._project.archive import ArchiveLimits
from mlfleet._project.uri import ProjectUri
from mlfleet._text.masking import mask
from mlfleet.errors import FetchError

if TYPE_CHECKING:
    from hashlib import _Hash

    import httpx

__all__ = ["HttpArchive"]

_CONNECT, _READ = 30.0, 60.0  # seconds
_REDIRECTS = 10
_CHUNK = 1 << 20
_VALIDATORS = {"etag": "If-None-Match", "last-modified": "If-Modified-Since"}


class HttpArchive:
    """One URL of a zip, and what is known of it from the last time."""

    def __init__(self, uri: ProjectUri, folder: Path, limits: ArchiveLimits) -> None:
        """Name a download; nothing is asked yet.

        Args:
            uri: of kind ARCHIVE.
            folder: where the zip and what is known of it are kept; shared by all URLs and processes.
            limits: a larger zip is refused.
        """
        self._uri = uri
        self._limits = limits
        key = hashlib.sha256(uri.location.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self._state = folder / f"{key}.json"
        self._part = folder / f"{key}.part"
        self.lock_path = folder / f"{key}.lock"

    async def known_hash(self) -> str | None:
        """The hash of the content at the last download, if the server can be asked whether it is still the same."""
        state = await PROJECTS.run(self._read_state)
        return state.get("sha256")

    @asynccontextmanager
    async def changed(self, known: str | None) -> AsyncIterator[tuple[str, Path | None]]:
        """The hash of the content now, and the file; no file if the content is still `known`.

        The lock must be held. The file is removed at the end.

        Args:
            known: the hash of a content that is at hand.

        Raises:
            FetchError: it cannot be downloaded.
        """
        await PROJECTS.run(lambda: importlib.import_module("httpx"))  # reads hundreds of files
        state = await PROJECTS.run(self._read_state) if known else {}
        headers = {"Accept-Encoding": "identity"}
        headers |= {header: state[name] for name, header in _VALIDATORS.items() if name in state}
        try:
            yield await self._ask(headers, known)
        finally:
            await PROJECTS.finish(lambda: self._part.unlink(missing_ok=True))

    async def _ask(self, headers: dict[str, str], known: str | None) -> tuple[str, Path | None]:
        import httpx

        try:
            client = await PROJECTS.run(self._client)
            async with client, client.stream("GET", self._uri.location, headers=headers) as answer:
                if answer.status_code == 304 and known:
                    return known, None
                self._check(answer)
                return await self._save(answer), self._part
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            text = mask(str(error), self._uri.secrets) or type(error).__name__
            raise self._failure(text) from None  # its request holds the URL with all that is secret in it
        except OSError as error:
            raise self._failure(str(error)) from error

    def _client(self) -> httpx.AsyncClient:
        import httpx

        auth: httpx.Auth | None = None
        if given := self._uri.credentials:
            auth = httpx.BasicAuth(given.username, given.password or "")
        elif (Path.home() / ".netrc").is_file():
            try:
                auth = httpx.NetRCAuth()
            except (OSError, SyntaxError):  # what netrc raises for a broken file
                auth = None
        timeout = httpx.Timeout(_READ, connect=_CONNECT)
        return httpx.AsyncClient(auth=auth, timeout=timeout, follow_redirects=True, max_redirects=_REDIRECTS)

    def _check(self, answer: httpx.Response) -> None:
        if answer.is_success:
            return
        status = f"HTTP {answer.status_code} {answer.reason_phrase}".strip()
        if answer.status_code in (401, 403):
            status += ": it needs (other) credentials: put them into ~/.netrc"
        raise self._failure(status)

    async def _save(self, answer: httpx.Response) -> str:
        digest, size = hashlib.sha256(), 0
        async with PROJECTS.open(self._part, "wb") as part:
            async for data in answer.aiter_bytes(_CHUNK):
                size += len(data)
                if size > self._limits.size:
                    raise self._failure(f"it is larger than {self._limits.size} bytes (MLFLEET_MAX_ARCHIVE_BYTES)")
                await PROJECTS.run(partial(_append, part, digest, data))
        state = {name: answer.headers[name] for name in _VALIDATORS if name in answer.headers}
        if state:
            state["sha256"] = digest.hexdigest()
        await PROJECTS.run(lambda: self._write_state(state))
        return digest.hexdigest()

    def _read_state(self) -> dict[str, str]:
        try:
            raw = json.loads(self._state.read_text(encoding="utf-8"))
            return {str(name): str(value) for name, value in raw.items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def _write_state(self, state: dict[str, str]) -> None:
        unfinished = self._state.with_suffix(f".{secrets.token_hex(4)}")
        unfinished.write_text(json.dumps(state), encoding="utf-8")
        unfinished.replace(self._state)

    def _failure(self, why: str) -> FetchError:
        return FetchError(f"cannot download {self._uri.text}: {why}", uri=self._uri.text)


def _append(file: IO[bytes], digest: _Hash, data: bytes) -> None:
    file.write(data)
    digest.update(data)
