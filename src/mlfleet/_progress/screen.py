"""Live views of a run and of a sweep: what they show, several times a second. Painters show it."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import anyio

from mlfleet._concurrency.cancellation import complete, wait_done
from mlfleet._concurrency.threads import TERMINAL
from mlfleet._engine.options import Goal
from mlfleet._engine.run import FleetRun
from mlfleet._progress.terminal import say
from mlfleet._run_log import get_logger
from mlfleet._sweeps import PointResult, Sweep, SweepCounts
from mlfleet._text.lines import last_lines
from mlfleet._text.plain import duration_text, plain_line, point_text
from mlfleet.runs import RunEvent, RunStatus, Stage

__all__ = [
    "BestRuns",
    "Painter",
    "Picture",
    "Row",
    "RunScreen",
    "Screen",
    "SweepScreen",
    "failure_line",
    "opening_line",
    "retry_line",
    "shown",
]

logger = get_logger("mlfleet.progress")

_INTERVAL = 0.4  # seconds between two pictures
_MOST_ROWS = 8  # active points that are shown
_MOST_METRIC_NAMES = 100
_TAIL = 2048  # bytes at the end of an output in which its last line is searched


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
        if self.metric is None or result.status is not RunStatus.FINISHED:
            return
        if not math.isfinite(result.metrics.get(self.metric, math.nan)):
            return
        # The handle would keep the run's plan in memory.
        self.results.append(replace(result, run=None))
        sign = 1 if self.goal == "min" else -1
        metric = self.metric
        self.results.sort(key=lambda each: (sign * each.metrics[metric], each.index))
        del self.results[self.count :]

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
        last: The last line of its output; empty if there is none.
    """

    name: str
    since: float
    last: str

    @property
    def time(self) -> str:
        """The time that its command has taken so far."""
        return duration_text(time.time() - self.since)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The content of a view at one moment.

    Attributes:
        lines: The lines to add that stay, each with its colour; empty for no colour.
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

    lines: Sequence[tuple[str, str]]
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
        counts = self.counts or SweepCounts()
        return f"{counts.ended}/{'?' if counts.total is None else counts.total}"


class Painter(Protocol):
    """Shows pictures. Its methods are called in a thread and may block."""

    def paint(self, picture: Picture) -> None:
        """Show a picture in the place of the last one, below all lines that stay."""
        ...

    def close(self) -> None:
        """Remove what does not stay."""
        ...


class Screen:
    """A live view: a picture is painted several times a second.

    Args:
        painter: Shows the pictures.
    """

    def __init__(self, painter: Painter) -> None:
        self._painter = painter
        self._lines: deque[tuple[str, str]] = deque()
        self._activity = ""
        self._wake = anyio.Event()
        self._closed = False
        self._tails: dict[Path, tuple[int, str]] = {}

    def say(self, text: str) -> None:
        """Show a line that stays."""
        if self._closed:
            say(text)
            return
        self._lines.append(("", f"mlfleet: {text}"))
        self._wake.set()

    async def keep_up(self) -> None:
        """Paint until this call is cancelled, in a thread: a stopped terminal (Ctrl-S) blocks the writer."""
        while True:
            await self._paint()
            with anyio.move_on_after(_INTERVAL):
                await self._wake.wait()
            self._wake = anyio.Event()

    async def finish(self) -> None:
        """Note how it ended. Called when it has ended."""

    async def close(self) -> None:
        """Paint the last picture and remove what does not stay."""
        await self._paint()
        self._closed = True
        await TERMINAL.run(self._painter.close)

    async def _paint(self) -> None:
        lines = list(self._lines)
        self._lines.clear()
        active = self._active()
        await TERMINAL.run(partial(self._show, self._picture(lines, len(active)), active))

    def _picture(self, lines: Sequence[tuple[str, str]], rows: int) -> Picture:
        """Return the picture of this moment without its rows. Called on the event loop.

        Args:
            lines: The lines to add.
            rows: The number of its rows.
        """
        raise NotImplementedError

    def _active(self) -> list[tuple[str, float, Path | None]]:
        """Return the name, the start and the output of each run to show. Called on the event loop."""
        raise NotImplementedError

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def _show(self, picture: Picture, active: Sequence[tuple[str, float, Path | None]]) -> None:
        rows = [Row(name, since, self._tail(output)) for name, since, output in active]
        kept = {output for _, _, output in active}
        for path in [path for path in self._tails if path not in kept]:
            del self._tails[path]
        self._painter.paint(replace(picture, rows=rows))

    def _tail(self, output: Path | None) -> str:
        """Return the last line of a file, which is read again only if the file has grown."""
        if output is None:
            return ""
        try:
            size = os.stat(output).st_size  # noqa: PTH116 - several times a second
        except OSError:
            return ""
        known = self._tails.get(output)
        if known is None or known[0] != size:
            lines = [clean for line in last_lines(output, 3, _TAIL) if (clean := plain_line(line))]
            known = self._tails[output] = (size, lines[-1] if lines else "")
        return known[1]


class SweepScreen(Screen):
    """A live view of a sweep.

    Args:
        painter: Shows the pictures.
        best: The best results.
        fixed: Names of the parameters that all points share; they are not shown.
    """

    def __init__(self, painter: Painter, best: BestRuns, fixed: Collection[str] = ()) -> None:
        super().__init__(painter)
        self._activity = "opening the tracking store"
        self._best = best
        self._fixed = fixed
        self._sweep: Sweep | None = None
        self._began = time.monotonic()

    def follow(self, event: RunEvent) -> None:
        """Note the activity that an event begins, or a retry."""
        match event.stage:
            case Stage.FETCHING:
                self._activity = f"fetching the project {event.detail}".strip()
            case Stage.PREPARING if event.detail:
                self._activity = f"building the environment: {event.detail}"
            case Stage.QUEUED | Stage.STARTED | Stage.FINISHED:
                self._activity = ""
            case Stage.RETRIED:
                self._lines.append(("yellow", retry_line(event)))

    def entered(self, sweep: Sweep) -> None:
        """Show the size of the sweep."""
        self._sweep = sweep
        self._activity = ""
        self._began = time.monotonic()
        self.say(opening_line(sweep))

    def ended(self, result: PointResult, output: Sequence[str]) -> None:
        """Note a failure; the counts show the other points."""
        if result.status is RunStatus.FAILED:
            self._lines.append(("red", failure_line(result, output)))

    async def results(self, sweep: Sweep) -> list[PointResult]:
        """Follow a sweep to its end, and return its results."""
        self.entered(sweep)
        found = []
        async for result in sweep:
            found.append(result)
            self._best.add(result)
            self.ended(result, () if result.run is None else (await result.run.outcome()).output)
        return found

    async def finish(self) -> None:
        """Note how the sweep ended."""
        sweep = self._sweep
        if sweep is not None:
            self._lines.append(("", f"mlfleet: sweep {sweep.run_name!r} is {sweep.status}: {sweep.counts}"))

    def _picture(self, lines: Sequence[tuple[str, str]], rows: int) -> Picture:
        sweep = self._sweep
        counts = sweep.counts if sweep else None
        return Picture(
            lines=lines,
            title=sweep.run_name if sweep else "",
            counts=counts,
            hidden=max((counts.running if counts else 0) - rows, 0),
            activity=self._activity,
            best=self._best.describe(),
            rate=self._rate(counts),
            stopping=bool(sweep and sweep.stopped),
            done=bool(sweep and sweep.status.is_terminal),
        )

    def _active(self) -> list[tuple[str, float, Path | None]]:
        started = [] if self._sweep is None else [run for run in self._sweep.runs if Stage.STARTED in run.times]
        started.sort(key=lambda run: run.times[Stage.STARTED])
        return [(self._name(run), run.times[Stage.STARTED], run.output_path) for run in started[:_MOST_ROWS]]

    def _name(self, run: FleetRun) -> str:
        point = {name: value for name, value in run.parameters.items() if name not in self._fixed}
        # Of a run of an earlier session only the name is known.
        return f"{run.index}: {point_text(point)}" if run.index is not None else run.info.name

    def _rate(self, counts: SweepCounts | None) -> float | None:
        """Return the points per second in this session; None before the first one has ended."""
        if counts is None or counts.ended == counts.earlier:
            return None
        return (counts.ended - counts.earlier) / max(time.monotonic() - self._began, 0.001)


class RunScreen(Screen):
    """A live view of one run.

    Args:
        painter: Shows the pictures.
        uri: The URI of the project.
        events: The events of the Fleet. Those about fetching the project come before the run has an id.
    """

    def __init__(self, painter: Painter, uri: str, events: AsyncIterable[RunEvent]) -> None:
        super().__init__(painter)
        self._uri = uri
        self._events = events
        self._run: FleetRun | None = None
        self._detail = ""

    async def keep_up(self) -> None:
        """Paint until this call is cancelled."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._follow)
            await super().keep_up()

    async def _follow(self) -> None:
        async for event in self._events:
            if self._run is None:
                if event.stage is Stage.FETCHING and event.uri == self._uri:
                    self._activity = f"fetching the project {event.detail}".strip()
            elif event.run_id == self._run.run_id:
                self._detail = event.detail

    def entered(self, run: FleetRun) -> None:
        """Show the run, which now has an id."""
        self._run = run
        self.say(f"running {run.info.name!r} (run {run.run_id})")

    async def finish(self) -> None:
        """Note how the run ended."""
        run = self._run
        if run is None:
            return
        outcome = await run.outcome()
        color = "red" if outcome.status is RunStatus.FAILED else ""
        reason = f": {outcome.reason}" if outcome.reason and color else ""
        self._lines.append((color, f"mlfleet: {run.info.name!r} (run {run.run_id}) is {outcome.status}{reason}"))

    def _picture(self, lines: Sequence[tuple[str, str]], rows: int) -> Picture:
        run = self._run
        if run is None:
            return Picture(lines=lines, activity=self._activity)
        return Picture(lines=lines, title=run.info.name, activity=self._doing(run.stage))

    def _doing(self, stage: Stage) -> str:
        match stage:
            case Stage.PREPARING if self._detail:
                return f"building the environment: {self._detail}"
            case Stage.PREPARING:
                return "preparing the environment"
            case Stage.FETCHING | Stage.QUEUED:
                return "getting the run ready"
            case Stage.STARTING:
                return "starting"
            case _:
                return ""

    def _active(self) -> list[tuple[str, float, Path | None]]:
        run = self._run
        if run is None or run.stage is not Stage.STARTED:
            return []
        return [(run.info.name, run.times[Stage.STARTED], run.output_path)]


@asynccontextmanager
async def shown(screen: Screen) -> AsyncIterator[None]:
    """Keep a view up to date for the time of the block, and show how it ended. A view that fails harms nothing."""

    async def keep_up() -> None:
        try:
            await screen.keep_up()
        except Exception:
            logger.warning("the progress cannot be shown any more", exc_info=True)

    async def end() -> None:
        painting.cancel()
        await wait_done(painting)
        try:
            await screen.finish()
            await screen.close()
        except Exception:
            logger.warning("the end of the progress could not be shown", exc_info=True)

    painting = asyncio.ensure_future(keep_up())
    try:
        yield
    finally:
        await complete(end, restart=True)


# ---- texts ----------------------------------------------------------------------------------------------------------


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
