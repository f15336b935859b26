"""A client for image registries that needs no container engine: https://distribution.github.io/distribution/spec/api/."""

from __future__ import annotations

import base64
import json
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.threads import LOGINS
from mlfleet._hosts import has_loopback_host
from mlfleet._oci.login import find_credentials
from mlfleet._oci.references import Reference
from mlfleet._request_log import unlogged_requests
from mlfleet._retry import RETRIED, RetryPolicy, parse_retry_after
from mlfleet.errors import BackendError

__all__ = ["Body", "Registries", "RegistryError"]

_RETRIES = RetryPolicy(seconds=3600.0, first_pause=0.8, longest_pause=30.0, attempts=4)
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_TIMEOUT = httpx.Timeout(120.0, connect=10.0, pool=None)
_LARGEST = 8 * 2**20  # bytes of a manifest or of the answer with a token
_LARGEST_ERROR = 4096  # bytes

V = TypeVar("V")
Body = Callable[[], AsyncIterator[bytes]]


class RegistryError(BackendError):
    """A registry refused a request, or did not answer.

    Attributes:
        status: The HTTP status code; None if there was no answer.
        retry_after: The seconds that the registry asks to wait; None if it does not say.
    """

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after

    @property
    def is_transient(self) -> bool:
        """True if the same request may succeed later."""
        return self.status is None or self.status in RETRIED


class Registries:
    """A client for any number of registries, which shows them the credentials of ``docker login``.

    Args:
        given: The caller's ``docker_auth``; None: only what ``docker login`` has stored.
    """

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        self._given = given
        self._client: httpx.AsyncClient | None = None
        self._tokens: dict[tuple[str, str, str], str] = {}
        self._schemes: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        self._client = await LOGINS.run(_make_client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await complete(self._client.aclose)

    async def read(self, reference: Reference, path: str, *, accept: str = "*/*") -> tuple[bytes, Mapping[str, str]]:
        """Return a manifest or a small blob, and the headers of the answer.

        Args:
            reference: The registry and the repository.
            path: The path below the repository.
            accept: The media types to accept.

        Raises:
            RegistryError: It does not exist, or the registry does not let us read it.
        """

        async def attempt() -> tuple[bytes, Mapping[str, str]]:
            async with self.request("GET", reference, path, headers={"Accept": accept}) as response:
                return await _read(response, _LARGEST), response.headers

        return await _retried(attempt)

    async def exists(self, reference: Reference, path: str, *, accept: str = "*/*") -> Mapping[str, str] | None:
        """Return the headers of a manifest or blob; None if it does not exist.

        Args:
            reference: The registry and the repository.
            path: The path below the repository.
            accept: The media types to accept.
        """

        async def attempt() -> Mapping[str, str] | None:
            try:
                async with self.request("HEAD", reference, path, headers={"Accept": accept}) as response:
                    return response.headers
            except RegistryError as error:
                if error.status == 404:
                    return None
                raise

        return await _retried(attempt)

    async def mount(self, reference: Reference, digest: str, source: str) -> bool:
        """Let a repository share a blob of another repository of the same registry.

        Args:
            reference: The registry and the repository that needs the blob.
            digest: The digest of the blob.
            source: The repository that has the blob.

        Returns:
            False if the blob must be uploaded.
        """

        async def attempt() -> bool:
            path = f"blobs/uploads/?mount={digest}&from={source}"
            async with self.request("POST", reference, path, push=True, source=source) as response:
                return response.status_code == 201

        return await _retried(attempt)

    async def upload(self, reference: Reference, digest: str, size: int, body: Body) -> None:
        """Upload a blob.

        Args:
            reference: The registry and the repository.
            digest: The digest of the blob.
            size: The size of the blob in bytes.
            body: A function that begins the content anew at each call.

        Raises:
            RegistryError: The registry does not allow it, or is full.
        """

        async def attempt() -> None:
            async with self.request("POST", reference, "blobs/uploads/", push=True) as response:
                location = urljoin(str(response.url), response.headers.get("Location", ""))
            location += ("&" if urlsplit(location).query else "?") + f"digest={digest}"
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            async with self.request("PUT", reference, location, push=True, headers=headers, body=body):
                pass

        await _retried(attempt)

    async def put_manifest(self, reference: Reference, data: bytes, kind: str) -> str:
        """Store a manifest under its tag, and return its digest.

        Args:
            reference: The registry, the repository and the tag.
            data: The manifest.
            kind: The media type of the manifest.
        """

        async def content() -> AsyncIterator[bytes]:
            yield data

        async def attempt() -> str:
            headers = {"Content-Type": kind, "Content-Length": str(len(data))}
            path = f"manifests/{reference.tag}"
            async with self.request("PUT", reference, path, push=True, headers=headers, body=content) as response:
                return str(response.headers.get("Docker-Content-Digest", ""))

        return await _retried(attempt)

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
    ) -> AsyncIterator[httpx.Response]:
        """Make one request, with the authentication that the registry asks for.

        Args:
            method: The HTTP method.
            reference: The registry and the repository.
            path: The path below the repository, or a whole URL.
            push: True if the request writes.
            source: Another repository that the request reads.
            headers: The HTTP headers.
            body: A function that begins the content anew at each call.

        Raises:
            RegistryError: The registry refused the request, or did not answer.
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
                if response.status_code == 401 and same and not asked:
                    asked = True
                    challenge = response.headers.get("WWW-Authenticate", "")
                    self._tokens[key] = await self._authorize(reference, challenge, push=push, source=source)
                    continue
                if response.status_code >= 400:
                    raise await _refusal(method, reference, response)
                yield response
                return

    @asynccontextmanager
    async def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: Body | None = None,
        **more: Any,
    ) -> AsyncIterator[httpx.Response]:
        assert self._client is not None  # noqa: S101 - entered
        content = body() if body is not None else None
        response: httpx.Response | None = None
        try:
            request = self._client.build_request(method, url, headers=dict(headers), content=content, **more)
            with unlogged_requests():
                response = await self._client.send(request, stream=True)
            yield response
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            text = f"no answer from the registry {urlsplit(url).netloc}: {str(error) or type(error).__name__}"
            raise RegistryError(text) from error
        finally:
            if response is not None:
                await complete(response.aclose)

    async def _scheme(self, host: str) -> str:
        """Return https; plain http is tried on this machine only, as Docker does."""
        if host not in self._schemes:
            self._schemes[host] = "https"
            if has_loopback_host(f"//{host}"):
                try:
                    async with self._send("GET", f"https://{host}/v2/", {}):
                        pass
                except RegistryError:
                    self._schemes[host] = "http"
        return self._schemes[host]

    async def _authorize(self, reference: Reference, challenge: str, *, push: bool, source: str) -> str:
        """Return the header that a challenge asks for: https://distribution.github.io/distribution/spec/auth/token/."""
        found = await find_credentials(reference.name, self._given) or {}
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
            raise RegistryError(
                f"the registry {reference.registry} asks for an unknown authentication: {challenge!r}", status=401
            )
        asked = dict(_CHALLENGE.findall(rest))
        scopes = [f"repository:{reference.repository}:{'pull,push' if push else 'pull'}"]
        if source:
            scopes.append(f"repository:{source}:pull")
        return await self._token(reference, asked, scopes, basic, found.get("identitytoken"))

    async def _token(
        self, reference: Reference, asked: Mapping[str, str], scopes: list[str], basic: str, identity: str | None
    ) -> str:
        realm = asked.get("realm", "")
        if urlsplit(realm).scheme != "https" and not has_loopback_host(realm):
            text = f"the registry {reference.host} sends its login to {realm!r}, which does not use https"
            raise RegistryError(text, status=401)
        service = asked.get("service", "")
        if identity is not None:
            form = {"grant_type": "refresh_token", "refresh_token": identity, "client_id": "mlfleet"}
            form |= {"service": service, "scope": " ".join(scopes)}
            sending = self._send("POST", realm, {}, data=form)
        else:
            query = [("service", service), *(("scope", scope) for scope in scopes)]
            sending = self._send("GET", realm, {"Authorization": basic} if basic else {}, params=query)
        async with sending as response:
            if response.status_code >= 400:
                raise RegistryError(_no_login(reference), status=401)
            data = await _read(response, _LARGEST)
        try:
            answer = json.loads(data)
            return f"Bearer {answer.get('token') or answer['access_token']}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RegistryError(f"the login of the registry {reference.host} gave no token", status=401) from error


def _make_client() -> httpx.AsyncClient:
    """Make the client. Blocking: reads the system's certificates, which registries of a company are signed by."""
    return httpx.AsyncClient(
        verify=ssl.create_default_context(),
        timeout=_TIMEOUT,
        follow_redirects=True,
        headers={"User-Agent": "mlfleet"},
    )


async def _retried(attempt: Callable[[], Awaitable[V]]) -> V:
    return await _RETRIES.call(attempt, retry_if=lambda error: isinstance(error, RegistryError) and error.is_transient)


async def _read(response: httpx.Response, limit: int) -> bytes:
    """Return at most the first `limit` bytes of an answer."""
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) >= limit:
            break
    return bytes(data[:limit])


async def _refusal(method: str, reference: Reference, response: httpx.Response) -> RegistryError:
    status = response.status_code
    if status in (401, 403):
        return RegistryError(_no_login(reference), status=status)
    text = (await _read(response, _LARGEST_ERROR)).decode(errors="replace")
    try:
        said = "; ".join(str(each.get("message") or each.get("code")) for each in json.loads(text)["errors"])
    except (ValueError, KeyError, TypeError, AttributeError):
        said = response.reason_phrase
    verb = "take" if method in ("POST", "PUT") else "have"
    message = f"the registry {reference.host} does not {verb} {reference}: {said or status}"
    return RegistryError(f"{message} ({status})", status=status, retry_after=parse_retry_after(response.headers))


def _no_login(reference: Reference) -> str:
    registry = reference.registry
    return (
        f"the registry {registry} does not let us use {reference.name}: do 'docker login {registry}', or give"
        " docker_auth; or the image does not exist"
    )
