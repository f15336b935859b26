"""Tracking on an MLflow server, or on Databricks, over HTTP; mlflow itself is not needed."""

from __future__ import annotations

import getpass
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import anyio

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import FILES
from mlfleet._text.masking import mask_uri
from mlfleet.errors import TrackingError
from mlfleet.runs import RunStatus
from mlfleet.tracking.artifacts import Artifacts
from mlfleet.tracking.auth import Credentials, ServerLogin
from mlfleet.tracking.base import RunInfo, Tracking
from mlfleet.tracking.creation import Creation, search_runs
from mlfleet.tracking.databricks import DatabricksLogin, is_databricks
from mlfleet.tracking.models import SUBMISSION_TAG, Lengths, batches, deleted_experiment, pairs, shortened
from mlfleet.tracking.reads import Reads
from mlfleet.tracking.retry import RETRY_FOR
from mlfleet.tracking.transport import Transport, encoded
from mlfleet.tracking.workspace import check_workspace

__all__ = ["MAX_IN_FLIGHT", "RestTracking"]

log = logging.getLogger("mlfleet.tracking")

# MLflow's server takes up to three connections to its database for one request, of the 15 that its pool has unless told
# otherwise. Eight requests that hold two each would wait for a third until they are refused, half a minute later.
MAX_IN_FLIGHT = 7
# The longest values of parameters and tags that servers take: of MLflow 2.9 and newer, 1.28, and before that.
_LENGTHS: tuple[Lengths, ...] = ((6000, 8000), (500, 5000), (250, 250))


class RestTracking(Tracking):
    """An MLflow server (``http``, ``https``) or a Databricks workspace (``databricks``, ``databricks://profile``).

    Use it inside ``async with``. Requests are tried again when the connection breaks and on the statuses 408, 429, 500,
    502, 503 and 504, and when the server's database had no connection left for them.

    Args:
        uri: of the server; ``user:password@`` in it is taken out and never shown.
        credentials: what proves who we are; None: the ``MLFLOW_TRACKING_*`` variables, ``~/.mlflow/credentials``, and
            ``~/.netrc``.
        headers: to send with every request. Plugins of mlflow for headers or authentication are not used.
        retry_for: seconds for which a call keeps trying. A server that never answered yet is given up after 5 seconds.
        max_in_flight: requests at the same time; the others wait their turn. More than the database of the server has
            connections for make it wait for itself: see "How many requests at once" in docs/tracking.md.
        timeout: seconds without an answer after which a request counts as lost; None: ``MLFLOW_HTTP_REQUEST_TIMEOUT``,
            else 120.
        workspace: of a server that has them; empty: its default one; None: ``MLFLOW_WORKSPACE``.

    Raises:
        UsageError: the URI or a number makes no sense.
    """

    def __init__(
        self,
        uri: str,
        *,
        credentials: Credentials | None = None,
        headers: Mapping[str, str] | None = None,
        retry_for: float = RETRY_FOR,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout: float | None = None,
        workspace: str | None = None,
    ) -> None:
        self.uri = mask_uri(uri)
        shown = any(name.lower() == "authorization" for name in headers or ())
        login = DatabricksLogin(uri) if is_databricks(uri) else ServerLogin(uri, credentials, read_netrc=not shown)
        if isinstance(login, ServerLogin):
            self.uri = login.url
        self._transport = Transport(
            login,
            uri=self.uri,
            headers=headers or {},
            retry_for=retry_for,
            max_in_flight=max_in_flight,
            timeout=timeout,
            # Databricks has workspaces of another kind.
            workspace="" if is_databricks(uri) else workspace,
        )
        # A search of Databricks may not know yet what has just been written.
        self._reads = Reads(self._transport, together=not is_databricks(uri))
        self._artifacts = Artifacts(self._transport)
        self._experiments: SingleFlight[str, str] = SingleFlight(keep=True)
        self._user = ""

    async def __aenter__(self) -> Self:
        await self._transport.open()
        try:
            await check_workspace(self._transport)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._transport.close()
            raise
        self._user = await FILES.run(_user)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._transport.close()

    async def environ(self) -> tuple[dict[str, str], dict[str, str]]:  # noqa: D102 - told by Tracking
        plain, secret = self._transport.login.environ()
        if (workspace := self._transport.workspace) or os.environ.get("MLFLOW_WORKSPACE"):
            plain["MLFLOW_WORKSPACE"] = workspace
        return plain, secret

    async def experiment_id(self, name: str) -> str:  # noqa: D102
        return await self._experiments(name, partial(self._find_or_create_experiment, name))

    async def create_run(  # noqa: D102
        self, experiment_id: str, *, name: str | None, tags: Mapping[str, str], start_time: int | None = None
    ) -> RunInfo:
        submission = uuid.uuid4().hex
        body: dict[str, Any] = {
            "experiment_id": experiment_id,
            "user_id": tags.get("mlflow.user", self._user),
            "start_time": _now() if start_time is None else start_time,
            "tags": pairs({**tags, SUBMISSION_TAG: submission}),
        }
        if name is not None:
            body["run_name"] = name
        creation = Creation(self._transport, experiment_id, encoded(body), submission)
        del body  # hundreds wait for their turn
        run = await creation.run()
        self._reads.note(run)
        return run

    async def get_run(self, run_id: str, *, retry_for: float | None = None) -> RunInfo:  # noqa: D102
        return await self._reads.get(run_id, retry_for=retry_for)

    async def search_runs(  # noqa: D102
        self, experiment_ids: Sequence[str], filter_string: str = "", *, max_results: int = 1000
    ) -> list[RunInfo]:
        return await search_runs(self._transport, experiment_ids, filter_string, max_results=max_results)

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
        await self._transport.call("POST", "runs/update", body=body, retry_for=retry_for)
        if status.is_terminal:
            self._reads.forget(run_id)

    async def log_artifact(self, run: RunInfo, path: Path, artifact_path: str | None = None) -> None:  # noqa: D102
        await self._artifacts.upload(run.artifact_uri, path, artifact_path)

    async def download(self, uri: str, folder: Path) -> Path:  # noqa: D102
        return await self._artifacts.download(uri, folder)

    async def _find_or_create_experiment(self, name: str) -> str:
        found = await self._experiment(name)
        if found is None:
            try:
                answer = await self._transport.call("POST", "experiments/create", body={"name": name})
                return str(answer["experiment_id"])
            except TrackingError as error:
                # Somebody else was faster, or it was our own request whose answer was lost.
                if error.code != "RESOURCE_ALREADY_EXISTS" or (found := await self._experiment(name)) is None:
                    raise
        if found.get("lifecycle_stage") == "deleted":
            raise deleted_experiment(name, str(found["experiment_id"]))
        return str(found["experiment_id"])

    async def _experiment(self, name: str) -> Mapping[str, Any] | None:
        path = f"experiments/get-by-name?experiment_name={quote(name, safe='')}"
        try:
            return (await self._transport.call("GET", path)).get("experiment")
        except TrackingError as error:
            if error.code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    async def _log_batch(self, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        lengths = iter(_LENGTHS)
        while True:
            try:
                await self._transport.call(
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
                            "run %s: the server takes no such long values, they are cut: %s", run_id, ", ".join(cut)
                        )
                        break
                else:
                    raise


def _now() -> int:
    return time.time_ns() // 1_000_000


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "unknown"
