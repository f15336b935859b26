"""Requests to one server by httpx: a bounded number at a time, repeated where that is safe."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from mlfleet._concurrency.rate_limit import Pace
from mlfleet._concurrency.threads import LOGINS
from mlfleet._hosts import has_loopback_host
from mlfleet._request_log import unlogged_requests
from mlfleet._retry import RetryPolicy
from mlfleet._run_log import get_logger
from mlfleet._version import __version__
from mlfleet.errors import TrackingError, UsageError
from mlfleet.runs import check_seconds
from mlfleet.tracking.auth import Login, Tls
from mlfleet.tracking.errors import Answer, Failures, Garbled, LoginExpired, Transient, Unreachable
from mlfleet.tracking.locations import split_uri

if TYPE_CHECKING:
    import ssl

    import httpx

__all__ = ["API", "ARTIFACTS", "POLICY", "ServerClient", "exhausted"]

log = get_logger("mlfleet.tracking")

API = "/api/2.0/mlflow/"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"

POLICY = RetryPolicy(seconds=120.0, first_pause=0.5)
"""The retries of tracking, for servers and for stores."""

# A server that never answered is given up early: its address is more likely wrong than its network.
_FIRST_CONTACT = RetryPolicy(seconds=5.0, attempts=3)
# An answer to another request is left over from a proxy or server that sent two; the connection is closed, so a second
# attempt gets its own.
_GARBLED = RetryPolicy(seconds=5.0, attempts=2)

_FILES_IN_FLIGHT = 4
_CONNECT_SECONDS = 15.0
_KEEPALIVE_SECONDS = 4.0  # uvicorn closes an idle connection after 5 s
_MAX_REDIRECTS = 3
_LONGEST_ANSWER = 64 * 2**20  # bytes; a thousand runs with 60 KiB each
_LONGEST_ERROR = 64 * 2**10
# With these the largest part of an answer that is decoded at once (64 KiB) becomes 64 MiB at most; the ratio of Brotli
# and Zstandard has no such bound.
_ENCODINGS = ("gzip", "deflate")
_JSON = {"Content-Type": "application/json"}
_WARNINGS_APART = 60.0  # seconds between two warnings of failures with the same status
_SECRET = 8  # characters of a header of the caller from which on it is masked in messages
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")

T = TypeVar("T")

_encode = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(slots=True)
class _Warnings:
    """The warnings of failures with the same status.

    Attributes:
        last: The time of the last one, by ``time.monotonic``.
        left_out: The number of failures since then that were not logged.
    """

    last: float = -math.inf
    left_out: int = 0


class ServerClient:
    """The HTTP client of one server.

    Requests wait their turn first come, first served, so that hundreds of runs do not flood the server. Files have
    turns of their own: the end of a run does not wait behind the upload of another one.

    Args:
        login: The server's URL and our credentials.
        uri: The tracking URI as the caller gave it, for messages.
        headers: Headers to send with every request.
        max_in_flight: The number of requests at the same time.
        retry_for: Seconds for which a call keeps trying.
        timeout: Seconds for one request and its whole answer, after which it counts as lost; None:
            ``MLFLOW_HTTP_REQUEST_TIMEOUT``, else 120. For files: seconds without a byte.
        workspace: The MLflow workspace of the server; None: ``MLFLOW_WORKSPACE``.
        files_in_flight: The number of files at the same time.
        client: The caller's httpx client, which stays open; None: one that is made here.
        transport: The caller's httpx transport, which is closed with this client; None: httpx's own.
        pace: The rate limits of the server; None: it has none.

    Attributes:
        login: The server's URL and our credentials.
        workspace: The MLflow workspace in use; empty: the server's default.
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
        client: httpx.AsyncClient | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        pace: Pace | None = None,
    ) -> None:
        if max_in_flight < 1:
            raise UsageError(f"max_in_flight is {max_in_flight}: at least one request must be allowed")
        check_seconds("retry_for", retry_for)
        check_seconds("timeout", timeout, or_none=True)
        if client is not None and transport is not None:
            raise UsageError("client and transport are both given: a client has its own transport")
        self.login = login
        self._uri = uri
        self._policy = _configured(retry_for)
        self.workspace = (os.environ.get("MLFLOW_WORKSPACE", "") if workspace is None else workspace).strip()
        named = {"X-MLFLOW-WORKSPACE": self.workspace} if self.workspace else {}
        own = {"User-Agent": f"mlfleet/{__version__}", "Accept-Encoding": ", ".join(_ENCODINGS)}
        self._headers = {**own, **named, **headers}
        self._timeout = timeout if timeout is not None else _number("MLFLOW_HTTP_REQUEST_TIMEOUT", 120.0)
        self._slots = anyio.Semaphore(max_in_flight, fast_acquire=True)
        self._file_slots = anyio.Semaphore(files_in_flight, fast_acquire=True)
        self._connections = max_in_flight + files_in_flight
        self._pace = pace
        self._warnings: dict[int | None, _Warnings] = {}
        self._given = client
        self._transport = transport
        self._client: httpx.AsyncClient | None = None
        self._failures: Failures | None = None
        self._answered = False
        self._answer_times: httpx.Timeout | None = None
        self._file_times: httpx.Timeout | None = None
        self._problems: tuple[type[Exception], ...] = ()

    async def open(self) -> None:
        """Load the credentials and make the httpx client, in a thread: both read files."""
        await LOGINS.run(self._prepare)

    async def close(self) -> None:
        """Close all connections."""
        self._failures = None
        client, self._client = self._client, None
        if client is not None and client is not self._given:
            await client.aclose()

    async def environ(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the plain and the secret variables by which a run finds the server; the client need not be open."""
        if self._failures is None:
            await LOGINS.run(self.login.prepare)
        return self.login.environ()

    @property
    def failures(self) -> Failures:
        """The maker of errors about this server.

        Raises:
            TrackingError: The client is not open.
        """
        if self._failures is None:
            raise TrackingError(
                "the tracking client is not open: use it, or a handle of the Fleet that has it, inside `async with`",
                uri=self._uri,
            )
        return self._failures

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        retry_for: float | None = None,
        check: Callable[[dict[str, Any]], bool] | None = None,
    ) -> dict[str, Any]:
        """Send a request that may be executed twice, until it is answered; see `attempt` for the arguments.

        Args:
            method: The HTTP method.
            path: The path below the API's root, or an absolute one.
            body: The JSON to send.
            params: The query parameters.
            retry_for: Seconds to keep trying; None: as this client was made.
            check: A function that returns False for an answer to another request.
        """
        attempt = partial(self.attempt, method, path, body=body, params=params, check=check)
        return await self.retry(attempt, retry_for)

    async def retry(self, attempt: Callable[[], Awaitable[T]], retry_for: float | None = None) -> T:
        """Await `attempt()` until it succeeds, is refused, or the retry policy is exhausted.

        A refused login is renewed once in each attempt.

        Args:
            attempt: A function that makes one attempt, by `attempt` or `stream`.
            retry_for: Seconds to keep trying; None: as this client was made.
        """
        policy = self._policy if retry_for is None else replace(self._policy, seconds=retry_for)

        async def attempt_with_login() -> T:
            try:
                return await attempt()
            except LoginExpired as expired:
                if not await expired.renew():
                    raise expired.error from expired.error.__cause__
            return await attempt()

        def policy_for(failure: BaseException) -> RetryPolicy:
            if isinstance(failure, Garbled):
                return _stricter(policy, _GARBLED)
            if isinstance(failure, Unreachable) and not self._answered and retry_for is None:
                return _stricter(policy, _FIRST_CONTACT)
            return policy

        try:
            return await policy.call(
                attempt_with_login,
                retry_if=_is_transient,
                before_pause=self._log_pause,
                policy_for=policy_for,
                on_exhausted=exhausted,
            )
        except Transient as failure:
            raise failure.error from failure.error.__cause__

    def _log_pause(self, failure: BaseException, seconds: float) -> None:
        """Log a failure that is followed by another attempt, once a minute for hundreds of runs with the same one."""
        status = failure.error.status if isinstance(failure, Transient) else None
        warnings = self._warnings.setdefault(status, _Warnings())
        now = time.monotonic()
        if now - warnings.last < _WARNINGS_APART:
            warnings.left_out += 1
            log.debug("%s; trying again in %.1f s", failure, seconds)
            return
        more = f" ({warnings.left_out} more such failures before)" if warnings.left_out else ""
        warnings.last, warnings.left_out = now, 0
        log.warning("%s; trying again in %.1f s%s", failure, seconds, more)

    async def attempt(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        check: Callable[[dict[str, Any]], bool] | None = None,
        before: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Send a request once, as soon as a slot is free.

        Args:
            method: The HTTP method.
            path: The path below the API's root (``runs/get``), or from the server's root if it begins with a slash.
            body: The JSON to send.
            params: The query parameters.
            check: A function that returns False for an answer to another request.
            before: A function to call when the slot is free, right before the request is sent.

        Raises:
            Transient: The request may succeed at the next attempt.
            TrackingError: It will not.
        """
        self.failures  # noqa: B018 - raises if this is not open
        content = None if body is None else _encode(body).encode()
        if self._pace is not None:
            await self._pace.wait(_target(path))
        async with self._slots:
            if before is not None:
                before()
            try:
                async with asyncio.timeout(self._timeout):
                    return await self._exchange(method, path, content, params, check)
            except TimeoutError as problem:
                raise self.failures.of_exception(path, problem) from problem

    async def _exchange(
        self,
        method: str,
        path: str,
        content: bytes | None,
        params: Mapping[str, str] | None,
        check: Callable[[dict[str, Any]], bool] | None,
    ) -> dict[str, Any]:
        kind = _JSON if content is not None else {}
        async with self._response(method, path, content, kind, params, self._answer_times) as response:
            answer = Answer(response.status_code, response.headers, await self._read(path, response))
            try:
                result = json.loads(answer.body.decode() or "{}")  # decode() is faster than json's detection
            except (ValueError, RecursionError):
                result = None
            if not isinstance(result, dict):
                raise self.failures.of_no_json(path, answer)
            if check is not None and not check(result):
                # Two answers to one request leave the second one to the next request of the connection (h11 keeps it
                # in its buffer): such a connection must not be used again.
                if stream := response.extensions.get("network_stream"):
                    await stream.aclose()
                raise self.failures.of_garbled(path)
            return result

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, *, content: AsyncIterator[bytes] | None = None, size: int | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Send a request once whose body or answer is a file.

        Args:
            method: The HTTP method.
            path: The path, as for `attempt`.
            content: The body.
            size: The length of the body, in bytes.

        Raises:
            Transient: The request may succeed at the next attempt.
            TrackingError: It will not.
        """
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"} if size is not None else {}
        self.failures  # noqa: B018 - raises if this is not open
        times = self._file_times
        if self._pace is not None:
            await self._pace.wait(_target(path))
        async with self._file_slots, self._response(method, path, content, headers, None, times) as response:
            yield response

    @asynccontextmanager
    async def _response(
        self,
        method: str,
        path: str,
        content: bytes | AsyncIterator[bytes] | None,
        headers: Mapping[str, str],
        params: Mapping[str, str] | None,
        times: httpx.Timeout | None,
    ) -> AsyncIterator[httpx.Response]:
        """Send a request and give its successful response, whose body is not read yet."""
        client = self._client
        assert client is not None  # noqa: S101 - checked by `failures`
        sent: dict[str, str] = {}
        response: httpx.Response | None = None
        try:
            sent = {**self._headers, **headers, **await self.login.headers()}
            self._check_headers(sent)
            request = client.build_request(
                method,
                _parsed(self.login.url + _target(path)),
                content=content,
                headers=sent,
                params=params,
                timeout=times,
            )
            response = await self._send(client, path, request)
            if not response.is_success:
                body = await self._read(path, response)
                raise self._refusal(path, Answer(response.status_code, response.headers, body), sent)
            yield response
        except self._problems as problem:
            raise self.failures.of_exception(path, problem) from problem
        finally:
            if response is not None and not response.is_closed:
                with anyio.CancelScope(shield=True):
                    await response.aclose()

    async def _send(self, client: httpx.AsyncClient, what: str, request: httpx.Request) -> httpx.Response:
        """Send a request, and follow redirects that change neither the origin nor the request.

        Another port or scheme of the same host may be another party: our headers and the body must not go there.
        """
        for _ in range(_MAX_REDIRECTS):
            with unlogged_requests():
                response = await client.send(request, stream=True, follow_redirects=False)
            self._answered = True
            further = response.next_request
            if further is None:
                encoding = response.headers.get("content-encoding", "identity").strip().lower()
                if encoding not in ("", "identity", *_ENCODINGS):
                    await response.aclose()
                    raise self.failures.of_encoding(what, encoding, response.status_code)
                return response
            await response.aclose()
            place, status = response.headers.get("location", ""), response.status_code
            is_same_request = status in (307, 308) or request.method == "GET"
            if request.method == "PUT" or not is_same_request or _origin(further.url) != _origin(request.url):
                raise self.failures.of_redirect(what, place, status)
            request = further
        raise self.failures.of_redirect(what, place, status)

    async def _read(self, what: str, response: httpx.Response) -> bytes:
        """Read a body of bounded size; that of an error is cut."""
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if not response.is_success and len(body) > _LONGEST_ERROR:
                break
            if len(body) > _LONGEST_ANSWER:
                raise self.failures.of_long_answer(what, response.status_code, _LONGEST_ANSWER)
        return bytes(body)

    def _refusal(self, what: str, answer: Answer, sent: Mapping[str, str]) -> Transient | TrackingError:
        error = self.failures.of_answer(what, answer)
        if isinstance(error, TrackingError) and self.login.may_have_expired(error):
            return LoginExpired(error, partial(self.login.renew, sent))
        return error

    def _prepare(self) -> None:
        import httpx
        import tenacity  # noqa: F401 - imported here, in a thread

        self.login.prepare()
        is_own = self._given is None and self._transport is None
        self._failures = Failures(
            uri=self._uri,
            url=self.login.url,
            login=self.login,
            secrets=self._secret_headers(),
            is_own_transport=is_own,
        )
        _warn_of_header_plugins()
        # Before the end of the whole request, so that httpx closes what it could not connect.
        connect = min(self._timeout / 2, _CONNECT_SECONDS)
        self._answer_times = httpx.Timeout(None, connect=connect)  # `attempt` limits the whole request
        self._file_times = httpx.Timeout(self._timeout, connect=connect, pool=None)
        self._problems = (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError)
        if not is_own:
            self._problems += _aiohttp_errors()
        if self._given is not None:
            self._client = self._given
        elif self._transport is not None:
            self._client = httpx.AsyncClient(transport=self._transport, trust_env=False)
        else:
            self._client = self._new_client()

    def _new_client(self) -> httpx.AsyncClient:
        import httpx

        url = self.login.url
        tls = _tls(url)
        try:
            return httpx.AsyncClient(
                verify=tls,
                proxy=_environment_proxy(url),
                trust_env=False,  # read above, for this one server
                # The slots bound the requests. A bound of the pool, too, would let a connection that a cancellation has
                # torn count for ever.
                limits=httpx.Limits(
                    max_connections=None,
                    max_keepalive_connections=self._connections,
                    keepalive_expiry=_KEEPALIVE_SECONDS,
                ),
            )
        except (ValueError, ImportError) as error:
            raise self.failures.error(f"the proxy for {url} cannot be used: {error}") from error

    def _check_headers(self, headers: Mapping[str, str]) -> None:
        """Refuse what no header can hold, without its text: an error of httpx would show a password."""
        wrong = next((name for name, value in headers.items() if not _HEADER_VALUE.fullmatch(value)), None)
        if wrong is not None:
            advice = f"; {self.login.hint}" if wrong.lower() == "authorization" else ""
            raise self.failures.error(
                f"the header {wrong} cannot be sent to {self.login.url}: it holds a line break or a character that is"
                f" not ASCII{advice}"
            )

    def _secret_headers(self) -> tuple[str, ...]:
        harmless = {"user-agent", "accept-encoding", "x-mlflow-workspace"}
        return tuple(
            value for name, value in self._headers.items() if name.lower() not in harmless and len(value) >= _SECRET
        )


def exhausted(failure: BaseException, attempts: int, seconds: float) -> None:
    """Add to the text of an error how often and how long it was tried; for `RetryPolicy.call`."""
    if isinstance(failure, Transient) and attempts > 1:
        failure.error.args = (f"{failure.error} (tried {attempts} times in {seconds:.0f} s)",)


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, Transient) and not isinstance(error, LoginExpired)


def _stricter(policy: RetryPolicy, limit: RetryPolicy) -> RetryPolicy:
    attempts = [count for count in (policy.attempts, limit.attempts) if count is not None]
    return replace(policy, seconds=min(policy.seconds, limit.seconds), attempts=min(attempts, default=None))


def _configured(retry_for: float) -> RetryPolicy:
    """Return the policy with mlflow's own settings of retries."""
    retries = _number("MLFLOW_HTTP_REQUEST_MAX_RETRIES", math.inf)
    return replace(
        POLICY,
        seconds=retry_for,
        first_pause=_number("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", POLICY.first_pause),
        attempts=None if math.isinf(retries) else int(retries) + 1,
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


def _target(path: str) -> str:
    return path if path.startswith("/") else API + path


@lru_cache(64)  # parsing takes as long as the rest of a request's construction
def _parsed(url: str) -> httpx.URL:
    import httpx

    return httpx.URL(url)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return url.scheme, url.host, port


def _tls(url: str) -> ssl.SSLContext:
    tls = Tls.from_environ()
    if split_uri(url).scheme == "https" or tls.ca or tls.client:
        return tls.context()
    import ssl

    # No request to an http server uses it: redirects to https are not followed. It trusts nobody, and loading the
    # certificates of the system would take 20 ms.
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _environment_proxy(url: str) -> str | None:
    """Return the proxy that ``HTTP_PROXY``, ``HTTPS_PROXY`` and ``NO_PROXY`` name for a URL, read as urllib does.

    Servers on this machine are reached without one.
    """
    import urllib.request

    parts = split_uri(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or has_loopback_host(url) or urllib.request.proxy_bypass(parts.netloc):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _aiohttp_errors() -> tuple[type[Exception], ...]:
    # httpx-aiohttp passes on the errors for which httpx has no counterpart (aiohttp.ClientResponseError).
    import sys

    aiohttp = sys.modules.get("aiohttp")
    return (aiohttp.ClientError,) if aiohttp is not None else ()


def _warn_of_header_plugins() -> None:
    from importlib.metadata import entry_points

    for plugin in entry_points(group="mlflow.request_header_provider"):
        log.warning(
            "mlflow's plugin %r for request headers is not used: give the headers to RestTracking(headers=...)",
            plugin.name,
        )
