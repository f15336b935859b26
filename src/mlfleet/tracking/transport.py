"""Requests to one tracking server: pooled, a bounded number at once, tried again where that is worth it."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.threads import LOGINS
from mlfleet._hosts import has_loopback_host
from mlfleet._version import __version__
from mlfleet.errors import TrackingError, UsageError
from mlfleet.tracking.auth import Login, Tls
from mlfleet.tracking.connections import Connections, Line
from mlfleet.tracking.failures import Failures
from mlfleet.tracking.retry import BACKOFF, Patience, RetryPolicy, Transient

if TYPE_CHECKING:
    import httpx

__all__ = ["API", "ARTIFACTS", "Transport", "encoded"]

log = logging.getLogger("mlfleet.tracking")

API = "/api/2.0/mlflow/"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"

_FILES_IN_FLIGHT = 4
_CONNECT_SECONDS = 15.0
_KEEPALIVE_SECONDS = 4.0  # uvicorn closes an idle connection after 5 s
_MAX_REDIRECTS = 3
_JSON = {"Content-Type": "application/json"}
_SECRET = 8
"""A header given by the caller that is at least this long is taken for a secret in messages."""

T = TypeVar("T")

_encoded = json.JSONEncoder(separators=(",", ":")).encode


class Transport:
    """The way to one server.

    Requests wait their turn first come, first served, so that a fan-out of hundreds of runs does not flood the server.
    Files have places of their own: the end of a run does not wait behind another one's upload.

    Args:
        login: the server and who we are to it.
        uri: the tracking URI as the caller gave it, for messages.
        headers: to send with every request.
        max_in_flight: requests at the same time.
        retry_for: seconds for which a call keeps trying.
        timeout: seconds without any byte of an answer after which a request counts as lost.
        workspace: of the server; None: ``MLFLOW_WORKSPACE``.
        files_in_flight: files at the same time.

    Attributes:
        login: the server and who we are to it.
        connections: for requests of the API.
        workspace: the MLflow workspace that is used; empty: the server's default.
    """

    def __init__(
        self,
        login: Login,
        *,
        uri: str,
        headers: Mapping[str, str],
        max_in_flight: int,
        retry_for: float,
        timeout: float | None,
        workspace: str | None = None,
        files_in_flight: int = _FILES_IN_FLIGHT,
    ) -> None:
        if max_in_flight < 1:
            raise UsageError(f"max_in_flight is {max_in_flight}: at least one request must be allowed")
        self.login = login
        self.policy = _policy(retry_for)
        self._uri = uri
        self.workspace = (os.environ.get("MLFLOW_WORKSPACE", "") if workspace is None else workspace).strip()
        named = {"X-MLFLOW-WORKSPACE": self.workspace} if self.workspace else {}
        self._headers = {"User-Agent": f"mlfleet/{__version__}", **named, **headers}
        self._timeout = timeout if timeout is not None else _number("MLFLOW_HTTP_REQUEST_TIMEOUT", 120.0)
        self.connections = Connections(max_in_flight)
        self._file_connections = Connections(files_in_flight)
        self._failures: Failures | None = None
        self._answered = False

    async def open(self) -> None:
        """Find out where the server is and prepare the client, in a thread: certificates take their time."""
        await LOGINS.run(self._prepare)

    async def close(self) -> None:
        """Close all connections."""
        self._failures = None
        await self.connections.close()
        await self._file_connections.close()

    @property
    def failures(self) -> Failures:
        """What to say about failures of this server."""
        if self._failures is None:
            raise TrackingError("the tracking client is not open: use it inside `async with`", uri=self._uri)
        return self._failures

    def patience(self, retry_for: float | None = None, *, begin: float | None = None) -> Patience:
        """The patience for one call, that begins now, or began at `begin` (of ``time.monotonic()``)."""
        return Patience(self.policy, seconds=retry_for, answered=lambda: self._answered, begin=begin)

    def call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        retry_for: float | None = None,
    ) -> Awaitable[dict[str, Any]]:
        """Ask the API, again and again if need be; only for what may be done twice.

        Args:
            method: of HTTP.
            path: below the API's root (``runs/get``), or from the server's root if it begins with a slash.
            body: to be sent as JSON.
            params: of the query.
            retry_for: seconds; None: as this transport was made.
        """
        # Hundreds of calls wait for their turn: nothing is kept of them that is not needed any more.
        return self.again(partial(self.attempt, method, path, encoded(body), params), retry_for)

    async def again(self, attempt: Callable[[], Awaitable[T]], retry_for: float | None = None) -> T:
        """Await `attempt()` until it succeeds, is refused, or patience is at its end."""
        begin, patience = time.monotonic(), None
        while True:
            try:
                return await attempt()
            except Transient as failure:
                patience = patience or self.patience(retry_for, begin=begin)
                if not await patience.wait(failure):
                    raise patience.verdict(failure) from failure.error.__cause__

    async def attempt(
        self, method: str, path: str, content: bytes | None = None, params: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Ask the API once, when our turn has come.

        Args:
            method: of HTTP.
            path: as for `call`.
            content: to be sent, as `encoded` makes it.
            params: of the query.

        Raises:
            Transient: it may work the next time.
            TrackingError: it will not.
        """
        self.failures  # noqa: B018 - raises if this is not open
        async with self.connections as line:
            return await self.exchange(line, method, path, content, params)

    async def exchange(
        self,
        line: Line,
        method: str,
        path: str,
        content: bytes | None = None,
        params: Mapping[str, str] | None = None,
        *,
        linger: float = 0.0,
    ) -> dict[str, Any]:
        """Ask the API once, at once, by one of the `connections`.

        Args:
            line: that connection.
            method: of HTTP.
            path: as for `call`.
            content: to be sent, as `encoded` makes it.
            params: of the query.
            linger: seconds for which a cancelled call still waits for the answer, which only tells when the server is
                done.
        """
        import httpx

        kind = _JSON if content is not None else {}
        sent = {**self._headers, **kind, **await self.login.headers()}
        target = f"{_target(path)}?{urlencode(params)}" if params else _target(path)
        # A fan-out of hundreds of runs spends its time here.
        try:
            first = await line.wire.exchange(method, target, sent.items(), content, linger=linger)
        except httpx.HTTPError as problem:
            raise self.failures.of_exception(path, problem) from problem
        self._answered = True
        if first.is_success:
            return self._told(path, first.body, first.to_httpx)
        response = first.to_httpx()
        if not response.is_redirect:
            raise self._failure(path, response, sent)
        # Nothing was done yet; httpx knows where to go.
        return await complete(partial(self._redirected, line, method, path, content, params), limit=linger)

    async def _redirected(
        self, line: Line, method: str, path: str, content: bytes | None, params: Mapping[str, str] | None
    ) -> dict[str, Any]:
        kind = _JSON if content is not None else {}
        async with self._answer(line.client, method, path, content, kind, params) as answer:
            return self._told(path, await answer.aread(), lambda: answer)

    def _told(self, path: str, body: bytes, answer: Callable[[], httpx.Response]) -> dict[str, Any]:
        """What the body of a success says."""
        try:
            told = json.loads(body.decode() or "{}")  # faster than to let it guess the encoding
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise self.failures.of_no_json(path, answer())
        return told

    @asynccontextmanager
    async def file(
        self, method: str, path: str, *, content: AsyncIterator[bytes] | None = None, size: int | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Exchange a file once, streamed: `content` (of `size` bytes) goes there, the answer's body comes back.

        Raises:
            Transient: it may work the next time.
            TrackingError: it will not.
        """
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"} if size is not None else {}
        self.failures  # noqa: B018 - raises if this is not open
        async with (
            self._file_connections as line,
            self._answer(line.client, method, path, content, headers, None) as answer,
        ):
            yield answer

    @asynccontextmanager
    async def _answer(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        content: bytes | AsyncIterator[bytes] | None,
        headers: Mapping[str, str],
        params: Mapping[str, str] | None,
    ) -> AsyncIterator[httpx.Response]:
        import httpx

        sent = {**headers, **await self.login.headers()}
        answer: httpx.Response | None = None
        try:
            request = client.build_request(method, self._url(path), content=content, headers=sent, params=params)
            answer = await self._follow(client, path, request)
            self._answered = True
            if not answer.is_success:
                await answer.aread()
                raise self._failure(path, answer, sent)
            yield answer
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as problem:
            raise self.failures.of_exception(path, problem) from problem
        finally:
            if answer is not None:
                with anyio.CancelScope(shield=True):
                    await answer.aclose()

    def _failure(self, path: str, answer: httpx.Response, sent: Mapping[str, str]) -> Transient | TrackingError:
        """What a refusal means, after a look at whether the login has just expired."""
        error = self.failures.of_answer(path, answer)
        if isinstance(error, TrackingError) and self.login.may_have_expired(error):
            return Transient(error, executed=False, renew=partial(self.login.renew, sent))
        return error

    async def _follow(self, client: httpx.AsyncClient, what: str, request: httpx.Request) -> httpx.Response:
        """Send a request, and follow redirects that stay on the server and do not change what is asked."""
        for _ in range(_MAX_REDIRECTS):
            answer = await client.send(request, stream=True)
            further = answer.next_request
            if further is None:
                return answer
            await answer.aclose()
            same = answer.status_code in (307, 308) or request.method == "GET"
            if request.method == "PUT" or not same or further.url.host != request.url.host:
                raise self.failures.of_redirect(what, answer)
            request = further
        raise self.failures.of_redirect(what, answer)

    def _url(self, path: str) -> httpx.URL:
        import httpx

        return httpx.URL(self.login.url + _target(path))

    def _prepare(self) -> None:
        import httpx

        from mlfleet.tracking.wire import Wire

        self.login.prepare()
        secrets = tuple(self._headers_that_are_secret())
        self._failures = Failures(uri=self._uri, url=self.login.url, login=self.login, secrets=secrets)
        _warn_of_header_plugins()
        tls = Tls.from_environ().context()
        for connections in (self.connections, self._file_connections):
            wire = Wire(
                self.login.url,
                tls=tls,
                keepalive=_KEEPALIVE_SECONDS,
                connect=min(self._timeout, _CONNECT_SECONDS),
                silence=self._timeout,
                # Proxies are for the way out of this machine.
                trust_env=not has_loopback_host(self.login.url),
            )
            connections.prepare(Line(wire, httpx.AsyncClient(transport=wire, headers=self._headers)))

    def _headers_that_are_secret(self) -> list[str]:
        harmless = {"user-agent", "x-mlflow-workspace"}
        return [
            value for name, value in self._headers.items() if name.lower() not in harmless and len(value) >= _SECRET
        ]


def encoded(body: Mapping[str, Any] | None) -> bytes | None:
    """What is sent of a body."""
    return None if body is None else _encoded(body).encode()


def _target(path: str) -> str:
    return path if path.startswith("/") else API + path


def _policy(retry_for: float) -> RetryPolicy:
    retries = _number("MLFLOW_HTTP_REQUEST_MAX_RETRIES", math.inf)
    return RetryPolicy(
        seconds=retry_for,
        backoff=_number("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", BACKOFF),
        tries=None if math.isinf(retries) else int(retries) + 1,
    )


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number >= 0:
        raise UsageError(f"{variable}={text!r}: it should be a number that is not negative")
    return number


def _warn_of_header_plugins() -> None:
    from importlib.metadata import entry_points

    for plugin in entry_points(group="mlflow.request_header_provider"):
        log.warning(
            "mlflow's plugin %r for request headers is not used: give the headers to RestTracking(headers=...)",
            plugin.name,
        )
