"""The client of one cluster: kubernetes-asyncio's requests, with one kind of error and one policy for retries."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._retry import RETRIED, RetryPolicy, parse_retry_after
from mlfleet._run_log import get_logger, warn_once
from mlfleet.backends.kubernetes.login import SERVICE_ACCOUNT, Cluster, Login, load_login
from mlfleet.errors import BackendError

__all__ = ["RETRIES", "ApiError", "KubernetesClient", "Pool", "reconnect_pause"]

_log = get_logger("mlfleet.kubernetes")

RETRIES = RetryPolicy(seconds=90.0, first_pause=0.8, longest_pause=30.0)
"""The retry policy of requests to Kubernetes API servers; some calls give up sooner."""

_CONNECT = 10.0  # seconds
_READ_TIMEOUT = 60.0  # seconds without a byte of an answer
_REQUESTS = 50  # requests at the same time, besides watches and logs
_OPENING_LOGS = 4  # logs that are opened at the same time: each is a connection of its own
_TOKENS = 4  # different tokens to try for one request
_LARGEST_ERROR = 2**16  # bytes of a refusal to read
_READ_BUFFER = 2**21  # bytes, as kubernetes-asyncio has it: events may be larger than aiohttp's default
_PERMANENT = "Permanent"


class Pool(StrEnum):
    """The kinds of requests. Each has connections of its own, so that a hundred log streams never delay a cancel."""

    CONTROL = "control"
    WATCH = "watch"
    LOGS = "logs"


class ApiError(BackendError):
    """The API server refused a request, or did not answer.

    Attributes:
        status: The HTTP status code; None if there was no answer.
        reason: The reason as Kubernetes names it, such as ``AlreadyExists`` or ``Expired``.
        detail: The message of the server.
        retry_after: The seconds that the server asks to wait; None if it does not say.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        reason: str = "",
        detail: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, backend="kubernetes")
        self.status = status
        self.reason = reason
        self.detail = detail
        self.retry_after = retry_after

    @classmethod
    def of_request(
        cls, what: str, detail: str, *, status: int | None = None, reason: str = "", retry_after: float | None = None
    ) -> Self:
        """Return the error of a request.

        Args:
            what: The purpose of the request, such as "creating a Job".
            detail: The message of the server, or the reason why there is none.
            status: The HTTP status code; None if there was no answer.
            reason: The reason as Kubernetes names it.
            retry_after: The seconds that the server asks to wait.
        """
        code = f" ({status} {reason})".replace(" )", ")") if status is not None else ""
        text = f"the Kubernetes API, {what}: {detail}{code}{_hint(status, detail)}"
        return cls(text, status=status, reason=reason, detail=detail, retry_after=retry_after)

    @property
    def is_transient(self) -> bool:
        """True if the same request may succeed later."""
        return self.status in RETRIED or (self.status is None and self.reason != _PERMANENT)


def reconnect_pause(attempt: int, retry_after: float | None = None) -> float:
    """Return the seconds to wait before a watch or a log stream is opened again.

    Not `RETRIES`: a stream has no deadline, and its pauses start anew with every event that arrives. They are random
    from 0 on, so that clients which lost the same server do not come back together.

    Args:
        attempt: The number of attempts without an event before this one.
        retry_after: The seconds that the server asked to wait.
    """
    if retry_after is not None:
        return retry_after * random.uniform(1.0, 1.25)  # noqa: S311 - no secret
    longest = min(RETRIES.first_pause * 2.0 ** min(attempt, 10), RETRIES.longest_pause)
    return random.uniform(0.0, longest)  # noqa: S311 - no secret


class KubernetesClient:
    """The requests to one cluster.

    Args:
        cluster: The cluster.
        account: The folder of the pod's service account, for a process that runs in the cluster.
        reread: Seconds after which a token file is read again.
    """

    def __init__(self, cluster: Cluster, *, account: Path = SERVICE_ACCOUNT, reread: float = 60.0) -> None:
        self.cluster = cluster
        self._account = account
        self._reread = reread
        self._clients: _Clients | None = None
        self._replaced: set[_Clients] = set()
        self._renewing: SingleFlight[None, None] = SingleFlight()
        self._requests = asyncio.Semaphore(_REQUESTS)
        self._opening_logs = asyncio.Semaphore(_OPENING_LOGS)

    async def __aenter__(self) -> Self:
        await self._renew(None)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await complete(self._close)

    async def _close(self) -> None:
        for clients in (self._clients, *self._replaced):
            if clients is not None:
                await clients.close()
        self._clients = None
        self._replaced.clear()

    # ---- requests ---------------------------------------------------------------------------------------------------

    async def call(
        self,
        what: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        seconds: float = RETRIES.seconds,
    ) -> dict[str, Any]:
        """Make a request and return its JSON.

        After a transient error (429, 5xx, a broken connection) the request is repeated. That is safe for a POST, too:
        all objects have names that tell (409) that an earlier attempt had succeeded.

        Args:
            what: The purpose of the request, for errors, such as "creating a Job".
            method: The HTTP method.
            path: The path from the root of the server.
            params: The parameters of the query.
            body: The JSON to send.
            seconds: The time in which the request may be repeated.

        Raises:
            ApiError: The server refused the request, or did not answer in time.
        """

        async def attempt() -> dict[str, Any]:
            async with (
                self._requests,
                self.stream(
                    what, path, method=method, params=params, body=body, read_timeout=_READ_TIMEOUT
                ) as response,
            ):
                data = await response.read()
            for warning in response.headers.getall("Warning", ()):
                _warn(what, warning)
            try:
                answer = json.loads(data)
            except ValueError as error:
                detail = f"the answer is not JSON: {error}"
                raise ApiError.of_request(what, detail, reason=_PERMANENT) from error
            return answer if isinstance(answer, dict) else {}

        return await replace(RETRIES, seconds=seconds).call(
            attempt,
            retry_if=lambda error: isinstance(error, ApiError) and error.is_transient,
            before_pause=lambda error, pause: _log.debug("%s; again in %.1f s", error, pause),
        )

    @asynccontextmanager
    async def stream(
        self,
        what: str,
        path: str,
        *,
        pool: Pool = Pool.CONTROL,
        method: str = "GET",
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        read_timeout: float | None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Make a request and yield its answer while it arrives. A login that the server refuses is renewed.

        Args:
            what: The purpose of the request, for errors.
            path: The path from the root of the server.
            pool: The connections to use.
            method: The HTTP method.
            params: The parameters of the query.
            body: The JSON to send.
            read_timeout: Seconds without a byte after which the connection counts as broken; None: never.

        Raises:
            ApiError: The server refused the request; also if the connection breaks inside the block.
        """
        with self._explaining(what):
            # Hundreds of pods may start at the same moment, and opening a log costs a TLS handshake.
            async with self._opening_logs if pool is Pool.LOGS else nullcontext():
                clients, response = await self._open(
                    what, lambda clients: clients.request(pool, method, path, params, body, read_timeout)
                )
            try:
                yield response
            finally:
                response.release()
                clients.users -= 1
                if self._replaced:
                    await complete(self._close_unused)

    async def _open(
        self, what: str, send: Callable[[_Clients], Awaitable[aiohttp.ClientResponse]]
    ) -> tuple[_Clients, aiohttp.ClientResponse]:
        tried: set[str] = set()
        while True:
            clients = await self._current()
            login = clients.login
            clients.users += 1
            response: aiohttp.ClientResponse | None = None
            try:
                response = await send(clients)
                if response.status < 400:
                    return clients, response
                # Short-lived tokens may expire again while a new one is loaded on a busy machine.
                if response.status != 401 or login.token in tried or len(tried) >= _TOKENS:
                    raise await _refusal(what, response)
            except aiohttp.ClientError:
                raise  # some are ValueErrors, too
            except ValueError as error:
                detail = f"the request cannot be sent: {error}"
                raise ApiError.of_request(what, detail, reason=_PERMANENT) from error
            finally:
                if response is None or response.status >= 400:
                    if response is not None:
                        response.release()
                    clients.users -= 1
            tried.add(login.token)
            await self._renew(login)

    @contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        name = self.cluster.context
        try:
            yield
        except aiohttp.ClientConnectorCertificateError as error:
            text = f"the certificate of {name} is not trusted: {error.certificate_error}"
            hint = "; see certificate-authority and tls-server-name in the kubeconfig"
            raise ApiError.of_request(what, text + hint, reason=_PERMANENT) from error
        except (aiohttp.ClientError, OSError, EOFError) as error:
            detail = f"no answer from {name}: {str(error) or type(error).__name__}"
            raise ApiError.of_request(what, detail) from error

    # ---- login ------------------------------------------------------------------------------------------------------

    async def _current(self) -> _Clients:
        """Return the clients, whose login is still good as far as it is known here."""
        assert self._clients is not None  # noqa: S101 - entered
        if self._clients.login.is_due:
            await self._renew(self._clients.login)
        return self._clients

    async def _renew(self, login: Login | None) -> None:
        """Log in again, once for all requests that `login` does not serve any more; None: for the first time."""
        if login is (None if self._clients is None else self._clients.login):
            await self._renewing(None, self._log_in)

    async def _log_in(self) -> None:
        login = await load_login(self.cluster, account=self._account, reread=self._reread)
        old = self._clients
        if old is not None and old.login.connection_key == login.connection_key:
            old.login = login
        else:
            # New certificates need new clients. The old ones serve their watches and logs to the end.
            self._clients = _Clients(login)
            if old is not None:
                self._replaced.add(old)
                await self._close_unused()

    async def _close_unused(self) -> None:
        for clients in tuple(self._replaced):
            if clients.users == 0:
                self._replaced.discard(clients)
                await clients.close()


class _Clients:
    """The three ``ApiClient`` objects of one login, each made at its first use.

    Args:
        login: The login.

    Attributes:
        login: The login; a later one may take its place if only the token differs.
        users: The number of requests and streams that use a client now.
    """

    def __init__(self, login: Login) -> None:
        self.login = login
        self.users = 0
        self._clients: dict[Pool, Any] = {}

    async def request(
        self,
        pool: Pool,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        read_timeout: float | None,
    ) -> aiohttp.ClientResponse:
        """Send a request. The status of the answer is not checked, since kubernetes-asyncio does so only for models."""
        headers = {"Accept": "application/json, */*"}
        if self.login.token:
            headers["Authorization"] = self.login.token
        response: aiohttp.ClientResponse = await self._client(pool).call_api(
            path,
            method,
            query_params=dict(params or {}),
            header_params=headers,
            body=None if body is None else dict(body),
            _preload_content=False,
            _request_timeout=aiohttp.ClientTimeout(sock_connect=_CONNECT, sock_read=read_timeout),
        )
        return response

    def _client(self, pool: Pool) -> Any:
        client = self._clients.get(pool)
        if client is None:
            client = copy.copy(self.login.client)
            client.rest_client = copy.copy(client.rest_client)
            # Without a limit of connections: the semaphores of `KubernetesClient` limit requests, and each log is one.
            # Without trust_env: aiohttp knows no CIDRs in NO_PROXY, and the login has chosen the proxy already.
            connector = aiohttp.TCPConnector(limit=0, ssl=self.login.tls)
            client.rest_client.pool_manager = aiohttp.ClientSession(connector=connector, read_bufsize=_READ_BUFFER)
            self._clients[pool] = client
        return client

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.close()
        self._clients.clear()


def _warn(what: str, header: str) -> None:
    """Log a warning of the server, such as an unknown field of the template, once for hundreds of runs.

    https://www.rfc-editor.org/rfc/rfc7234#section-5.5
    """
    text = header.partition('"')[2].rpartition('"')[0] or header
    warn_once(_log, "the cluster warns (%s): %s", what, text.replace('\\"', '"'))


async def _refusal(what: str, response: aiohttp.ClientResponse) -> ApiError:
    text = (await response.content.read(_LARGEST_ERROR)).decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = {}
    if not isinstance(body, dict):
        body = {}
    retry_after = parse_retry_after(response.headers)
    if retry_after is None:
        retry_after = (body.get("details") or {}).get("retryAfterSeconds")
    return ApiError.of_request(
        what,
        str(body.get("message") or " ".join(text.split())[:300] or response.reason),
        status=response.status,
        reason=str(body.get("reason") or ""),
        retry_after=float(retry_after) if isinstance(retry_after, int | float) else None,
    )


def _hint(status: int | None, message: str) -> str:
    if status == 401:
        return ". The credentials were refused, also after they were renewed: log in to the cluster again"
    if status == 403 and "forbidden" in message:
        return ". See the Role in docs/backends/kubernetes.md for the rights that runs need"
    return ""
