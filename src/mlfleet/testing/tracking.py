"""A tracking server in memory, for tests of code that uses mlfleet: without a server, files or waiting."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import anyio.to_thread

from mlfleet.errors import TrackingError, UsageError
from mlfleet.runs import RunStatus
from mlfleet.tracking.base import RunInfo, Tracking

__all__ = ["FakeTracking", "RecordedRun"]

_CLAUSE = re.compile(r"\s*(tags|params|attributes)\.[`\"]?([^`\"=]+?)[`\"]?\s*(?:=|LIKE)\s*'([^']*)'\s*")


@dataclass(slots=True)
class RecordedRun:
    """A run as a `FakeTracking` has recorded it.

    Attributes:
        run_id: The id of the run.
        experiment_id: The id of its experiment.
        name: The name of the run.
        start_time: The time of its creation, in milliseconds since the epoch.
        end_time: The time of its end, in milliseconds since the epoch; None before it.
        statuses: Every status it had, in order; the last one is the current one.
        tags: All tags of the run.
        params: All parameters of the run.
        metrics: The latest value of each metric; a test may set them.
        artifacts: Path → content.
    """

    run_id: str
    experiment_id: str
    name: str
    start_time: int
    end_time: int | None = None
    statuses: list[RunStatus] = field(default_factory=lambda: [RunStatus.RUNNING])
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, bytes] = field(default_factory=dict)

    @property
    def status(self) -> RunStatus:
        """The current status."""
        return self.statuses[-1]

    def info(self) -> RunInfo:
        """Return this run in the form that a `Tracking` returns."""
        return RunInfo(
            run_id=self.run_id,
            experiment_id=self.experiment_id,
            name=self.name,
            status=self.status,
            artifact_uri=f"memory:/{self.run_id}",
            tags=dict(self.tags),
            params=dict(self.params),
            metrics=dict(self.metrics),
            start_time=self.start_time,
            end_time=self.end_time,
        )


class FakeTracking(Tracking):
    """A tracking server in memory that records all calls and fails on demand.

    Args:
        uri: The value of `uri` and of the variable ``MLFLOW_TRACKING_URI`` of the runs. Give that of a real server or
            store if the code under test logs through mlflow itself.
        latency: Seconds that every call takes.
        fail: A function that is called with the name of each method (``create_run``) before it does anything. The error
            that it returns is raised; None lets the call pass.

    Attributes:
        runs: Run id → the recorded run, in order of creation.
        experiments: Name → id.
        requests: Method → the number of calls.
        environment: Further variables for the runs.

    Example:
        >>> tracking = FakeTracking()
        >>> async with Fleet(tracking=tracking) as fleet: ...
        >>> [run.status for run in tracking.runs.values()]
    """

    def __init__(
        self,
        *,
        uri: str = "memory:",
        latency: float = 0.0,
        fail: Callable[[str], Exception | None] | None = None,
    ) -> None:
        self.uri = uri
        self.latency = latency
        self.fail = fail
        self.runs: dict[str, RecordedRun] = {}
        self.experiments: dict[str, str] = {"Default": "0"}
        self.requests: Counter[str] = Counter()
        self.environment: dict[str, str] = {}

    async def environ(self) -> tuple[dict[str, str], dict[str, str]]:  # noqa: D102 - told by Tracking
        return {"MLFLOW_TRACKING_URI": self.uri, **self.environment}, {}

    async def experiment_id(self, name: str) -> str:  # noqa: D102
        await self._request("experiment_id")
        return self.experiments.setdefault(name, str(len(self.experiments)))

    async def create_run(  # noqa: D102
        self, experiment_id: str, *, name: str | None, tags: Mapping[str, str], start_time: int | None = None
    ) -> RunInfo:
        await self._request("create_run")
        run_id = f"{random.getrandbits(128):032x}"
        run = RecordedRun(
            run_id=run_id,
            experiment_id=experiment_id,
            name=name or f"run-{len(self.runs) + 1}",
            start_time=_now() if start_time is None else start_time,
            tags=dict(tags),
        )
        self.runs[run_id] = run
        return run.info()

    async def get_run(self, run_id: str, *, retry_for: float | None = None) -> RunInfo:  # noqa: D102
        await self._request("get_run")
        return self._run(run_id).info()

    async def search_runs(  # noqa: D102
        self, experiment_ids: Sequence[str], filter_string: str = "", *, max_results: int = 1000
    ) -> list[RunInfo]:
        await self._request("search_runs")
        wanted = _clauses(filter_string)
        found = [
            run
            for run in reversed(self.runs.values())
            if run.experiment_id in experiment_ids and all(_matches(run, *clause) for clause in wanted)
        ]
        return [run.info() for run in found[:max_results]]

    async def log(  # noqa: D102
        self, run_id: str, *, params: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        await self._request("log")
        run = self._run(run_id)
        for name, value in (params or {}).items():
            if run.params.setdefault(name, value) != value:
                text = f"the parameter {name!r} of run {run_id} is {run.params[name]!r} already: it cannot change"
                raise TrackingError(text, uri=self.uri, status=400, code="INVALID_PARAMETER_VALUE")
        run.tags.update(tags or {})

    async def update_run(  # noqa: D102
        self, run_id: str, status: RunStatus, *, end_time: int | None = None, retry_for: float | None = None
    ) -> None:
        await self._request("update_run")
        run = self._run(run_id)
        run.statuses.append(status)
        if status.is_terminal:
            run.end_time = _now() if end_time is None else end_time

    async def log_artifact(self, run: RunInfo, path: Path, artifact_path: str | None = None) -> None:  # noqa: D102
        await self._request("log_artifact")
        content = await anyio.to_thread.run_sync(path.read_bytes)
        self._run(run.run_id).artifacts[str(PurePosixPath(artifact_path or "") / path.name)] = content

    async def download(self, uri: str, folder: Path) -> Path:
        """Write one artifact (``runs:/<id>/<path>``) into `folder`; folders of artifacts are not faked."""
        await self._request("download")
        run_id, _, path = uri.removeprefix("runs:/").partition("/")
        content = self._run(run_id).artifacts.get(path)
        if content is None:
            raise TrackingError(f"there is no artifact {uri}", uri=self.uri, status=404)
        target = folder / PurePosixPath(path).name
        await anyio.to_thread.run_sync(target.write_bytes, content)
        return target

    async def _request(self, method: str) -> None:
        self.requests[method] += 1
        await asyncio.sleep(self.latency)
        if self.fail is not None and (error := self.fail(method)) is not None:
            raise error

    def _run(self, run_id: str) -> RecordedRun:
        run = self.runs.get(run_id)
        if run is None:
            raise TrackingError(f"there is no run {run_id}", uri=self.uri, status=404, code="RESOURCE_DOES_NOT_EXIST")
        return run


def _now() -> int:
    return time.time_ns() // 1_000_000


def _clauses(filter_string: str) -> list[tuple[str, str, str]]:
    """Return the ``kind.name = 'value'`` parts of a filter; the fake understands only this part of the language."""
    if not filter_string.strip():
        return []
    clauses = []
    for part in re.split(r"\s+and\s+", filter_string, flags=re.I):
        match = _CLAUSE.fullmatch(part)
        if match is None or (match[1] == "attributes" and match[2] != "status"):
            known = "tags.x = 'y', params.x = 'y' and attributes.status = 'y'"
            raise UsageError(f"FakeTracking only understands {known}, joined by and: {part!r}")
        clauses.append((match[1], match[2], match[3]))
    return clauses


def _matches(run: RecordedRun, kind: str, name: str, value: str) -> bool:
    if kind == "attributes":
        return run.status.value == value
    found = (run.tags if kind == "tags" else run.params).get(name)
    if value.endswith("%"):  # LIKE; the other wildcards are not faked
        return found is not None and found.startswith(value.removesuffix("%"))
    return found == value
