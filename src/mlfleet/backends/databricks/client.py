"""Requests to one Databricks workspace: within its limits, tried again where that is worth it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, TypeVar

import anyio

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import FILES
from mlfleet.errors import BackendError, TrackingError
from mlfleet.tracking.databricks import DatabricksLogin
from mlfleet.tracking.errors import Transient
from mlfleet.tracking.http import ServerClient

__all__ = ["PATIENCE", "Timing", "Workspace", "WorkspaceError"]

PATIENCE = 300.0
"""Seconds for which a request is tried again."""

_IN_FLIGHT = 16
_ANSWER = 60.0  # seconds without any byte of an answer
_CHUNK = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How often a workspace is asked; seconds, where nothing else is said.

    Attributes:
        young: the age up to which a run is polled often.
        fast: between polls of young runs.
        slow: between polls of old runs, at most.
        not_yet: for which a new run may not be known everywhere in Databricks.
        after_failure: between polls while they fail.
        paces: requests a second by kind. A workspace takes 35, 100 and 100:
            https://docs.databricks.com/aws/en/resources/limits
    """

    young: float = 60.0
    fast: float = 1.5
    slow: float = 30.0
    not_yet: float = 30.0
    after_failure: float = 10.0
    paces: Mapping[str, float] = field(
        default_factory=lambda: {"runs/submit": 30.0, "runs/get": 80.0, "runs/get-output": 80.0, "runs/list": 20.0}
    )


T = TypeVar("T")


class WorkspaceError(BackendError):
    """A Databricks workspace refused something, or cannot be reached.

    Attributes:
        status: the HTTP status of its answer; None if there was none.
        code: Databricks' error code, if it told one.
    """

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message, backend="databricks")
        self.status = status
        self.code = code

    @property
    def missing(self) -> bool:
        """Whether what was asked for does not exist."""
        return self.status == 404 or (self.status == 400 and "does not exist" in str(self))


class Workspace:
    """One workspace. It is opened at its first use.

    Args:
        profile: A profile of ``~/.databrickscfg``; None: the environment's variables, or the default profile.
        timing: The intervals of requests.
        version: The version of the Jobs API.
    """

    def __init__(self, profile: str | None, timing: Timing, *, version: str = "2.2") -> None:
        self._version = version
        uri = f"databricks://{profile}" if profile else "databricks"
        self._login = DatabricksLogin(uri)
        self._transport = ServerClient(
            self._login,
            uri=uri,
            headers={},
            max_in_flight=_IN_FLIGHT,
            retry_for=PATIENCE,
            timeout=_ANSWER,
            files_in_flight=_IN_FLIGHT,
        )
        self._opening: SingleFlight[str, None] = SingleFlight(keep=True)
        self._users: SingleFlight[str, str] = SingleFlight(keep=True)
        self._paces = {name: _Pace(per_second) for name, per_second in timing.paces.items()}

    async def open(self) -> None:
        """Find out where it is and who we are.

        Raises:
            WorkspaceError: there is no such profile, or no way to log in.
        """
        with _translated():
            await self._opening("", self._transport.open)

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.close()

    @property
    def url(self) -> str:
        """Its address, once it is open."""
        return self._login.url

    async def user(self) -> str:
        """The name of who we are there, which its home folder has, too."""

        async def ask() -> str:
            return str((await self.call("GET", "/api/2.0/preview/scim/v2/Me")).get("userName") or "")

        return await self._users("", ask)

    async def jobs(
        self,
        method: str,
        what: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        version: str | None = None,
    ) -> dict[str, Any]:
        """Ask the Jobs API.

        Args:
            method: The HTTP method.
            what: the path below ``jobs/``, such as ``runs/get``.
            body: to be sent as JSON.
            params: The query parameters.
            version: The version of the API; None: the one of this workspace.
        """
        pace = self._paces.get(what)
        path = f"/api/{version or self._version}/jobs/{what}"
        return await self.call(method, path, body=body, params=params, pace=pace)

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        pace: _Pace | None = None,
    ) -> dict[str, Any]:
        """Ask for something that may be done twice.

        Raises:
            WorkspaceError: it is refused, or patience is at its end.
        """

        async def attempt() -> dict[str, Any]:
            if pace is not None:
                await pace.turn()
            return await self._transport.attempt(method, path, body=body, params=params)

        return await self.again(attempt)

    async def attempt(self, method: str, path: str, *, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask once. For use inside `again`, whose errors it raises."""
        return await self._transport.attempt(method, path, body=body)

    async def again(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Await `attempt()` until it succeeds, is refused, or patience is at its end."""

        async def one() -> T:
            try:
                return await attempt()
            except TrackingError as error:
                if error.code == "COULD_NOT_ACQUIRE_LOCK":
                    raise Transient(error) from error
                raise

        await self.open()
        with _translated():
            return await self._transport.retry(one)

    async def send_file(self, method: str, path: str, file: IO[bytes], size: int) -> None:
        """Send a file, from its beginning at each try."""

        async def attempt() -> None:
            async with self._transport.stream(method, path, content=_chunks(file), size=size):
                pass

        await self.again(attempt)

    async def read_file(self, path: str) -> bytes | None:
        """The content of a file; None if there is none."""

        async def attempt() -> bytes:
            async with self._transport.stream("GET", path) as answer:
                return await answer.aread()

        try:
            return await self.again(attempt)
        except WorkspaceError as error:
            if error.missing:
                return None
            raise

    async def file_size(self, path: str) -> int | None:
        """What HEAD tells of a file's size; None if there is none."""

        async def attempt() -> int:
            async with self._transport.stream("HEAD", path) as answer:
                return int(answer.headers.get("content-length") or -1)

        try:
            return await self.again(attempt)
        except WorkspaceError as error:
            if error.missing:
                return None
            raise


class _Pace:
    """Keeps requests of one kind within a rate, also after the event loop was held up."""

    def __init__(self, per_second: float) -> None:
        self._gap = 1.0 / per_second
        self._next = 0.0
        self._lock = anyio.Lock()

    async def turn(self) -> None:
        async with self._lock:
            if (left := self._next - time.monotonic()) > 0:
                await anyio.sleep(left)
            self._next = time.monotonic() + self._gap


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except TrackingError as error:
        raise WorkspaceError(str(error), status=error.status, code=error.code) from error


async def _chunks(file: IO[bytes]) -> AsyncIterator[bytes]:
    await FILES.run(partial(file.seek, 0))
    while data := await FILES.run(partial(file.read, _CHUNK)):
        yield data
