"""What a sweep gives: one result for each point."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mlfleet._engine.run import FleetRun
from mlfleet.errors import ExecutionException, UsageError
from mlfleet.runs import FailureKind, RunStatus

if TYPE_CHECKING:
    import pandas

__all__ = ["Goal", "PointResult", "ResultBuffer", "SweepCounts", "SweepResult"]

Goal = Literal["min", "max"]
"""Which values of a metric are good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointResult:
    """How one point of a sweep ended.

    Attributes:
        index: of the point, counted from 0 in the order in which the space gave them.
        point: the very mapping that the space gave.
        parameters: of the run: those that all runs of the sweep have, and the point.
        status: FINISHED, FAILED or KILLED.
        run_id: of the MLflow run of the last attempt; None if there never was one.
        reason: why it did not finish well; None if it did.
        kind: of the failure.
        exit_code: of the last attempt's process, if it got that far.
        attempts: how many there were, those of earlier sessions of the sweep included.
        seconds: that the last attempt's command took; None if it never ran, or in an earlier session.
        metrics: the latest value of each metric of the run.
        earlier: whether all of it happened before the sweep was resumed.
        run: the handle of the last attempt, which has ended; None if there is none.
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
    """How far a sweep is.

    Attributes:
        total: how many points the space has; None if it cannot tell.
        finished: points that finished well.
        failed: points that failed for good.
        killed: points that were cancelled.
        running: points that are on their way now.
        retries: attempts after the first one of their point, in this session.
        earlier: of finished and failed, those that had ended before the sweep was resumed.
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
        """Points that have their result."""
        return self.finished + self.failed + self.killed


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """A sweep that has ended.

    Attributes:
        name: of the sweep.
        run_id: of its MLflow run.
        status: of that run: FINISHED if all points finished well, KILLED if it was left early, else FAILED.
        stopped: why it ended before its space did; None if it did not.
        counts: how its points ended.
        results: one for each point, in the order of the space.
    """

    name: str | None
    run_id: str
    status: RunStatus
    stopped: str | None
    counts: SweepCounts
    results: tuple[PointResult, ...]

    def best(self, metric: str, goal: Goal = "min") -> PointResult:
        """The point that finished well with the best value of a metric; of equal ones the first.

        Args:
            metric: its name.
            goal: ``min`` or ``max``.

        Raises:
            UsageError: no point that finished has a (finite) value for it.
        """
        if goal not in ("min", "max"):
            raise UsageError(f"goal is {goal!r}: give 'min' or 'max'")
        candidates = [
            result
            for result in self.results
            if result.status is RunStatus.FINISHED and math.isfinite(result.metrics.get(metric, math.nan))
        ]
        if not candidates:
            known = sorted({name for result in self.results for name in result.metrics})
            text = ", ".join(known) or "none"
            raise UsageError(f"no finished run has a finite value of the metric {metric!r}; the metrics are: {text}")
        pick = min if goal == "min" else max
        return pick(candidates, key=lambda result: result.metrics[metric])

    def check(self) -> None:
        """Raise if the sweep did not finish well.

        Raises:
            ExecutionException: with the first few reasons.
        """
        if self.status is RunStatus.FINISHED:
            return
        bad = [result for result in self.results if result.status is not RunStatus.FINISHED]
        lines = [f"the sweep {self.name or self.run_id} is {self.status}: {len(bad)} points did not finish"]
        lines += [f"  stopped: {self.stopped}"] if self.stopped else []
        lines += [f"  point {result.index} ({result.run_id}): {result.reason}" for result in bad[:5]]
        raise ExecutionException("\n".join(lines), run_id=self.run_id, reason=self.stopped or lines[0])

    def rows(self) -> list[dict[str, Any]]:
        """One flat mapping for each point: its parameters (``params.x``), its metrics (``metrics.x``) and the rest."""
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
        """`rows` as a data frame.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UsageError("to_pandas() needs pandas: pip install pandas, or use rows()") from error
        return pandas.DataFrame(self.rows())


class ResultBuffer:
    """Results on their way to the one who iterates over the sweep.

    Args:
        size: how many wait here before those who put more have to wait.
    """

    def __init__(self, size: int) -> None:
        self._size: float = size
        self._items: deque[PointResult] = deque()
        self._taken = False
        self._closed = False
        self._changed = asyncio.Event()

    async def put(self, result: PointResult) -> None:
        """Add a result as soon as there is room."""
        while len(self._items) >= self._size:
            await self._changed.wait()
        self._items.append(result)
        self._wake()

    async def get(self) -> PointResult | None:
        """The next result; None when there will be no more. The one before is taken as worked through."""
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

    async def worked_through(self) -> None:
        """Wait until everything that was put has been taken and the taker has come back."""
        while self._items or self._taken:
            await self._changed.wait()

    def unbound(self) -> None:
        """Let nobody wait for room any more."""
        self._size = math.inf
        self._wake()

    def close(self) -> None:
        """There will be no more results."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def in_order(results: Sequence[PointResult]) -> tuple[PointResult, ...]:
    """In the order of the space."""
    return tuple(sorted(results, key=lambda result: result.index))
