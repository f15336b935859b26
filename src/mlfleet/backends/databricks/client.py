"""A client of one Databricks workspace that keeps within its rate limits and retries failed requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, TypeVar

from mlfleet._concurrency.rate_limit import Pace
from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import FILES
from mlfleet.errors import BackendError, TrackingError
from mlfleet.tracking.databricks import DatabricksLogin
from mlfleet.tracking.errors import Transient
from mlfleet.tracking.http import ServerClient

__all__ = ["PAGE", "RETRY_SECONDS", "Timing", "Workspace", "WorkspaceError", "unless_missing"]

RETRY_SECONDS = 300.0
"""Seconds for which a failing request is retried."""

PAGE = 25
"""Runs on a page of ``runs/list``, which has no more."""

_IN_FLIGHT = 16
_READ_TIMEOUT = 60.0  # seconds without any byte of an answer
_CHUNK = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The intervals and rates of requests to a workspace.

    Attributes:
        fast: The interval in seconds between polls of young runs.
        visibility_delay: Seconds for which Databricks may answer that a new run does not exist.
        after_failure: The pause in seconds after a failed poll.
        quota_pause: The pause in seconds between two tries while the workspace takes no new jobs.
        rates: Requests per second by kind, see `Pace`. A workspace takes 35 of ``runs/submit``, 100 each of
            ``runs/get`` and ``runs/get-output``, 60 exports and 30 imports of workspace files, and 30 of DBFS:
            https://docs.databricks.com/aws/en/resources/limits
    """

    fast: float = 1.5
    visibility_delay: float = 30.0
    after_failure: float = 10.0
    quota_pause: float = 30.0
    rates: Mapping[str, float] = field(
        default_factory=lambda: {
            "jobs/runs/submit": 30.0,
            "jobs/runs/get": 80.0,
            "jobs/runs/get-output": 80.0,
            "jobs/runs/list": 20.0,
            "workspace/export": 50.0,
            "workspace-files/import-file": 25.0,
            "api/2.0/dbfs": 25.0,
        }
    )


T = TypeVar("T")


class WorkspaceError(BackendError):
    """A Databricks workspace refused something, or cannot be reached.

    Attributes:
        status: The HTTP status of the answer; None if there was no answer.
        code: The error code of Databricks; None if the answer had none.
    """

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message, backend="databricks")
        self.status = status
        self.code = code

    @property
    def missing(self) -> bool:
        """True if the requested thing does not exist."""
        return self.status == 404 or (self.status == 400 and "does not exist" in str(self))


class Workspace:
    """A client of one workspace.

    Args:
        profile: A profile of ``~/.databrickscfg``; None: the environment's variables, or the default profile.
        timing: The intervals of requests.
        version: The version of the Jobs API.

    Attributes:
        runs: The path of the runs in the Jobs API.
    """

    def __init__(self, profile: str | None, timing: Timing, *, version: str) -> None:
        self.runs = f"/api/{version}/jobs/runs"
        uri = f"databricks://{profile}" if profile else "databricks"
        self._login = DatabricksLogin(uri)
        self._transport = ServerClient(
            self._login,
            uri=uri,
            headers={},
            max_in_flight=_IN_FLIGHT,
            retry_for=RETRY_SECONDS,
            timeout=_READ_TIMEOUT,
            workspace="",
            files_in_flight=_IN_FLIGHT,
            pace=Pace(timing.rates),
        )
        self._users: SingleFlight[str, str] = SingleFlight(keep=True)

    async def open(self) -> None:
        """Find the workspace's URL and the login.

        Raises:
            WorkspaceError: The profile does not exist, or no way to log in was found.
        """
        with _as_workspace_errors():
            await self._transport.open()

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.close()

    @property
    def url(self) -> str:
        """The workspace's URL, known after `open`."""
        return self._login.url

    async def user(self) -> str:
        """Return the user name of the login; the home folder has the same name."""

        async def ask() -> str:
            return str((await self.call("GET", "/api/2.0/preview/scim/v2/Me")).get("userName") or "")

        return await self._users("", ask)

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Send a request that may be sent twice, with retries, and return the decoded answer.

        Args:
            method: The HTTP method.
            path: The path of the URL.
            body: The body, sent as JSON; None: no body.
            params: The query parameters.

        Raises:
            WorkspaceError: The workspace refuses the request, or still fails after `RETRY_SECONDS`.
        """
        return await self.retry(partial(self._transport.attempt, method, path, body=body, params=params))

    async def read_pages(self, path: str, params: Mapping[str, str]) -> AsyncIterator[dict[str, Any]]:
        """Yield the decoded answers of a GET request for a list, page by page.

        Raises:
            WorkspaceError: As for `call`.
        """
        query = dict(params)
        while True:
            page = await self.call("GET", path, params=query)
            yield page
            if not page.get("next_page_token"):
                return
            query["page_token"] = str(page["next_page_token"])

    async def get_run(self, number: str) -> dict[str, Any]:
        """Return the entry of ``runs/get`` for a run.

        Raises:
            WorkspaceError: As for `call`.
        """
        return await self.call("GET", f"{self.runs}/get", params={"run_id": number})

    async def list_runs(self, filters: Mapping[str, str]) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield the one-time runs of the workspace as ``runs/list`` shows them, page by page, newest first.

        Args:
            filters: Further query parameters.

        Raises:
            WorkspaceError: As for `call`.
        """
        params = {"run_type": "SUBMIT_RUN", "limit": str(PAGE), "expand_tasks": "false", **filters}
        async for page in self.read_pages(f"{self.runs}/list", params):
            yield page.get("runs") or []

    async def call_once(self, method: str, path: str, *, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send a request once, inside `retry`, which translates its errors. Return the decoded answer."""
        return await self._transport.attempt(method, path, body=body)

    async def retry(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Await `attempt()` until it succeeds, and return its result.

        Raises:
            WorkspaceError: The workspace refuses the request, or still fails after `RETRY_SECONDS`.
        """

        async def one() -> T:
            try:
                return await attempt()
            except TrackingError as error:
                if error.code == "COULD_NOT_ACQUIRE_LOCK":
                    raise Transient(error) from error
                raise

        with _as_workspace_errors():
            return await self._transport.retry(one)

    async def send_file(self, method: str, path: str, file: IO[bytes], size: int) -> None:
        """Send a file; each retry reads it from its beginning."""

        async def attempt() -> None:
            async with self._transport.stream(method, path, content=FILES.read(file, _CHUNK), size=size):
                pass

        await self.retry(attempt)

    async def read_file(self, path: str) -> bytes | None:
        """Return the content of a file; None if it does not exist."""

        async def attempt() -> bytes:
            async with self._transport.stream("GET", path) as answer:
                return await answer.aread()

        return await unless_missing(self.retry(attempt))

    async def file_size(self, path: str) -> int | None:
        """Return a file's size in bytes by a HEAD request; -1 if it is unknown, None if the file does not exist."""

        async def attempt() -> int:
            async with self._transport.stream("HEAD", path) as answer:
                return int(answer.headers.get("content-length") or -1)

        return await unless_missing(self.retry(attempt))


async def unless_missing(answer: Awaitable[T]) -> T | None:
    """Return what `answer` gives; None if the workspace does not have what it asks for."""
    try:
        return await answer
    except WorkspaceError as error:
        if error.missing:
            return None
        raise


@contextmanager
def _as_workspace_errors() -> Iterator[None]:
    try:
        yield
    except TrackingError as error:
        raise WorkspaceError(str(error), status=error.status, code=error.code) from error
