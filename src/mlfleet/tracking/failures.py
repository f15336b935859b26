"""Turns what goes wrong between us and a tracking server into one clear error."""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mlfleet._text.masking import mask
from mlfleet.errors import TrackingError
from mlfleet.tracking.auth import Login
from mlfleet.tracking.retry import RETRIED, Transient, retry_after

if TYPE_CHECKING:
    import httpx

__all__ = ["Failures"]

_LIMIT = 500
# What SQLAlchemy tells the server when the pool of its database has none left. Servers answer it with 400, as if the
# request were at fault.
_NO_CONNECTION = "QueuePool limit"
_POOL_ADVICE = (
    "; it gets more requests than it has connections to its database: give it more "
    "(MLFLOW_SQLALCHEMYSTORE_POOL_SIZE), or lower max_in_flight of RestTracking"
)
_TITLE = re.compile(r"<title>\s*(.*?)\s*</title>", re.I | re.S)


class Failures:
    """Knows what to say about the failures of one server.

    Args:
        uri: the tracking URI as the caller gave it.
        url: of the server.
        login: what it is, and what to do if it refuses or is not there.
        secrets: what must not be seen, besides those of the login.
    """

    def __init__(self, *, uri: str, url: str, login: Login, secrets: Sequence[str]) -> None:
        self._login = login
        self._secrets = secrets
        self._url = self._masked(url)
        self._uri = self._masked(uri)
        self._server = f"{login.noun} {self._url}"

    def error(self, text: str, *, status: int | None = None, code: str | None = None) -> TrackingError:
        """An error about this server, with nothing secret in it."""
        return TrackingError(self._masked(text), uri=self._uri, status=status, code=code)

    def _masked(self, text: str) -> str:
        # The login is asked each time: its tokens may change.
        return mask(text, (*self._login.secrets(), *self._secrets))

    def of_answer(self, what: str, answer: httpx.Response) -> Transient | TrackingError:
        """What an answer that is no success means.

        Args:
            what: the request, in a few words: ``runs/create``.
            answer: its answer, read to the end.
        """
        status = answer.status_code
        code, message = _told(answer)
        text = f"the {self._server} answered {what} with {status}"
        if code or message:
            text += ": " + " ".join(part for part in (code, message) if part)
        elif _is_page(answer):
            text += f" and a web page{_page_title(answer)}"
        starved = _NO_CONNECTION in message
        text += _POOL_ADVICE if starved else self._advice(status, code)
        error = self.error(text, status=status, code=code)
        if status not in RETRIED and not starved:
            return error
        return Transient(error, executed=status != 429, retry_after=retry_after(answer.headers))

    def of_no_json(self, what: str, answer: httpx.Response) -> TrackingError:
        """A success whose content is no answer of MLflow's API: a login page, another service."""
        kind = f"a web page{_page_title(answer)}" if _is_page(answer) else "something that is not JSON"
        return self.error(
            f"{self._url} answered {what} with {kind}: is this an MLflow server, and does nothing in between ask for a "
            "login?",
            status=answer.status_code,
        )

    def of_redirect(self, what: str, answer: httpx.Response) -> TrackingError:
        """A redirect that cannot be followed without changing what is asked, or whom."""
        place = answer.headers.get("location", "")
        return self.error(
            f"the {self._server} redirects {what} to {place[:200]}: give the URI of the server itself",
            status=answer.status_code,
        )

    def of_exception(self, what: str, problem: Exception) -> Transient | TrackingError:
        """What an exception of httpx means."""
        import httpx

        if isinstance(problem, httpx.UnsupportedProtocol | httpx.LocalProtocolError | httpx.InvalidURL | ValueError):
            return self.error(f"{what} cannot be sent to {self._url}: {problem}")
        reason = _reason(problem)
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(problem)):
            return self.error(
                f"the certificate of {self._url} is not trusted: {reason}; name its certificate authority in "
                "MLFLOW_TRACKING_SERVER_CERT_PATH"
            )
        if isinstance(problem, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
            if any(isinstance(cause, ssl.SSLError) for cause in _causes(problem)):
                return self.error(f"no TLS connection to {self._url}: {reason}; is it http:// rather than https://?")
            text = f"the {self._server} cannot be reached: {reason}; {self._login.remedy}"
            return Transient(self.error(text), connected=False, executed=False)
        return Transient(self.error(f"the {self._server} did not answer {what}: {reason}"))

    def _advice(self, status: int, code: str | None) -> str:
        if status in (401, 403):
            return f"; {self._login.hint}"
        if status == 404 and code is None:
            return "; is this an MLflow server, and is the path of the tracking URI right?"
        if status == 413 and code is None:
            return "; what stands before the server takes no such large files (nginx: client_max_body_size)"
        return ""


def _told(answer: httpx.Response) -> tuple[str | None, str]:
    """MLflow's error code and message, where the answer holds them."""
    try:
        told: Any = json.loads(answer.content)
    except ValueError:
        return None, "" if _is_page(answer) else _cut(answer.text)
    if not isinstance(told, dict):
        return None, _cut(answer.text)
    code = told.get("error_code")
    # What follows the first line of a database's error is the statement and its values.
    message = str(told.get("message") or "").partition("\n[SQL:")[0]
    return (str(code) if code else None), _cut(message)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LIMIT else text[:_LIMIT] + "…"


def _is_page(answer: httpx.Response) -> bool:
    # Servers in Flask say "Permission denied" in a text that they call HTML.
    begin = answer.content[:64].lstrip().lower()
    return begin.startswith(b"<!doctype") or ("html" in answer.headers.get("content-type", "") and begin[:1] == b"<")


def _page_title(answer: httpx.Response) -> str:
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
        # aiohttp's own errors are of these types, too, but only repeat what is in the one that they stand for.
        if isinstance(cause, ssl.SSLError) and getattr(cause, "reason", None):
            return str(getattr(cause, "verify_message", "") or cause.reason)
    if isinstance(problem, httpx.TimeoutException):
        return "no answer in time"
    told = next((str(cause) for cause in causes if str(cause)), "")
    return _cut(told) or type(problem).__name__
