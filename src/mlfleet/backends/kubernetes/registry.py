"""An image registry by its own API, so that no Docker is needed: https://distribution.github.io/distribution/spec/api/."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urljoin, urlsplit

import aiohttp
import anyio

from mlfleet._hosts import has_loopback_host
from mlfleet._oci.login import find_credentials
from mlfleet._oci.references import HUB, Reference
from mlfleet.backends.kubernetes.client import reconnect_pause as pause
from mlfleet.errors import BackendError

__all__ = ["Registries", "RegistryError"]

_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_TRIES = 4
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=120)
_PASSING = (408, 429, 500, 502, 503, 504)
_LARGEST = 8 * 2**20  # bytes of a manifest or a token's answer

V = TypeVar("V")
Body = Callable[[], AsyncIterator[bytes]]


class RegistryError(BackendError):
    """A registry refused, or did not answer.

    Attributes:
        status: of HTTP; None if there was no answer.
    """

    def __init__(self, message: str, *, backend: str | None = "kubernetes", status: int | None = None) -> None:
        super().__init__(message, backend=backend)
        self.status = status


class Registries:
    """Requests to any registry, with the credentials of ``docker login``.

    Args:
        given: the caller's ``docker_auth``.
    """

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        self._given = given
        self._session: aiohttp.ClientSession | None = None
        self._tokens: dict[tuple[str, str, str], str] = {}
        self._schemes: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(trust_env=True, headers={"User-Agent": "mlfleet"})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            with anyio.CancelScope(shield=True):
                await self._session.close()

    async def read(self, reference: Reference, path: str, *, accept: str = "*/*") -> tuple[bytes, Mapping[str, str]]:
        """A manifest or a small blob, and the headers of the answer.

        Args:
            reference: names registry and repository.
            path: below the repository.
            accept: media types.

        Raises:
            RegistryError: it is not there, or may not be read.
        """

        async def once() -> tuple[bytes, Mapping[str, str]]:
            async with self.request("GET", reference, path, headers={"Accept": accept}) as response:
                return await response.content.read(_LARGEST), dict(response.headers)

        return await self._again(once)

    async def exists(self, reference: Reference, path: str, *, accept: str = "*/*") -> Mapping[str, str] | None:
        """The headers of a manifest or blob; None if it is not there.

        Args:
            reference: names registry and repository.
            path: below the repository.
            accept: media types.
        """

        async def once() -> Mapping[str, str] | None:
            try:
                async with self.request("HEAD", reference, path, headers={"Accept": accept}) as response:
                    return dict(response.headers)
            except RegistryError as error:
                if error.status == 404:
                    return None
                raise

        return await self._again(once)

    async def mount(self, reference: Reference, digest: str, source: str) -> bool:
        """Have a blob of another repository of the same registry; False if it must be uploaded.

        Args:
            reference: of the image that is to have it.
            digest: of the blob.
            source: the repository that has it.
        """

        async def once() -> bool:
            path = f"blobs/uploads/?mount={digest}&from={source}"
            async with self.request("POST", reference, path, push=True, source=source) as response:
                return response.status == 201

        return await self._again(once)

    async def upload(self, reference: Reference, digest: str, size: int, body: Body) -> None:
        """Upload a blob.

        Args:
            reference: of the image that is to have it.
            digest: of the blob.
            size: in bytes.
            body: begins its content anew at each call.

        Raises:
            RegistryError: it is not allowed, or the registry is full.
        """

        async def once() -> None:
            async with self.request("POST", reference, "blobs/uploads/", push=True) as response:
                location = urljoin(str(response.url), response.headers.get("Location", ""))
            location += ("&" if urlsplit(location).query else "?") + f"digest={digest}"
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            async with self.request("PUT", reference, location, push=True, headers=headers, body=body):
                pass

        await self._again(once)

    async def put_manifest(self, reference: Reference, data: bytes, kind: str) -> str:
        """Store a manifest by its tag; gives its digest.

        Args:
            reference: with the tag.
            data: the manifest.
            kind: its media type.
        """

        async def content() -> AsyncIterator[bytes]:
            yield data

        async def once() -> str:
            headers = {"Content-Type": kind, "Content-Length": str(len(data))}
            path = f"manifests/{reference.tag}"
            async with self.request("PUT", reference, path, push=True, headers=headers, body=content) as response:
                return response.headers.get("Docker-Content-Digest", "")

        return await self._again(once)

    async def _again(self, once: Callable[[], Awaitable[V]]) -> V:
        for attempt in range(_TRIES):
            try:
                return await once()
            except RegistryError as error:
                if attempt + 1 == _TRIES or not (error.status is None or error.status in _PASSING):
                    raise
            await anyio.sleep(pause(attempt))
        raise AssertionError("unreachable")

    # ---- one request ------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def request(
        self,
        method: str,
        reference: Reference,
        path: str,
        *,
        push: bool = False,
        source: str = "",
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request, with the authentication that the registry asks for.

        Args:
            method: of HTTP.
            reference: names registry and repository.
            path: below the repository, or a whole URL.
            push: whether it writes.
            source: another repository that it reads.
            headers: of HTTP.
            body: begins the content anew at each call.

        Raises:
            RegistryError: it was refused, or not answered.
        """
        url = path if "://" in path else f"{await self._scheme(reference.host)}://{reference.host}/v2/"
        if "://" not in path:
            url += f"{reference.repository}/{path}"
        same = urlsplit(url).netloc == reference.host  # an upload may go to a store elsewhere, by a signed URL
        key = (reference.host, reference.repository, f"{'push' if push else 'pull'} {source}")
        asked = False
        while True:
            made = dict(headers or {})
            if same and key in self._tokens:
                made["Authorization"] = self._tokens[key]
            async with self._send(method, url, made, body) as response:
                if response.status == 401 and same and not asked:
                    asked = True
                    challenge = response.headers.get("WWW-Authenticate", "")
                    self._tokens[key] = await self._authorize(reference, challenge, push=push, source=source)
                    continue
                if response.status >= 400:
                    raise await _refusal(method, reference, response)
                yield response
                return

    @asynccontextmanager
    async def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: Body | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None  # noqa: S101 - entered
        data = body() if body is not None else None
        try:
            async with self._session.request(method, url, headers=headers, data=data, timeout=_TIMEOUT) as response:
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            text = f"no answer from the registry {urlsplit(url).netloc}: {str(error) or type(error).__name__}"
            raise RegistryError(text) from error

    async def _scheme(self, host: str) -> str:
        """https; plain http is tried on this machine only, as Docker does."""
        if host not in self._schemes:
            self._schemes[host] = "https"
            if has_loopback_host(f"//{host}"):
                try:
                    async with self._send("GET", f"https://{host}/v2/", {}, None):
                        pass
                except RegistryError:
                    self._schemes[host] = "http"
        return self._schemes[host]

    async def _authorize(self, reference: Reference, challenge: str, *, push: bool, source: str) -> str:
        """What the registry asks for: https://distribution.github.io/distribution/spec/auth/token/."""
        host = "docker.io" if reference.host == HUB else reference.host
        found = await find_credentials(f"{host}/{reference.repository}", self._given) or {}
        basic = ""
        if found.get("username"):
            pair = f"{found['username']}:{found.get('password', '')}".encode()
            basic = f"Basic {base64.b64encode(pair).decode()}"
        kind, _, rest = challenge.partition(" ")
        if kind.lower() == "basic":
            if not basic:
                raise RegistryError(_no_login(reference), status=401)
            return basic
        if kind.lower() != "bearer":
            raise RegistryError(f"the registry {host} asks for an unknown authentication: {challenge!r}", status=401)
        asked = dict(_CHALLENGE.findall(rest))
        scopes = [f"repository:{reference.repository}:{'pull,push' if push else 'pull'}"]
        if source:
            scopes.append(f"repository:{source}:pull")
        return await self._token(reference, asked, scopes, basic, found.get("identitytoken"))

    async def _token(
        self, reference: Reference, asked: Mapping[str, str], scopes: list[str], basic: str, identity: str | None
    ) -> str:
        assert self._session is not None  # noqa: S101 - entered
        realm = asked.get("realm", "")
        if urlsplit(realm).scheme != "https" and not has_loopback_host(realm):
            text = f"the registry {reference.host} sends its login to {realm!r}, which is no https"
            raise RegistryError(text, status=401)
        query = [("service", asked.get("service", "")), *(("scope", scope) for scope in scopes)]
        if identity is not None:
            form = {"grant_type": "refresh_token", "refresh_token": identity, "client_id": "mlfleet", **dict(query[:1])}
            form["scope"] = " ".join(scopes)
            sending = self._session.post(realm, data=form, timeout=_TIMEOUT)
        else:
            headers = {"Authorization": basic} if basic else {}
            sending = self._session.get(realm, params=query, headers=headers, timeout=_TIMEOUT)
        try:
            async with sending as response:
                if response.status >= 400:
                    raise RegistryError(_no_login(reference), status=401)
                answer = json.loads(await response.content.read(_LARGEST))
            return f"Bearer {answer.get('token') or answer['access_token']}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise RegistryError(
                f"no answer from {urlsplit(realm).netloc}: {str(error) or type(error).__name__}"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RegistryError(f"the login of the registry {reference.host} gave no token", status=401) from error


async def _refusal(method: str, reference: Reference, response: aiohttp.ClientResponse) -> RegistryError:
    if response.status in (401, 403):
        return RegistryError(_no_login(reference), status=response.status)
    text = (await response.content.read(4096)).decode(errors="replace")
    try:
        told = "; ".join(str(each.get("message") or each.get("code")) for each in json.loads(text)["errors"])
    except (ValueError, KeyError, TypeError, AttributeError):
        told = response.reason or ""
    verb = "take" if method in ("POST", "PUT") else "have"
    message = f"the registry {reference.host} does not {verb} {reference}: {told or response.status}"
    return RegistryError(f"{message} ({response.status})", status=response.status)


def _no_login(reference: Reference) -> str:
    host = "docker.io" if reference.host == HUB else reference.host
    return (
        f"the registry {host} does not let us use {reference.name}: do 'docker login {host}', or give docker_auth;"
        " or there is no such image"
    )
