"""Tracking on an MLflow server, or on Databricks, over HTTP; mlflow itself is not needed."""

from __future__ import annotations

import asyncio
import os
import posixpath
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from mlfleet._concurrency.cancellation import complete, wait_done
from mlfleet._concurrency.rate_limit import Pace
from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import FILES
from mlfleet._run_log import get_logger
from mlfleet._text.masking import mask_uri
from mlfleet.errors import TrackingError
from mlfleet.runs import DEFAULT_CANCEL_GRACE, RunStatus
from mlfleet.tracking.artifacts import Artifacts
from mlfleet.tracking.auth import Credentials, ServerLogin
from mlfleet.tracking.base import RunInfo, Tracking
from mlfleet.tracking.databricks import EXPERIMENT_ADVICE, RATES, DatabricksLogin, experiment_path, is_databricks
from mlfleet.tracking.databricks_artifacts import DatabricksArtifacts
from mlfleet.tracking.errors import Transient
from mlfleet.tracking.http import POLICY, ServerClient
from mlfleet.tracking.models import (
    SUBMISSION_TAG,
    Lengths,
    batches,
    checked_id,
    deleted_experiment,
    pairs,
    run_info,
    shortened,
    user_name,
)

if TYPE_CHECKING:
    import httpx

__all__ = ["MAX_IN_FLIGHT", "RestTracking"]

log = get_logger("mlfleet.tracking")

# MLflow's server takes up to three connections to its database for one request, of the 15 that its pool has unless told
# otherwise. Eight requests that hold two each would wait for a third until they are refused, half a minute later.
MAX_IN_FLIGHT = 7
# The longest values of parameters and tags that servers take: of MLflow 2.9 and newer, 1.28, and before that.
_LENGTHS: tuple[Lengths, ...] = ((6000, 8000), (500, 5000), (250, 250))
_DEFAULT_EXPERIMENT = "0"
_PAGE = 1000
_LOOK_SECONDS = 5.0  # for a last search after a creation has failed
_SEARCH_PAUSE = 0.5  # seconds between two searches for a run whose creation was cancelled
# Where a server tells about itself; the second is the name that MLflow 3.10 had for it.
_SERVER_INFO = ("/api/3.0/mlflow/server-info", "/api/3.0/mlflow/server-features")


class RestTracking(Tracking):
    """An MLflow server (``http``, ``https``) or a Databricks workspace (``databricks``, ``databricks://profile``).

    Use it inside ``async with``. Requests are tried again when the connection breaks and on the statuses 408, 429, 500,
    502, 503 and 504, and when the server's database had no connection left for them.

    Args:
        uri: The URI of the server; ``user:password@`` in it is taken out and never shown.
        credentials: The credentials; None: the ``MLFLOW_TRACKING_*`` variables, ``~/.mlflow/credentials``, and
            ``~/.netrc``.
        headers: Headers to send with every request. Plugins of mlflow for headers or authentication are not used.
        retry_for: Seconds for which a call keeps trying. A server that never answered yet is given up after 5 seconds.
        max_in_flight: The number of requests at the same time; the others wait their turn. A server that gets more than
            its database has connections for waits for itself: see "How many requests at once" in docs/tracking.md.
        timeout: Seconds for one request and its whole answer, after which it counts as lost (for files: seconds without
            a byte); None: ``MLFLOW_HTTP_REQUEST_TIMEOUT``, else 120.
        workspace: The MLflow workspace of the server; empty: its default one; None: ``MLFLOW_WORKSPACE``.
        client: An httpx client of yours to send all requests by, for a proxy, certificates or authentication of your
            own. It stays open when the tracking is closed. Its timeouts and redirects are not used.
        transport: An httpx transport of yours, such as the one of httpx-aiohttp. It is closed with the tracking.

    Raises:
        UsageError: The URI or a number makes no sense, or `client` and `transport` are both given.
    """

    def __init__(
        self,
        uri: str,
        *,
        credentials: Credentials | None = None,
        headers: Mapping[str, str] | None = None,
        retry_for: float = POLICY.seconds,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout: float | None = None,
        workspace: str | None = None,
        client: httpx.AsyncClient | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.uri = mask_uri(uri)
        self._on_databricks = is_databricks(uri)
        # The caller's own credentials must not be replaced by those of ~/.netrc.
        is_given = client is not None or any(name.lower() == "authorization" for name in headers or ())
        login = DatabricksLogin(uri) if self._on_databricks else ServerLogin(uri, credentials, read_netrc=not is_given)
        if isinstance(login, ServerLogin):
            self.uri = mask_uri(login.url)
        self._client = ServerClient(
            login,
            uri=self.uri,
            headers=headers or {},
            retry_for=retry_for,
            max_in_flight=max_in_flight,
            timeout=timeout,
            # Databricks has workspaces of another kind.
            workspace="" if self._on_databricks else workspace,
            client=client,
            transport=transport,
            pace=Pace(RATES) if self._on_databricks else None,
        )
        self._artifacts = DatabricksArtifacts(self._client) if self._on_databricks else Artifacts(self._client)
        self._experiments: SingleFlight[str, str] = SingleFlight(keep=True)
        self._user = ""

    async def __aenter__(self) -> Self:
        await self._client.open()
        try:
            await self._check_workspace()
            # Fill the cache here, in a thread: getuser() may read /etc/passwd.
            self._user = await FILES.run(user_name)
        except BaseException:
            await complete(self._client.close)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await complete(self._client.close)

    async def environ(self) -> tuple[dict[str, str], dict[str, str]]:  # noqa: D102 - told by Tracking
        plain, secret = await self._client.environ()
        if (workspace := self._client.workspace) or os.environ.get("MLFLOW_WORKSPACE"):
            plain["MLFLOW_WORKSPACE"] = workspace
        return plain, secret

    async def experiment_id(self, name: str) -> str:  # noqa: D102
        if self._on_databricks:
            name = experiment_path(name)
        return await self._experiments(name, partial(self._find_or_create_experiment, name))

    async def create_run(  # noqa: D102
        self, experiment_id: str, *, name: str | None, tags: Mapping[str, str], start_time: int | None = None
    ) -> RunInfo:
        submission = tags.get(SUBMISSION_TAG) or os.urandom(16).hex()
        body: dict[str, Any] = {
            "experiment_id": experiment_id,
            "user_id": tags.get("mlflow.user", self._user),
            "start_time": _now() if start_time is None else start_time,
            "tags": pairs({**tags, SUBMISSION_TAG: submission}),
        }
        if name is not None:
            body["run_name"] = name
        try:
            return await _Creation(self._client, experiment_id, body, submission).run()
        except TrackingError as error:
            if self._on_databricks and experiment_id == _DEFAULT_EXPERIMENT and error.status in (400, 404):
                text = f"the run has no experiment, and a Databricks workspace has no default one; {EXPERIMENT_ADVICE}"
                raise self._client.failures.error(text, status=error.status, code=error.code) from error
            raise

    async def get_run(self, run_id: str, *, retry_for: float | None = None) -> RunInfo:  # noqa: D102
        answer = await self._client.call(
            "GET",
            "runs/get",
            params={"run_id": run_id},
            retry_for=retry_for,
            check=lambda answer: _run_id(answer.get("run")) == run_id,
        )
        return run_info(answer.get("run", {}))

    async def search_runs(  # noqa: D102
        self, experiment_ids: Sequence[str], filter_string: str = "", *, max_results: int = 1000
    ) -> list[RunInfo]:
        found: list[RunInfo] = []
        body: dict[str, Any] = {"experiment_ids": list(experiment_ids), "filter": filter_string}
        while len(found) < max_results:
            body["max_results"] = min(_PAGE, max_results - len(found))
            answer = await self._client.call("POST", "runs/search", body=body, check=_is_search)
            found += [run_info(raw) for raw in answer.get("runs") or ()]
            if not answer.get("next_page_token"):
                break
            body["page_token"] = answer["next_page_token"]
        return found[:max_results]

    async def log(  # noqa: D102
        self, run_id: str, *, params: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        for some_params, some_tags in batches(params or {}, tags or {}):
            await self._log_batch(run_id, some_params, some_tags)

    async def update_run(  # noqa: D102
        self, run_id: str, status: RunStatus, *, end_time: int | None = None, retry_for: float | None = None
    ) -> None:
        body: dict[str, Any] = {"run_id": run_id, "status": status.value}
        if status.is_terminal:
            body["end_time"] = _now() if end_time is None else end_time
        await self._client.call(
            "POST",
            "runs/update",
            body=body,
            retry_for=retry_for,
            check=lambda answer: _run_id({"info": answer.get("run_info")}) in (run_id, None),
        )

    async def log_artifact(self, run: RunInfo, path: Path, artifact_path: str | None = None) -> None:  # noqa: D102
        await self._artifacts.upload(run.artifact_uri, path, artifact_path)

    async def download(self, uri: str, folder: Path) -> Path:  # noqa: D102
        return await self._artifacts.download(uri, folder)

    async def _check_workspace(self) -> None:
        """Check that the server knows workspaces, if one is asked for; another would put the runs into no workspace.

        Raises:
            TrackingError: The server has no workspaces, or cannot be reached.
        """
        workspace = self._client.workspace
        if not workspace:
            return
        for path in _SERVER_INFO:
            try:
                info = await self._client.call("GET", path)
            except TrackingError as error:
                if error.status != 404:
                    raise
            else:
                if info.get("workspaces_enabled"):
                    return
                break
        raise self._client.failures.error(
            f"the workspace {workspace!r} cannot be used: {self._client.login.url} has no workspaces; unset "
            "MLFLOW_WORKSPACE, or start the server with --enable-workspaces (MLflow 3.10 or newer)"
        )

    async def _find_or_create_experiment(self, name: str) -> str:
        found = await self._experiment(name)
        if found is None:
            try:
                return await self._create_experiment(name)
            except TrackingError as error:
                # Another client created it first, or the answer to our own request was lost.
                if error.code != "RESOURCE_ALREADY_EXISTS" or (found := await self._experiment(name)) is None:
                    raise
        if found.get("lifecycle_stage") == "deleted":
            raise deleted_experiment(name, checked_id(found.get("experiment_id")))
        return checked_id(found.get("experiment_id"))

    async def _create_experiment(self, name: str) -> str:
        """Create an experiment and, on Databricks, the folders that its name is in."""
        body = {"name": name}
        try:
            answer = await self._client.call("POST", "experiments/create", body=body)
        except TrackingError as error:
            if not self._on_databricks or error.status not in (400, 404) or error.code == "RESOURCE_ALREADY_EXISTS":
                raise
            folder = posixpath.dirname(name)
            if not folder.startswith("/") or error.status == 400:
                text = f"{error}; {EXPERIMENT_ADVICE}"
                raise self._client.failures.error(text, status=error.status, code=error.code) from error
            await self._client.call("POST", "/api/2.0/workspace/mkdirs", body={"path": folder})
            answer = await self._client.call("POST", "experiments/create", body=body)
        return checked_id(answer.get("experiment_id"))

    async def _experiment(self, name: str) -> Mapping[str, Any] | None:
        path = f"experiments/get-by-name?experiment_name={quote(name, safe='')}"
        try:
            return (await self._client.call("GET", path)).get("experiment")
        except TrackingError as error:
            if error.code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    async def _log_batch(self, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        lengths = iter(_LENGTHS)
        while True:
            try:
                await self._client.call(
                    "POST", "runs/log-batch", body={"run_id": run_id, "params": pairs(params), "tags": pairs(tags)}
                )
                return
            except TrackingError as error:
                if error.status != 400:
                    raise
                # Newer servers cut long values themselves; what others take, only their refusal tells.
                for longest in lengths:
                    params, tags, cut = shortened(params, tags, longest)
                    if cut:
                        log.warning(
                            "run %s: the server does not take values of this length, they are cut: %s",
                            run_id,
                            ", ".join(cut),
                        )
                        break
                else:
                    raise


class _Creation:
    """The creation of exactly one run, on a server that knows no idempotent requests.

    Whenever it is unclear if the server has made the run, it is looked for by its submission tag:

    what happened                            the run exists?  next
    ───────────────────────────────────────  ───────────────  ─────────────────────────────────────────────
    no connection                            no               ask again
    redirect, 4xx but 408 and 429            no               raise the error
    lost or garbled answer, 408, 429, 5xx    perhaps          look; if it is not there, ask again (429 with an error
                                                              code of MLflow's: ask again)
    any other answer that is not a run       perhaps          look; if it is not there, raise the error
    cancelled                                perhaps          look until the grace is over; set it to KILLED

    Args:
        client: The client of the server.
        experiment_id: The id of the run's experiment.
        body: The content of ``runs/create``, with the submission among its tags.
        submission: The value of `SUBMISSION_TAG`.
    """

    def __init__(self, client: ServerClient, experiment_id: str, body: Mapping[str, Any], submission: str) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._body = body
        self._submission = submission
        self._is_cancelled = False
        self._is_sending = False
        self._is_unclear = False

    async def run(self) -> RunInfo:
        """Create the run. If the caller is cancelled, a run that was made is set to KILLED.

        Raises:
            TrackingError: The server refused, or it is unclear after all if it has made the run.
        """
        # A task of its own: a server goes on with a request whose client is gone, so a cancelled caller has to wait for
        # the answer, which tells when the server is done.
        creating = asyncio.ensure_future(self._create())
        try:
            await asyncio.wait([creating])
        except asyncio.CancelledError:
            self._is_cancelled = True
            await complete(partial(self._end_unwanted, creating))
            raise
        return creating.result()

    async def _create(self) -> RunInfo:
        try:
            return await self._client.retry(self._attempt)
        except TrackingError as error:
            if self._is_unclear and not self._is_cancelled and (made := await self._find_made()):
                log.warning("run %s was created, although the answer was: %s", made.run_id, error)
                return made
            raise

    async def _attempt(self) -> RunInfo:
        if self._is_unclear and (made := await self._look()):
            return made[0]
        was_unclear = self._is_unclear
        try:
            answer = await self._client.attempt(
                "POST", "runs/create", body=self._body, check=self._is_ours, before=self._note_sending
            )
        except Transient as failure:
            self._is_unclear = was_unclear or failure.executed
            if self._is_cancelled:
                raise asyncio.CancelledError from failure
            raise
        except TrackingError as error:
            is_success = error.status is not None and error.status < 300
            self._is_unclear = was_unclear or is_success
            raise
        finally:
            self._is_sending = False
        run = run_info(answer.get("run", {}))
        self._is_unclear = False
        if was_unclear:
            await self._delete_twins(run)
        return run

    def _note_sending(self) -> None:
        if self._is_cancelled:
            raise asyncio.CancelledError
        self._is_sending = self._is_unclear = True

    def _is_ours(self, answer: Mapping[str, Any]) -> bool:
        """Return False for the answer to another request, such as the creation of another run."""
        if _run_id(answer.get("run")) is None:
            return False
        try:
            tags = {tag["key"]: tag.get("value") for tag in answer["run"]["data"]["tags"]}
        except (KeyError, TypeError, AttributeError):
            return True
        return bool(tags.get(SUBMISSION_TAG, self._submission) == self._submission)

    async def _look(self) -> list[RunInfo]:
        wanted = f"tags.`{SUBMISSION_TAG}` = '{self._submission}'"
        body = {"experiment_ids": [self._experiment_id], "filter": wanted, "max_results": 10}
        answer = await self._client.attempt("POST", "runs/search", body=body, check=_is_search)
        found = [run_info(raw) for raw in answer.get("runs") or ()]
        return [run for run in found if run.tags.get(SUBMISSION_TAG) == self._submission]

    async def _find_made(self) -> RunInfo | None:
        try:
            return next(iter(await self._client.retry(self._look, _LOOK_SECONDS)), None)
        except TrackingError:
            log.warning("a run may be left RUNNING: %s", self._place)
            return None

    async def _delete_twins(self, run: RunInfo) -> None:
        """Delete what an earlier request has made after it was looked for."""
        for twin in await self._client.retry(self._look):
            if twin.run_id != run.run_id:
                log.warning("the run %s was created twice: %s is deleted", run.run_id, twin.run_id)
                await self._client.call("POST", "runs/delete", body={"run_id": twin.run_id})

    async def _end_unwanted(self, creating: asyncio.Task[RunInfo]) -> None:
        """Set a run that was made for a cancelled caller to KILLED, as soon as the server shows it."""
        try:
            async with asyncio.timeout(DEFAULT_CANCEL_GRACE):
                if self._is_sending:
                    await asyncio.wait([creating])
                creating.cancel()
                await wait_done(creating)
                is_made = not creating.cancelled() and creating.exception() is None
                ids = [creating.result().run_id] if is_made else []
                while not ids and self._is_unclear:
                    ids = [run.run_id for run in await self._client.retry(self._look)]
                    if not ids:
                        await asyncio.sleep(_SEARCH_PAUSE)
                for run_id in ids:
                    body = {"run_id": run_id, "status": RunStatus.KILLED.value, "end_time": _now()}
                    await self._client.call("POST", "runs/update", body=body)
        except (TrackingError, TimeoutError) as error:
            reason = str(error) or "no answer in time"
            log.warning("a run whose creation was cancelled may be left RUNNING: %s: %s", self._place, reason)
        finally:
            creating.cancel()
            await wait_done(creating)
            _ = creating.cancelled() or creating.exception()  # its error is nobody's any more

    @property
    def _place(self) -> str:
        return f"in experiment {self._experiment_id} with the tag {SUBMISSION_TAG}={self._submission}"


def _is_search(answer: Mapping[str, Any]) -> bool:
    """Return False for an answer that a search cannot have; without runs it is empty."""
    return answer.keys() <= {"runs", "next_page_token"}


def _run_id(run: Any) -> str | None:
    """Return the id in the JSON of a run; None if it has none."""
    info = run.get("info") if isinstance(run, dict) else None
    if not isinstance(info, dict):
        return None
    found = info.get("run_id") or info.get("run_uuid")
    return None if found is None else str(found)


def _now() -> int:
    return time.time_ns() // 1_000_000
