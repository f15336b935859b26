"""The best runs of a sweep, kept while it goes on; the others are forgotten."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from mlfleet._sweeps import Goal, PointResult
from mlfleet.runs import RunStatus

__all__ = ["Best"]

_ENOUGH_NAMES = 100


@dataclass(slots=True)
class Best:
    """The best runs by a metric.

    Attributes:
        metric: its name; None: there is no best.
        goal: which values are good.
        count: how many are kept.
        results: the best first.
        metrics: names of the metrics that runs had.
    """

    metric: str | None
    goal: Goal = "min"
    count: int = 5
    results: list[PointResult] = field(default_factory=list)
    metrics: set[str] = field(default_factory=set)

    def add(self, result: PointResult) -> None:
        """Keep it if it is good enough."""
        if len(self.metrics) < _ENOUGH_NAMES:
            self.metrics.update(result.metrics)
        if self.metric is None or result.status is not RunStatus.FINISHED:
            return
        if not math.isfinite(result.metrics.get(self.metric, math.nan)):
            return
        # Without the handle, or thousands of plans would be kept by it.
        self.results.append(replace(result, run=None))
        self.results.sort(key=lambda each: (self._badness(each), each.index))
        del self.results[self.count :]

    def _badness(self, result: PointResult) -> float:
        assert self.metric is not None  # noqa: S101 - nothing is kept without it
        value = result.metrics[self.metric]
        return value if self.goal == "min" else -value
