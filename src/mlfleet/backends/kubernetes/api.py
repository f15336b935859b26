"""Requests to the API server: three pools of connections, one kind of error, patience where it helps."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import random
from collections.abc import Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

import aiohttp
import anyio

from mlfleet.backends.kubernetes.cluster import Cluster
from mlfleet.backends.kubernetes.credentials import Credentials, Login
from mlfleet.errors import BackendError

__all__ = ["Api", "ApiError", "Pool", "pause"]

_log = logging.getLogger("mlfleet.kubernetes")
_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=10)
_PATIENCE = 90.0  # seconds for which a request is tried again
_OPENING = 4  # logs at the same time: each is a connection of its own
_LOGINS = 4  # tokens that are tried, each another
_UNTRUSTED = "Untrusted"
_RETRIED = (408, 429, 500, 502, 503, 504)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.8, 30.0


class Pool(StrEnum):
    """A pool of connections of its own for each, so that a hundred log streams do not keep a cancel from being sent."""

    CONTROL = "control"
    WATCH = "watch"
    LOGS = "logs"


class ApiError(BackendError):
    """The API server refused, or did not answer.

    Attributes:
        status: of HTTP; None if there was no answer.
        reason: as Kubernetes says it: ``AlreadyExists``, ``Expired``.
        detail: what it said.
        retry_after: seconds that it asked to wait.
    """

    def __init__(
        self,
        message: str,
        *,
        backend: str | None = "kubernetes",
        status: int | None = None,
        reason: str = "",
        detail: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, backend=backend)
        self.status = status
        self.reason = reason
        self.detail = detail
        self.retry_after = retry_after

    @classmethod
    def about(
        cls, what: str, detail: str, *, status: int | None = None, reason: str = "", retry_after: float | None = None
    ) -> Self:
        """The error of a request.

        Args:
            what: was being done.
            detail: what was said.
            status: of HTTP.
            reason: as Kubernetes says it.
            retry_after: seconds that it asked to wait.
        """
        code = f" ({status} {reason})".replace(" )", ")") if status is not None else ""
        text = f"the Kubernetes API, {what}: {detail}{code}{_hint(status, detail)}"
        return cls(text, status=status, reason=reason, detail=detail, retry_after=retry_after)

    @property
    def is_passing(self) -> bool:
        """Whether the same request may well succeed later."""
        return self.status in _RETRIED or (self.status is None and self.reason != _UNTRUSTED)


def pause(attempt: int, asked: float | None = None) -> float:
    """Seconds before the next attempt: as the server asked, else growing, and never two clients alike.

    Args:
        attempt: counted from 0.
        asked: what the server asked for.
    """
    if asked is not None:
        return asked * random.uniform(1.0, 1.25)  # noqa: S311 - no secret
    return random.uniform(0.0, min(_FIRST_PAUSE * 2.0 ** min(attempt, 10), _LONGEST_PAUSE))  # noqa: S311


class Api:
    """One cluster."""

    def __init__(self, cluster: Cluster, credentials: Credentials | None = None) -> None:
        self.cluster = cluster
        self._credentials = credentials or Credentials(cluster)
        self._sessions: dict[Pool, aiohttp.ClientSession] = {}
        self._opening_logs = asyncio.Semaphore(_OPENING)

    async def __aenter__(self) -> Self:
        await self._credentials.login()
        for pool in Pool:
            connector = aiohttp.TCPConnector(limit=50 if pool is Pool.CONTROL else 0)
            # No trust_env: it would look for a password in ~/.netrc, in a thread, for each request. The proxy of the
            # environment is part of the login.
            self._sessions[pool] = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), headers={"User-Agent": "mlfleet"}
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            for session in self._sessions.values():
                await session.close()

    async def call(
        self,
        what: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        patience: float = _PATIENCE,
    ) -> dict[str, Any]:
        """A request and its whole answer.

        What passes (429, 5xx, a broken connection) is tried again: also a POST, whose objects all have names that tell
        whether it had succeeded (409).

        Args:
            what: is being done, for the error.
            method: of HTTP.
            path: from the root.
            params: of the query.
            body: JSON.
            patience: seconds for which to try again.

        Raises:
            ApiError: it was refused, or not answered in time.
        """
        given_up_at = anyio.current_time() + patience
        attempt = 0
        while True:
            try:
                async with self.stream(
                    what, path, method=method, params=params, body=body, timeout=_TIMEOUT
                ) as response:
                    data = await response.read()
                    for warning in response.headers.getall("Warning", ()):
                        _warn(what, warning)
                answer = json.loads(data)
                return answer if isinstance(answer, dict) else {}
            except ApiError as error:
                seconds = pause(attempt, error.retry_after)
                if not error.is_passing or anyio.current_time() + seconds > given_up_at:
                    raise
                _log.debug("%s; again in %.1f s", error, seconds)
            except ValueError as error:
                raise ApiError.about(what, f"an answer that is no JSON: {error}") from error
            await anyio.sleep(seconds)
            attempt += 1

    def stream(
        self,
        what: str,
        path: str,
        *,
        pool: Pool = Pool.CONTROL,
        method: str = "GET",
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout: aiohttp.ClientTimeout,
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """A request, and its answer as it comes. A token that the server refuses is renewed once.

        Raises:
            ApiError: it was refused; also what breaks the connection inside of the block.
        """
        data = None if body is None else json.dumps(body).encode()
        return _Stream(self._open(what, pool, method, path, params, data, timeout), what, self.cluster)

    async def _open(
        self,
        what: str,
        pool: Pool,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        data: bytes | None,
        timeout: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        refused: Login | None = None
        tried: set[str] = set()
        # A thousand pods may begin at once; the event loop has others to serve meanwhile.
        async with self._opening_logs if pool is Pool.LOGS else nullcontext():
            while True:
                login = await self._credentials.login(refused=refused)
                response = await self._sessions[pool].request(
                    method,
                    login.host + path,
                    params=dict(params or {}),
                    data=data,
                    headers=_headers(login, method, data),
                    timeout=timeout,
                    proxy=login.proxy,
                    # Here, not in the connector: a renewed certificate makes new connections.
                    ssl=login.tls if login.tls is not None else True,
                    server_hostname=login.server_name,
                    allow_redirects=False,
                )
                if response.status < 400:
                    return response
                async with response:
                    shown = login.authorization or ""
                    # Short-lived tokens may expire again while a new one is fetched on a busy machine.
                    if response.status != 401 or shown in tried or len(tried) >= _LOGINS:
                        raise await _refusal(what, response)
                    refused = login
                    tried.add(shown)


def _headers(login: Login, method: str, data: bytes | None) -> dict[str, str]:
    headers = {"Accept": "application/json, */*"}
    if login.authorization is not None:
        headers["Authorization"] = login.authorization
    if data is not None:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers["Content-Type"] = kind
    return headers


class _Stream:
    """What `Api.stream` gives. No generator: each log that is followed keeps it for the life of its container."""

    __slots__ = ("_cluster", "_opening", "_response", "_what")

    def __init__(self, opening: Coroutine[Any, Any, aiohttp.ClientResponse], what: str, cluster: Cluster) -> None:
        self._opening = opening
        self._what = what
        self._cluster = cluster

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            self._response = await self._opening
        except Exception as error:
            self._tell(error)
            raise
        finally:
            del self._opening
        return self._response

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._response.__aexit__(kind, error, trace)
        self._tell(error)

    def _tell(self, error: BaseException | None) -> None:
        """Raise what the connection's error means, if it is one."""
        name = self._cluster.context
        match error:
            case aiohttp.ClientConnectorCertificateError():
                text = f"the certificate of {name} is not trusted: {error.certificate_error}"
                hint = "; see certificate-authority and tls-server-name in the kubeconfig"
                raise ApiError.about(self._what, text + hint, reason=_UNTRUSTED) from error
            case aiohttp.ClientResponseError():
                raise ApiError.about(self._what, f"{error.message} in the answer") from error
            case TimeoutError() | aiohttp.ClientError() | OSError() | EOFError():
                text = str(error) or type(error).__name__
                raise ApiError.about(self._what, f"no answer from {name}: {text}") from error


@functools.lru_cache(maxsize=256)
def _warn(what: str, header: str) -> None:
    """Once, not for each of hundreds of runs: a field of the template that is not known, or is deprecated.

    https://www.rfc-editor.org/rfc/rfc7234#section-5.5
    """
    text = header.partition('"')[2].rpartition('"')[0] or header
    _log.warning("the cluster warns (%s): %s", what, text.replace('\\"', '"'))


async def _refusal(what: str, response: aiohttp.ClientResponse) -> ApiError:
    text = (await response.content.read(2**16)).decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = {}
    if not isinstance(body, dict):
        body = {}
    seconds = response.headers.get("Retry-After") or (body.get("details") or {}).get("retryAfterSeconds")
    try:
        retry_after = float(seconds) if seconds is not None else None
    except ValueError:  # a date
        retry_after = None
    return ApiError.about(
        what,
        str(body.get("message") or " ".join(text.split())[:300] or response.reason),
        status=response.status,
        reason=str(body.get("reason") or ""),
        retry_after=retry_after,
    )


def _hint(status: int | None, message: str) -> str:
    if status == 401:
        return ". The credentials were refused, also after they were renewed: log in to the cluster again"
    if status == 403 and "forbidden" in message:
        return ". See the Role in docs/backends/kubernetes.md for the rights that runs need"
    return ""
