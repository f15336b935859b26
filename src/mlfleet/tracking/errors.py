"""Errors of requests to a tracking server, each turned into one clear message."""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlfleet._retry import RETRIED, parse_retry_after
from mlfleet._text.masking import mask
from mlfleet.errors import TrackingError
from mlfleet.tracking.auth import Login

__all__ = ["Answer", "Failures", "Garbled", "LoginExpired", "Transient", "Unreachable"]

_TEXT_LIMIT = 500
# SQLAlchemy's message when the connection pool of the server's database is exhausted. Servers answer it with 400, as if
# the request were at fault.
_NO_CONNECTION = "QueuePool limit"
_POOL_ADVICE = (
    "; it gets more requests than it has connections to its database: give it more "
    "(MLFLOW_SQLALCHEMYSTORE_POOL_SIZE), or lower max_in_flight of RestTracking"
)
_TITLE = re.compile(r"<title>\s*(.*?)\s*</title>", re.I | re.S)


class Transient(Exception):
    """A failure that may be gone at the next attempt. It does not leave this package.

    Attributes:
        error: The error to raise when there is no further attempt.
        executed: True if the server may have executed the request.
        retry_after: The pause that the server asked for, in seconds.
    """

    def __init__(self, error: TrackingError, *, executed: bool = True, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.executed = executed
        self.retry_after = retry_after


class Unreachable(Transient):
    """No connection was made, or it broke before the first byte of an answer."""


class Garbled(Transient):
    """A well-formed answer that belongs to another request, or to none."""


class LoginExpired(Transient):
    """A refusal after which a renewed login may help, once.

    Attributes:
        renew: Logs in again; returns True if the next attempt has other headers.
    """

    def __init__(self, error: TrackingError, renew: Callable[[], Awaitable[bool]]) -> None:
        super().__init__(error, executed=False)
        self.renew = renew


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request, read to its end.

    Attributes:
        status: The HTTP status code.
        headers: The headers; their names are found in any case.
        body: The decoded content.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The content as text."""
        return self.body.decode(errors="replace")

    @property
    def is_page(self) -> bool:
        """True for a web page. Servers in Flask call plain text ("Permission denied") HTML."""
        begin = self.body[:64].lstrip().lower()
        return begin.startswith(b"<!doctype") or ("html" in self.headers.get("content-type", "") and begin[:1] == b"<")


class Failures:
    """Makes the errors about one server.

    Args:
        uri: The tracking URI as the caller gave it.
        url: The URL of the server.
        login: The login, which names the kind of server and what to do if it refuses or cannot be reached.
        secrets: Texts to mask in messages, besides those of the login.
        is_own_transport: True if the transport is httpx's own, whose errors tell whether a request was sent.
    """

    def __init__(
        self, *, uri: str, url: str, login: Login, secrets: Sequence[str], is_own_transport: bool = True
    ) -> None:
        self._login = login
        self._secrets = secrets
        self._is_own_transport = is_own_transport
        self._url = self._masked(url)
        self._uri = self._masked(uri)
        self._server = f"{login.noun} {self._url}"

    def error(self, text: str, *, status: int | None = None, code: str | None = None) -> TrackingError:
        """Return an error about this server, with the secrets masked."""
        return TrackingError(self._masked(text), uri=self._uri, status=status, code=code)

    def _masked(self, text: str) -> str:
        # The login's tokens change, so its secrets are read each time.
        return mask(text, (*self._login.secrets(), *self._secrets))

    def of_answer(self, what: str, answer: Answer) -> Transient | TrackingError:
        """Return the error for an answer whose status is not a success.

        Args:
            what: The request, in a few words: ``runs/create``.
            answer: Its answer.
        """
        code, message = _code_and_message(answer)
        text = f"the {self._server} answered {what} with {answer.status}"
        if code or message:
            text += ": " + " ".join(part for part in (code, message) if part)
        elif answer.is_page:
            text += f" and a web page{_page_title(answer)}"
        is_starved = _NO_CONNECTION in message
        text += _POOL_ADVICE if is_starved else self._advice(answer.status, code)
        error = self.error(text, status=answer.status, code=code)
        if answer.status not in RETRIED and not is_starved:
            return error
        # A refusal that MLflow itself words (429 of Databricks, with an error code) was certainly not executed.
        executed = not (answer.status == 429 and code)
        return Transient(error, executed=executed, retry_after=parse_retry_after(answer.headers))

    def of_no_json(self, what: str, answer: Answer) -> TrackingError:
        """Return the error for a success that is not an answer of MLflow's API: a login page, another service."""
        kind = f"a web page{_page_title(answer)}" if answer.is_page else "something that is not JSON"
        return self.error(
            f"{self._url} answered {what} with {kind}: is this an MLflow server, and does nothing in between ask for a "
            "login?",
            status=answer.status,
        )

    def of_garbled(self, what: str) -> Garbled:
        """Return the error for a JSON object that does not answer the request."""
        text = f"the {self._server} answered {what} with something that does not belong to this request"
        return Garbled(self.error(text))

    def of_long_answer(self, what: str, status: int, limit: int) -> TrackingError:
        """Return the error for an answer that is larger than `limit` bytes."""
        text = f"the {self._server} answered {what} with more than {limit // 2**20} MiB: is this an MLflow server?"
        return self.error(text, status=status)

    def of_encoding(self, what: str, encoding: str, status: int) -> TrackingError:
        """Return the error for a content encoding that the request did not accept."""
        text = f"the {self._server} answered {what} in the content encoding {encoding[:50]!r}, which was not asked for"
        return self.error(text, status=status)

    def of_redirect(self, what: str, place: str, status: int) -> TrackingError:
        """Return the error for a redirect that would change the request or the server."""
        return self.error(
            f"the {self._server} redirects {what} to {place[:200]}: give the URI of the server itself", status=status
        )

    def of_exception(self, what: str, problem: Exception) -> Transient | TrackingError:
        """Return the error for an exception of httpx or of a transport."""
        import httpx

        if isinstance(problem, httpx.UnsupportedProtocol | httpx.LocalProtocolError | httpx.InvalidURL | ValueError):
            return self.error(f"{what} cannot be sent to {self._url}: {problem}")
        reason = _reason(problem)
        causes = list(_causes(problem))
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
            return self.error(
                f"the certificate of {self._url} is not trusted: {reason}; name its certificate authority in "
                "MLFLOW_TRACKING_SERVER_CERT_PATH"
            )
        if isinstance(problem, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
            if any(isinstance(cause, ssl.SSLError) for cause in causes):
                return self.error(f"no TLS connection to {self._url}: {reason}; is it http:// rather than https://?")
            # Transports of others may report a lost answer as a lost connection: httpx-aiohttp 0.1 makes ConnectTimeout
            # of aiohttp's ServerDisconnectedError. Only what the system says counts then.
            executed = not self._is_own_transport and not any(
                isinstance(cause, ConnectionRefusedError | socket.gaierror) for cause in causes
            )
            text = f"the {self._server} cannot be reached: {reason}; {self._login.remedy}"
            return Unreachable(self.error(text), executed=executed)
        error = self.error(f"the {self._server} did not answer {what}: {reason}")
        return Transient(error) if isinstance(problem, httpx.TimeoutException | TimeoutError) else Unreachable(error)

    def _advice(self, status: int, code: str | None) -> str:
        if status in (401, 403):
            return f"; {self._login.hint}"
        if status == 404 and code is None:
            return "; is this an MLflow server, and is the path of the tracking URI right?"
        if status == 413 and code is None:
            return "; the proxy before the server takes no files of this size (nginx: client_max_body_size)"
        return ""


def _code_and_message(answer: Answer) -> tuple[str | None, str]:
    """Return MLflow's error code and message, if the answer holds them."""
    try:
        content: Any = json.loads(answer.body)
    except (ValueError, RecursionError):
        return None, "" if answer.is_page else _cut(answer.text)
    if not isinstance(content, dict):
        return None, _cut(answer.text)
    code = content.get("error_code")
    # The first line of a database's error is followed by the statement and its values.
    message = str(content.get("message") or "").partition("\n[SQL:")[0]
    return (str(code) if code else None), _cut(message)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _TEXT_LIMIT else text[:_TEXT_LIMIT] + "…"


def _page_title(answer: Answer) -> str:
    match = _TITLE.search(answer.text[:10_000])
    return f" ({_cut(match[1])[:80]})" if match else ""


def _causes(problem: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    waiting = [problem]
    while waiting:
        cause = waiting.pop(0)
        if cause in seen:
            continue
        seen.append(cause)
        yield cause
        waiting += [next_ for next_ in (cause.__cause__, cause.__context__) if next_ is not None]
        if isinstance(cause, BaseExceptionGroup):
            waiting += cause.exceptions


def _reason(problem: Exception) -> str:
    import httpx

    causes = list(_causes(problem))
    for cause in causes:
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, socket.gaierror):
            return "no such host"
        # aiohttp's own errors are of these types, too, but only repeat the message of their cause.
        if isinstance(cause, ssl.SSLError) and getattr(cause, "reason", None):
            return str(getattr(cause, "verify_message", "") or cause.reason)
    if isinstance(problem, httpx.TimeoutException | TimeoutError):
        return "no answer in time"
    text = next((str(cause) for cause in causes if str(cause)), "")
    return _cut(text) or type(problem).__name__
