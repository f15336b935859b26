"""The content of a report: a sweep and its runs, read from tracking alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlfleet._engine.request import NAME_TAG, SPACE_TAG, STOPPED_TAG, SweepMember, tagged_number
from mlfleet.errors import TrackingError, UsageError
from mlfleet.runs import REASON_TAG, STARTED_TAG, RunStatus
from mlfleet.tracking.base import RunInfo, Tracking

__all__ = ["ReportedRun", "SweepReport", "find_sweep", "load_report", "load_sweep"]

_MOST_RUNS = 50_000  # the most that mlflow's own stores return
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedRun:
    """One attempt at one point.

    Attributes:
        run_id: The id of the MLflow run.
        name: The name of the MLflow run.
        index: The number of the point, counted from 0.
        attempt: The number of the attempt, counted from 1.
        status: The status of the run.
        params: The parameters that MLflow has logged.
        metrics: The metrics whose last value is finite.
        created: The time of its creation, in milliseconds since the epoch.
        started: The time at which its command began, in the same unit; `created` if it hardly waited.
        ended: The time of its end, in the same unit; None before the end.
        reason: The reason why the previous attempt failed; None for the first one.
        failure: The reason why this attempt did not finish well; None if it did, or if that is not known.
        latest: True for the last attempt at its point.
    """

    run_id: str
    name: str
    index: int
    attempt: int
    status: RunStatus
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    created: int | None
    started: int | None
    ended: int | None
    reason: str | None
    failure: str | None
    latest: bool = False

    @property
    def waited(self) -> float | None:
        """The seconds between its creation and the start of its command."""
        return None if self.created is None or self.started is None else (self.started - self.created) / 1000

    @property
    def ran(self) -> float | None:
        """The seconds that the command ran."""
        return None if self.started is None or self.ended is None else max(self.ended - self.started, 0) / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """A sweep with all its runs.

    Attributes:
        info: The MLflow run of the sweep.
        tracking: The URI of the server or store, without credentials.
        space: The description of its space; empty if none was recorded.
        stopped: The reason why it ended early; None if it did not.
        runs: All attempts, sorted by point and attempt.
    """

    info: RunInfo
    tracking: str
    space: Mapping[str, Any]
    stopped: str | None
    runs: tuple[ReportedRun, ...]

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics; MLflow's own system metrics are the last."""
        names = {name for run in self.runs for name in run.metrics}
        return sorted(names, key=lambda name: (name.startswith("system/"), name))

    @property
    def varied(self) -> list[str]:
        """The parameters whose values differ, in the order in which the runs logged them."""
        return [name for name, values in self._values().items() if len(values) > 1]

    @property
    def fixed(self) -> dict[str, str]:
        """The parameters that are the same for all runs."""
        return {
            name: next(iter(values)) or "" for name, values in self._values().items() if values and len(values) == 1
        }

    def _values(self) -> dict[str, set[str | None]]:
        names = dict.fromkeys(name for run in self.runs for name in run.params)
        # A run that never began has no parameters: that does not make a shared parameter a varied one.
        known = [run.params for run in self.runs if run.params]
        return {name: {params.get(name) for params in known} for name in names}


async def load_sweep(tracking: Tracking, sweep: str, experiment_id: str) -> SweepReport:
    """Read a sweep and all its runs.

    Args:
        tracking: The tracking store with the sweep.
        sweep: The name of the sweep, or the id of its MLflow run.
        experiment_id: The experiment in which a name is searched.

    Raises:
        UsageError: The sweep does not exist.
        TrackingError: Tracking cannot be reached.
    """
    return await _load(tracking, await find_sweep(tracking, sweep, experiment_id))


async def load_report(tracking: Tracking, run_id: str) -> SweepReport:
    """Open tracking for reading a sweep by the id of its MLflow run, and all its runs.

    Raises:
        TrackingError: Tracking cannot be reached.
    """
    async with tracking:
        return await _load(tracking, await tracking.get_run(run_id))


async def _load(tracking: Tracking, info: RunInfo) -> SweepReport:
    children = await tracking.search_runs(
        [info.experiment_id], f"tags.`{SweepMember.ID_TAG}` = '{info.run_id}'", max_results=_MOST_RUNS
    )
    return SweepReport(
        info=info,
        tracking=tracking.uri,
        space=_space(info.tags.get(SPACE_TAG, "")),
        stopped=info.tags.get(STOPPED_TAG) or None,
        runs=_reported(children),
    )


async def find_sweep(tracking: Tracking, sweep: str, experiment_id: str) -> RunInfo:
    """Return the MLflow run of a sweep.

    Args:
        tracking: The tracking store with the sweep.
        sweep: The name of the sweep, or the id of its MLflow run.
        experiment_id: The experiment in which a name is searched.

    Raises:
        UsageError: The sweep does not exist.
        TrackingError: Tracking cannot be reached.
    """
    if not any(c in "'\"`\\%" or c < " " for c in sweep):
        found = await tracking.search_runs([experiment_id], f"tags.`{NAME_TAG}` = '{sweep}'", max_results=1)
        if found:
            return found[0]
    if not _RUN_ID.fullmatch(sweep):
        raise UsageError(
            f"there is no sweep {sweep!r} in the experiment {experiment_id} of {tracking.uri}: give its name and "
            "experiment, or the id of its MLflow run"
        )
    try:
        info = await tracking.get_run(sweep)
    except TrackingError as error:
        if error.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UsageError(f"there is neither a sweep nor a run {sweep} in {tracking.uri}") from error
    if SPACE_TAG not in info.tags:
        parent = info.tags.get(SweepMember.ID_TAG)
        hint = f"; it belongs to the sweep {parent}" if parent else ""
        raise UsageError(f"the run {sweep} is not a sweep{hint}")
    return info


def _reported(children: Sequence[RunInfo]) -> tuple[ReportedRun, ...]:
    runs = sorted(map(_run, children), key=lambda run: (run.index, run.attempt, run.created or 0))
    latest = {run.index: run.attempt for run in runs}
    return tuple(replace(run, latest=run.attempt == latest[run.index]) for run in runs)


def _run(info: RunInfo) -> ReportedRun:
    return ReportedRun(
        run_id=info.run_id,
        name=info.name,
        index=tagged_number(info.tags, SweepMember.INDEX_TAG) or 0,
        attempt=tagged_number(info.tags, SweepMember.ATTEMPT_TAG) or 1,
        status=info.status,
        params=info.params,
        metrics={name: value for name, value in info.metrics.items() if math.isfinite(value)},
        created=info.start_time,
        started=tagged_number(info.tags, STARTED_TAG) or info.start_time,
        ended=info.end_time,
        reason=info.tags.get(SweepMember.REASON_TAG),
        failure=info.tags.get(REASON_TAG) or None,
    )


def _space(text: str) -> dict[str, Any]:
    try:
        space = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return space if isinstance(space, dict) else {}
