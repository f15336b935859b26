"""Requests to the API server: three kinds with limits of their own, one kind of error, patience where it helps."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import random
import ssl
from collections.abc import Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from enum import StrEnum
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode, urlsplit

import anyio

from mlfleet.backends.kubernetes.cluster import Cluster
from mlfleet.backends.kubernetes.credentials import Credentials, Login
from mlfleet.errors import BackendError
from mlfleet.http1.client import Client
from mlfleet.http1.connection import Connection
from mlfleet.http1.origin import Origin

__all__ = ["Api", "ApiError", "Pool", "pause"]

_log = logging.getLogger("mlfleet.kubernetes")
_CONNECT = 10.0  # seconds
_SILENCE = 60.0  # seconds without a byte of an answer
_KEEPALIVE = 15.0  # seconds for which an idle connection is kept
_PATIENCE = 90.0  # seconds for which a request is tried again
_CONTROLS = 50  # requests at the same time, besides watches and logs
_OPENING = 4  # logs at the same time: each is a connection of its own
_LOGINS = 4  # tokens that are tried, each another
_UNTRUSTED = "Untrusted"
_RETRIED = (408, 429, 500, 502, 503, 504)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.8, 30.0


class Pool(StrEnum):
    """Limits of its own for each, so that a hundred log streams do not keep a cancel from being sent."""

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
        self._client = Client(keepalive=_KEEPALIVE, connect=_CONNECT)
        self._place: tuple[Login, Origin, str] | None = None
        self._controls = asyncio.Semaphore(_CONTROLS)
        self._opening_logs = asyncio.Semaphore(_OPENING)

    async def __aenter__(self) -> Self:
        await self._credentials.login()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self._client.close()

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
                async with (
                    self._controls,
                    self.stream(what, path, method=method, params=params, body=body, silence=_SILENCE) as answered,
                ):
                    data = await answered.read()
                    for warning in answered.headers("warning"):
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
        silence: float | None,
    ) -> AbstractAsyncContextManager[Connection]:
        """A request, and its answer as it comes. A token that the server refuses is renewed once.

        Args:
            what: is being done, for the error.
            path: from the root.
            pool: whose limits count.
            method: of HTTP.
            params: of the query.
            body: JSON.
            silence: seconds without a byte, after which the connection is taken for dead; None: never.

        Raises:
            ApiError: it was refused; also what breaks the connection inside of the block.
        """
        data = None if body is None else json.dumps(body).encode()
        target = f"{path}?{urlencode(params)}" if params else path
        return _Stream(self, self._open(what, pool, method, target, data, silence), what)

    async def _open(
        self, what: str, pool: Pool, method: str, target: str, data: bytes | None, silence: float | None
    ) -> Connection:
        refused: Login | None = None
        tried: set[str] = set()
        # A thousand pods may begin at once; the event loop has others to serve meanwhile.
        async with self._opening_logs if pool is Pool.LOGS else nullcontext():
            while True:
                login = await self._credentials.login(refused=refused)
                origin, prefix = self._way(login)
                headers = _headers(login, method, data)
                answer = await self._client.request(origin, method, prefix + target, headers, data, silence=silence)
                if answer.status < 400:
                    return answer
                try:
                    shown = login.authorization or ""
                    # Short-lived tokens may expire again while a new one is fetched on a busy machine.
                    if answer.status != 401 or shown in tried or len(tried) >= _LOGINS:
                        raise await _refusal(what, answer)
                    await answer.read()
                    refused = login
                    tried.add(shown)
                finally:
                    self.release(answer)

    def release(self, answer: Connection) -> None:
        """Give a connection back.

        Args:
            answer: that nobody reads any more.
        """
        self._client.release(answer)

    def _way(self, login: Login) -> tuple[Origin, str]:
        """Where a login leads: to the server, and what all its paths begin with."""
        if self._place is None or self._place[0] is not login:
            parts = urlsplit(login.host)
            # A renewed certificate makes new connections.
            origin = Origin(parts.scheme, parts.netloc, login.tls, login.server_name, login.proxy)
            self._place = login, origin, parts.path
        return self._place[1:]


def _headers(login: Login, method: str, data: bytes | None) -> list[tuple[str, str]]:
    headers = [("User-Agent", "mlfleet"), ("Accept", "application/json, */*")]
    if login.authorization is not None:
        headers.append(("Authorization", login.authorization))
    if data is not None:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers.append(("Content-Type", kind))
    return headers


class _Stream:
    """What `Api.stream` gives. No generator: each log that is followed keeps it for the life of its container."""

    __slots__ = ("_answer", "_api", "_opening", "_what")

    def __init__(self, api: Api, opening: Coroutine[Any, Any, Connection], what: str) -> None:
        self._api = api
        self._opening = opening
        self._what = what

    async def __aenter__(self) -> Connection:
        try:
            self._answer = await self._opening
        except ValueError as error:
            raise ApiError.about(self._what, f"it cannot be sent: {error}", reason=_UNTRUSTED) from error
        except Exception as error:
            self._tell(error)
            raise
        finally:
            del self._opening
        return self._answer

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._api.release(self._answer)
        self._tell(error)

    def _tell(self, error: BaseException | None) -> None:
        """Raise what the connection's error means, if it is one."""
        if not isinstance(error, OSError | EOFError):
            return
        name = self._api.cluster.context
        if isinstance(error.__cause__, ssl.SSLCertVerificationError):
            text = f"the certificate of {name} is not trusted: {error.__cause__}"
            hint = "; see certificate-authority and tls-server-name in the kubeconfig"
            raise ApiError.about(self._what, text + hint, reason=_UNTRUSTED) from error
        raise ApiError.about(self._what, f"no answer from {name}: {str(error) or type(error).__name__}") from error


@functools.lru_cache(maxsize=256)
def _warn(what: str, header: str) -> None:
    """Once, not for each of hundreds of runs: a field of the template that is not known, or is deprecated.

    https://www.rfc-editor.org/rfc/rfc7234#section-5.5
    """
    text = header.partition('"')[2].rpartition('"')[0] or header
    _log.warning("the cluster warns (%s): %s", what, text.replace('\\"', '"'))


async def _refusal(what: str, answer: Connection) -> ApiError:
    text = (await answer.read(2**16)).decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = {}
    if not isinstance(body, dict):
        body = {}
    seconds = next(iter(answer.headers("retry-after")), None) or (body.get("details") or {}).get("retryAfterSeconds")
    try:
        retry_after = float(seconds) if seconds is not None else None
    except ValueError:  # a date
        retry_after = None
    return ApiError.about(
        what,
        str(body.get("message") or " ".join(text.split())[:300] or answer.reason),
        status=answer.status,
        reason=str(body.get("reason") or ""),
        retry_after=retry_after,
    )


def _hint(status: int | None, message: str) -> str:
    if status == 401:
        return ". The credentials were refused, also after they were renewed: log in to the cluster again"
    if status == 403 and "forbidden" in message:
        return ". See the Role in docs/backends/kubernetes.md for the rights that runs need"
    return ""
