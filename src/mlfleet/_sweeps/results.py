"""The results of a sweep: one for each point."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio

from mlfleet._engine.options import Goal
from mlfleet._engine.run import FleetRun
from mlfleet._sweeps.report import Report
from mlfleet._text.plain import duration_text, short
from mlfleet.errors import ExecutionException, UsageError
from mlfleet.runs import FailureKind, RunStatus
from mlfleet.tracking.base import Tracking
from mlfleet.tracking.links import run_url

if TYPE_CHECKING:
    import pandas

__all__ = ["PointResult", "ResultBuffer", "SweepCounts", "SweepResult", "rank"]

_MOST_SHOWN = 10  # points in each table of a notebook


@dataclass(frozen=True, slots=True, kw_only=True)
class PointResult:
    """The result of one point of a sweep.

    Attributes:
        index: The number of the point, counted from 0 in the order of the space.
        point: The mapping that the space gave, as the same object.
        parameters: The parameters of the run: those that all runs of the sweep share, and those of the point.
        status: FINISHED, FAILED or KILLED.
        run_id: The id of the MLflow run of the last attempt; None if no attempt has one.
        reason: The reason why the point did not finish well; None if it did.
        kind: The kind of the failure; None if the point did not fail.
        exit_code: The exit code of the last attempt's process; None if it did not start.
        attempts: The number of attempts, including those of earlier sessions of the sweep.
        seconds: The seconds that the last attempt's command took; None if it did not run in this session.
        metrics: The latest value of each metric of the run.
        earlier: True if all attempts ended before the sweep was resumed.
        run: The handle of the last attempt, which has ended; None if there was none in this session.
    """

    index: int
    point: Mapping[str, Any]
    parameters: Mapping[str, Any]
    status: RunStatus
    run_id: str | None = None
    reason: str | None = None
    kind: FailureKind | None = None
    exit_code: int | None = None
    attempts: int = 1
    seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    earlier: bool = False
    run: FleetRun | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepCounts:
    """The progress of a sweep, in numbers of points.

    Attributes:
        total: The points of the space; None if the space does not know.
        finished: The points that finished well.
        failed: The points that failed and are not tried again.
        killed: The points that were cancelled.
        running: The points that are active now.
        retries: The attempts of this session after the first one of their point.
        earlier: The finished and failed points that had ended before the sweep was resumed.
    """

    total: int | None = None
    finished: int = 0
    failed: int = 0
    killed: int = 0
    running: int = 0
    retries: int = 0
    earlier: int = 0

    @property
    def ended(self) -> int:
        """The points that have their result."""
        return self.finished + self.failed + self.killed

    def __str__(self) -> str:
        parts = [f"{self.finished} finished", f"{self.failed} failed"]
        parts += [f"{self.killed} killed"] if self.killed else []
        parts += [f"{self.total - self.ended} not run"] if self.total and self.total > self.ended else []
        parts += [f"{self.earlier} of them before this session"] if self.earlier else []
        parts += [f"{self.retries} tried again"] if self.retries else []
        return ", ".join(parts)


def rank(results: Iterable[PointResult], metric: str, goal: Goal) -> list[PointResult]:
    """Return the finished points with a finite value of a metric, the best one first, and of equal ones the first."""
    sign = 1 if goal == "min" else -1
    finished = [result for result in results if result.status is RunStatus.FINISHED]
    measured = [result for result in finished if math.isfinite(result.metrics.get(metric, math.nan))]
    return sorted(measured, key=lambda result: (sign * result.metrics[metric], result.index))


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """A sweep that has ended.

    Attributes:
        name: The name of the sweep; None if it has none.
        run_id: The id of the sweep's MLflow run.
        status: FINISHED if all points finished well, KILLED if the sweep was cancelled or left early, else FAILED.
        stopped: The reason why the sweep ended before its space did; None if it did not.
        counts: The numbers of points by their end.
        results: The results of the points, in the order of the space.
        experiment_id: The id of the experiment of the sweep and all its runs.
        tracking_uri: The URI of the tracking server or store, without credentials.
        metric: The metric that a notebook and the report show first, as `mlfleet.sweep_async` was told; None for the
            first one by name.
        goal: ``min`` or ``max``: the good values of that metric.
    """

    name: str | None
    run_id: str
    status: RunStatus
    stopped: str | None
    counts: SweepCounts
    results: tuple[PointResult, ...]
    experiment_id: str = ""
    tracking_uri: str = ""
    metric: str | None = None
    goal: Goal = "min"
    _open: Callable[[], Tracking] | None = field(default=None, repr=False, compare=False)

    def best(self, metric: str, goal: Goal = "min") -> PointResult:
        """Return the finished point with the best value of a metric, and of equal ones the first.

        Args:
            metric: The name of the metric.
            goal: ``min`` (the default) or ``max``.

        Raises:
            UsageError: No finished point has a finite value of the metric.
        """
        if goal not in ("min", "max"):
            raise UsageError(f"goal is {goal!r}: give 'min' or 'max'")
        ranked = rank(self.results, metric, goal)
        if not ranked:
            known = sorted({name for result in self.results for name in result.metrics})
            text = ", ".join(known) or "none"
            raise UsageError(f"no finished run has a finite value of the metric {metric!r}; the metrics are: {text}")
        return ranked[0]

    def check(self) -> None:
        """Raise an error if the sweep did not finish well.

        Raises:
            ExecutionException: The sweep did not finish well. The error has the reasons of the first five points.
        """
        if self.status is RunStatus.FINISHED:
            return
        bad = [result for result in self.results if result.status is not RunStatus.FINISHED]
        lines = [f"the sweep {self.name or self.run_id} is {self.status}: {len(bad)} points did not finish"]
        lines += [f"  stopped: {self.stopped}"] if self.stopped else []
        lines += [f"  point {result.index} ({result.run_id}): {result.reason}" for result in bad[:5]]
        raise ExecutionException("\n".join(lines), run_id=self.run_id, reason=self.stopped or lines[0])

    def report(self, *, metric: str | None = None, goal: Goal | None = None) -> Report:
        """Make the page of ``mlfleet report``. As the result of a notebook's cell it is shown there.

        This call reads all runs of the sweep from tracking, in a thread of its own, and blocks until it has done so. In
        a service call it in a thread.

        Args:
            metric: The metric that the page shows first. Default: that of the sweep.
            goal: ``min`` or ``max``. Default: that of the sweep.

        Raises:
            UsageError: No run has the metric, or the Fleet of the sweep was given a `Tracking` of its own, which cannot
                be opened again.
            TrackingError: Tracking cannot be reached.
        """
        from concurrent.futures import ThreadPoolExecutor

        from mlfleet._reporting import load_report, render

        if self._open is None:
            raise UsageError(
                "report() cannot open the tracking of this sweep again, which was given as an object: run "
                f"mlfleet report {self.run_id} --tracking-uri URI"
            )
        # The caller's thread may have a running event loop.
        pool = ThreadPoolExecutor(1)
        try:
            report = pool.submit(anyio.run, load_report, self._open(), self.run_id).result()
        finally:
            pool.shutdown(wait=False)  # an interrupt does not wait for a server that is silent
        return Report(render(report, metric=metric or self.metric, goal=goal or self.goal))

    def rows(self) -> list[dict[str, Any]]:
        """Return a flat mapping for each point, with its parameters (``params.x``) and metrics (``metrics.x``)."""
        return [
            {
                "index": result.index,
                "status": result.status.value,
                "run_id": result.run_id,
                "attempts": result.attempts,
                "seconds": result.seconds,
                "exit_code": result.exit_code,
                "reason": result.reason,
                **{f"params.{name}": value for name, value in result.parameters.items()},
                **{f"metrics.{name}": value for name, value in result.metrics.items()},
            }
            for result in self.results
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """Return `rows` as a data frame.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UsageError("to_pandas() needs pandas: pip install pandas, or use rows()") from error
        return pandas.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        from mlfleet._text.html import Html, block, escaped, link, status, table

        def url(run_id: str) -> str | None:
            return run_url(self.tracking_uri, self.experiment_id, run_id)

        def run(result: PointResult) -> Html:
            return link(result.run_id[:8], url(result.run_id)) if result.run_id else Html()

        def point(result: PointResult) -> list[str]:
            return [short(result.point[name]) if name in result.point else "" for name in names]

        names = list(dict.fromkeys(name for result in self.results for name in result.point))
        measured = {name for result in self.results for name in result.metrics}
        metric = self.metric or min(measured, key=lambda name: (name.startswith("system/"), name), default=None)
        best = rank(self.results, metric, self.goal)[:_MOST_SHOWN] if metric else []
        bad = [result for result in self.results if result.status is not RunStatus.FINISHED]
        name = link(self.name or self.run_id, url(self.run_id))
        head = f"Sweep <b>{name}</b> {status(self.status)} {escaped(self.counts)}"
        parts = [Html(head), f"ended early: {self.stopped}" if self.stopped else ""]
        if best:
            rows = [
                [short(result.metrics[metric or ""]), *point(result), _took(result), run(result)] for result in best
            ]
            parts.append(f"{'lowest' if self.goal == 'min' else 'highest'} {metric}")
            parts.append(table([metric, *names, "time", "run"], rows))
        elif self.metric:
            parts.append(f"no finished run has the metric {metric}")
        if bad:
            failed = [
                [result.index, *point(result), status(result.status), result.reason or "", run(result)]
                for result in bad[:_MOST_SHOWN]
            ]
            more = f", the first {_MOST_SHOWN}" if len(bad) > _MOST_SHOWN else ""
            parts.append(f"{len(bad)} did not finish{more}")
            parts.append(table(["point", *names, "status", "reason", "run"], failed))
        return block(*parts)


def _took(result: PointResult) -> str:
    return "" if result.seconds is None else duration_text(result.seconds)


class ResultBuffer:
    """A bounded buffer between the points of a sweep and the task that iterates over it.

    Args:
        size: The number of results that fit into the buffer. Tasks that put more wait for room.
    """

    def __init__(self, size: int) -> None:
        self._size: float = size
        self._items: deque[PointResult] = deque()
        self._taken = False
        self._closed = False
        self._changed = anyio.Event()

    async def put(self, result: PointResult) -> None:
        """Add a result as soon as there is room."""
        while len(self._items) >= self._size:
            await self._changed.wait()
        self._items.append(result)
        self._wake()

    async def get(self) -> PointResult | None:
        """Wait for the next result and return it, or None at the end. The previous result is consumed by this call."""
        self._taken = False
        self._wake()
        while not self._items:
            if self._closed:
                return None
            await self._changed.wait()
        self._taken = True
        result = self._items.popleft()
        self._wake()
        return result

    async def consumed(self) -> None:
        """Wait until the reader has asked for the next result after all that were put."""
        while self._items or self._taken:
            await self._changed.wait()

    def remove_limit(self) -> None:
        """Let all further `put` calls return without waiting."""
        self._size = math.inf
        self._wake()

    def close(self) -> None:
        """End the iteration after the results that are in the buffer."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
