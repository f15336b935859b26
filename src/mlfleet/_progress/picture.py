"""The model of the views: what is shown of runs and sweeps, in texts and in one picture at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from mlfleet._engine.options import Goal
from mlfleet._sweeps import PointResult, Sweep, SweepCounts, rank
from mlfleet._text.plain import clean, duration_text, plain_line, point_text
from mlfleet.runs import RunEvent, Stage

__all__ = [
    "BestRuns",
    "Painter",
    "Picture",
    "Row",
    "activity",
    "failure_line",
    "opening_line",
    "result_line",
    "retry_line",
    "share",
]

_MOST_METRIC_NAMES = 100


@dataclass(slots=True)
class BestRuns:
    """The best results of a sweep by a metric. The other results are not kept.

    Attributes:
        metric: The metric's name; None to keep no results.
        goal: Whether low (``min``) or high (``max``) values are the best.
        count: The number of results to keep.
        results: The best results, the best one first.
        metrics: Names of the metrics that the runs have logged.
    """

    metric: str | None
    goal: Goal = "min"
    count: int = 5
    results: list[PointResult] = field(default_factory=list)
    metrics: set[str] = field(default_factory=set)

    def add(self, result: PointResult) -> None:
        """Keep a result if it is among the best."""
        if len(self.metrics) < _MOST_METRIC_NAMES:
            self.metrics.update(result.metrics)
        if self.metric is not None:
            # The handle would keep the run's plan in memory.
            results = [*self.results, replace(result, run=None)]
            self.results = rank(results, self.metric, self.goal)[: self.count]

    def describe(self) -> str:
        """Return the best value so far, in a few words; empty if there is none."""
        if not self.results or self.metric is None:
            return ""
        best = self.results[0]
        return f"best {self.metric} {best.metrics[self.metric]:g} (point {best.index})"


@dataclass(frozen=True, slots=True)
class Row:
    """An active run.

    Attributes:
        name: Its name, or its point.
        since: The time at which its command began, in seconds since the epoch.
        output: The file with its output; None if there is none.
        last: The last line of its output; empty if there is none.
    """

    name: str
    since: float
    output: Path | None = None
    last: str = ""

    @property
    def time(self) -> str:
        """The time that its command has taken so far."""
        return duration_text(time.time() - self.since)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The content of a view at one moment.

    Attributes:
        lines: The lines to add that stay, each after its colour; empty for no colour.
        title: The name of the run or of the sweep.
        counts: The progress of the sweep; None for a run, and before the sweep has begun.
        rows: The active runs that are shown.
        hidden: The number of further active runs.
        activity: What is being done before a command runs.
        best: The best value so far.
        rate: Points per second in this session; None before the first one has ended.
        stopping: The sweep is being ended.
        done: The sweep has ended.
    """

    lines: Sequence[tuple[str, str]] = ()
    title: str = ""
    counts: SweepCounts | None = None
    rows: Sequence[Row] = ()
    hidden: int = 0
    activity: str = ""
    best: str = ""
    rate: float | None = None
    stopping: bool = False
    done: bool = False

    def numbers(self) -> list[tuple[str, str]]:
        """Return the words about the progress of a sweep, each with its colour."""
        counts = self.counts
        if counts is None:
            return []
        found = [
            (f"{number} {word}", style)
            for number, word, style in (
                (counts.finished, "finished", "green"),
                (counts.failed, "failed", "red"),
                (counts.killed, "killed", "yellow"),
                (counts.running, "running", "cyan"),
                (counts.retries, "tried again", "yellow"),
                (counts.earlier, "from before", "dim"),
            )
            if number or (word == "running" and not self.done)
        ]
        if self.stopping and not self.done:
            found.append(("stopping", "bold yellow"))
        elif self.rate and not self.done:
            found.append((_rate_text(self.rate), ""))
            if counts.total is not None:
                found.append((f"{duration_text((counts.total - counts.ended) / self.rate)} left", ""))
        return [*found, (self.best, "bold")] if self.best else found

    @property
    def share(self) -> str:
        """The share of the sweep's points that have ended, as in 3/12."""
        return share(self.counts or SweepCounts())


class Painter(Protocol):
    """Shows pictures. Its methods are called in a thread and may block."""

    def paint(self, picture: Picture) -> None:
        """Show a picture in the place of the last one, below all lines that stay."""
        ...

    def close(self) -> None:
        """Remove what does not stay."""
        ...


# ---- texts ----------------------------------------------------------------------------------------------------------


def activity(stage: Stage, detail: str = "", *, brief: bool = False) -> str:
    """Return what is done for a run in a stage before its command runs; empty for the other stages.

    Args:
        stage: The stage.
        detail: The line on its progress that came last; empty if there was none.
        brief: Leave out lines of tools, such as those of a build. What a backend does itself is always named.
    """
    detail = " ".join(clean(detail).split())
    match stage:
        case Stage.FETCHING if detail:
            doing = "fetching the project"
        case Stage.FETCHING | Stage.QUEUED:
            return "getting ready"
        case Stage.PREPARING:
            doing = "building the environment" if detail else "preparing the environment"
        case Stage.STARTING:
            return detail or "starting"
        case _:
            return ""
    return doing if brief or not detail else f"{doing}: {detail}"


def share(counts: SweepCounts) -> str:
    """Return the share of a sweep's points that have ended, as in 3/12."""
    return f"{counts.ended}/{'?' if counts.total is None else counts.total}"


def result_line(result: PointResult, metric: str | None) -> str:
    """Return the line about a point that has ended and not failed, with its metric."""
    value = f" {metric}={result.metrics[metric]:g}" if metric is not None and metric in result.metrics else ""
    took = "" if result.seconds is None else f" ({result.seconds:.1f} s)"
    before = ", before this session" if result.earlier else ""
    return f"{result.status} point {result.index}: {point_text(result.point)}{value}{took}{before}"


def opening_line(sweep: Sweep) -> str:
    """Return the line about a sweep that begins."""
    total = sweep.counts.total
    many = "points" if total is None else "1 point" if total == 1 else f"{total} points"
    return f"sweep {sweep.run_name!r} (run {sweep.run_id}): {many}, up to {sweep.max_concurrent} at once"


def failure_line(result: PointResult, output: Sequence[str]) -> str:
    """Return the line about a failed point, with the last line of its output."""
    tries = f" (attempt {result.attempts})" if result.attempts > 1 else ""
    last = next((clean for line in reversed(output) if (clean := plain_line(line))), "")
    return f"point {result.index}{tries}: {point_text(result.point)}: {result.reason}" + (f": {last}" if last else "")


def retry_line(event: RunEvent) -> str:
    """Return the line about a point that is tried again."""
    return f"point {event.index} is tried again, attempt {event.attempt} failed: {event.detail}"


def _rate_text(per_second: float) -> str:
    if per_second >= 1:
        return f"{per_second:.1f}/s"
    return f"{per_second * 60:.1f}/min" if per_second * 60 >= 1 else f"{per_second * 3600:.1f}/h"
