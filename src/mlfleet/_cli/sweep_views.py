"""The views of a running sweep: a live screen on a terminal, lines elsewhere, and JSON for programs."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from mlfleet._cli.output import complain, say, to_json
from mlfleet._concurrency.threads import TERMINAL
from mlfleet._engine.run import FleetRun
from mlfleet._sweeps import PointResult, Sweep, SweepCounts
from mlfleet._text.lines import last_lines, write_all
from mlfleet._text.plain import clean, duration_text, plain_line, point_text
from mlfleet.runs import RunEvent, RunStatus, Stage

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

__all__ = ["SweepJson", "SweepLines", "SweepScreen", "SweepView", "result_as_json"]

_MOST_EVENTS = 10_000  # events that wait for a reader before further ones are dropped
_INTERVAL = 0.4  # seconds between two pictures
_MOST_ROWS = 8  # active points that are shown
_TAIL = 2048  # bytes at the end of an output in which its last line is searched


class SweepView(Protocol):
    """A view of a sweep while it runs."""

    def begin(self) -> None:
        """Show that the sweep is being prepared."""
        ...

    def follow(self, event: RunEvent) -> None:
        """Show an event; must not block."""
        ...

    def entered(self, sweep: Sweep) -> None:
        """Show that the sweep has begun."""
        ...

    def ended(self, result: PointResult, output: Sequence[str]) -> None:
        """Show the result of a point.

        Args:
            result: The result.
            output: The last lines of a failed run's output.
        """
        ...

    def say(self, text: str) -> None:
        """Show a line that stays."""
        ...

    async def keep_up(self) -> None:
        """Write everything that is to be shown, until this call is cancelled."""
        ...

    async def close(self) -> None:
        """Write the rest, and nothing after it."""
        ...


class BestSoFar(Protocol):
    """The best results of a sweep, as far as a view needs them."""

    metric: str | None

    def describe(self) -> str:
        """Return the best value so far, in a few words; empty if there is none."""
        ...


# ---- lines ----------------------------------------------------------------------------------------------------------


class SweepLines:
    """A view with one line for each point that has ended, on standard error.

    Args:
        best: The best results, for the name of the metric to show.
        quiet: Show failures only.
    """

    def __init__(self, best: BestSoFar, *, quiet: bool) -> None:
        self._best = best
        self._quiet = quiet
        self._sweep: Sweep | None = None
        self._said: set[str] = set()

    def begin(self) -> None:
        """Show nothing: the first line follows."""

    def follow(self, event: RunEvent) -> None:
        """Show activities that take long, and retries."""
        activity = {Stage.FETCHING: "fetching the project", Stage.PREPARING: "building the environment"}
        if event.detail and event.stage in activity and event.stage not in self._said:
            self._said.add(event.stage)
            self.say(activity[event.stage])
        if event.stage is Stage.RETRIED:
            self.say(_retry_line(event))

    def entered(self, sweep: Sweep) -> None:
        """Show the size of the sweep."""
        self._sweep = sweep
        self.say(_opening_line(sweep))

    def ended(self, result: PointResult, output: Sequence[str]) -> None:
        """Show how a point ended."""
        if result.status is RunStatus.FAILED:
            complain(f"{self._place()} {_failure_line(result, output)}", word="Failed")
        else:
            metric = self._best.metric
            shown = f" {metric}={result.metrics[metric]:g}" if metric is not None and metric in result.metrics else ""
            took = "" if result.seconds is None else f" ({result.seconds:.1f} s)"
            before = ", before this session" if result.earlier else ""
            self.say(
                f"{self._place()} {result.status} point {result.index}: {point_text(result.point)}{shown}{took}{before}"
            )

    def say(self, text: str) -> None:
        """Show a line that stays."""
        if not self._quiet:
            say(text)

    async def keep_up(self) -> None:
        """Return: every line is written at once."""

    async def close(self) -> None:
        """Return: every line is written at once."""

    def _place(self) -> str:
        counts = self._sweep.counts if self._sweep else None
        if counts is None:
            return ""
        return f"[{counts.ended}/{'?' if counts.total is None else counts.total}]"


# ---- JSON -----------------------------------------------------------------------------------------------------------


class SweepJson:
    """A view with one JSON object per line on standard output for every event and result.

    Args:
        quiet: Write nothing to standard error.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._lines: deque[dict[str, Any]] = deque()
        self._lost = 0
        self._changed = anyio.Event()
        self._broken = False

    def begin(self) -> None:
        """Show nothing: the first event follows."""

    def follow(self, event: RunEvent) -> None:
        """Add an event, unless the reader is far behind; the next event then says how many were lost."""
        if len(self._lines) >= _MOST_EVENTS:
            self._lost += 1
            return
        found = {
            "event": event.stage.value,
            "time": event.time,
            "run_id": event.run_id,
            "run_name": event.run_name,
            "index": event.index,
            "attempt": event.attempt,
            "status": event.status,
            "detail": event.detail or None,
        }
        if self._lost:
            found["lost"], self._lost = self._lost, 0
        self._add(found)

    def entered(self, sweep: Sweep) -> None:
        """Add the facts of the sweep."""
        self._add(
            {
                "event": "sweep",
                "run_id": sweep.run_id,
                "name": sweep.name,
                "run_name": sweep.run_name,
                "experiment_id": sweep.experiment_id,
                "total": sweep.counts.total,
                "max_concurrent": sweep.max_concurrent,
            }
        )

    def ended(self, result: PointResult, output: Sequence[str]) -> None:
        """Add the result of a point."""
        self._add({"event": "result", **result_as_json(result), "output": list(output)})

    def say(self, text: str) -> None:
        """Write a message for people to standard error."""
        if not self._quiet:
            say(text)

    async def keep_up(self) -> None:
        """Write lines in a thread: a reader that does not read must not keep Ctrl-C from this process."""
        while True:
            await self._changed.wait()
            await self._write()

    async def close(self) -> None:
        """Write the lines that are left."""
        await self._write()

    def _add(self, found: dict[str, Any]) -> None:
        self._lines.append(found)
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def _write(self) -> None:
        while self._lines:
            text = "".join(f"{to_json(self._lines.popleft())}\n" for _ in range(min(len(self._lines), 100)))
            if not self._broken:
                await TERMINAL.run(partial(self._put, text.encode(errors="replace")))

    def _put(self, data: bytes) -> None:
        try:
            write_all(sys.stdout.fileno(), data)
        except OSError:
            self._broken = True  # the reader is gone; the sweep goes on


# ---- the live screen ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """An active point."""

    name: str
    since: float
    output: Path | None


@dataclass(frozen=True, slots=True)
class _Picture:
    """The content of the screen at one moment."""

    lines: Sequence[tuple[str, str]]
    title: str
    counts: SweepCounts | None
    rows: Sequence[_Row]
    hidden: int
    activity: str
    best: str
    rate: float | None
    stopping: bool


class SweepScreen:
    """A live view on a terminal: lasting lines above, the state of the sweep below, painted again and again.

    Args:
        best: The best results.
        fixed: Names of the parameters that all points share; they are not shown.
    """

    def __init__(self, best: BestSoFar, fixed: Collection[str] = ()) -> None:
        self._best = best
        self._fixed = fixed
        self._sweep: Sweep | None = None
        self._lines: deque[tuple[str, str]] = deque()
        self._activity = "opening the tracking store"
        self._began = time.monotonic()
        self._stopping = False
        self._wake = anyio.Event()
        self._live: Live | None = None
        self._closed = False
        self._tails: dict[Path, tuple[int, str]] = {}

    def begin(self) -> None:
        """Show nothing: the first picture follows."""

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
                self._lines.append(("yellow", _retry_line(event)))

    def entered(self, sweep: Sweep) -> None:
        """Show the size of the sweep."""
        self._sweep = sweep
        self._activity = ""
        self._began = time.monotonic()
        self.say(_opening_line(sweep))

    def ended(self, result: PointResult, output: Sequence[str]) -> None:
        """Note a failure; the counts show the other points."""
        if result.status is RunStatus.FAILED:
            self._lines.append(("red", _failure_line(result, output)))

    def say(self, text: str) -> None:
        """Show a line that stays."""
        if self._closed:
            say(text)
            return
        self._stopping = self._stopping or "stopping" in text
        self._lines.append(("", f"mlfleet: {text}"))
        self._wake.set()

    async def keep_up(self) -> None:
        """Paint a picture several times a second, in a thread: a stopped terminal (Ctrl-S) blocks the writer."""
        while True:
            await TERMINAL.run(partial(self._paint, self._picture()))
            with anyio.move_on_after(_INTERVAL):
                await self._wake.wait()
            self._wake = anyio.Event()

    async def close(self) -> None:
        """Write the last lines and remove the rest of the view."""
        await TERMINAL.run(partial(self._paint, self._picture()))
        self._closed = True
        if self._live is not None:
            await TERMINAL.run(self._live.stop)

    # ---- on the event loop ------------------------------------------------------------------------------------------

    def _picture(self) -> _Picture:
        sweep = self._sweep
        lines = list(self._lines)
        self._lines.clear()
        started = [] if sweep is None else [run for run in sweep.runs if Stage.STARTED in run.times]
        started.sort(key=lambda run: run.times[Stage.STARTED])
        shown = [self._row(run) for run in started[:_MOST_ROWS]]
        counts = sweep.counts if sweep else None
        return _Picture(
            lines=lines,
            title=sweep.run_name if sweep else "",
            counts=counts,
            rows=shown,
            hidden=max((counts.running if counts else 0) - len(shown), 0),
            activity=self._activity,
            best=self._best.describe(),
            rate=self._rate(counts),
            stopping=self._stopping or bool(sweep and sweep.stopped),
        )

    def _row(self, run: FleetRun) -> _Row:
        point = {name: value for name, value in run.parameters.items() if name not in self._fixed}
        # Of a run of an earlier session only the name is known.
        name = f"{run.index}: {point_text(point)}" if run.index is not None else run.info.name
        return _Row(name, run.times[Stage.STARTED], run.output_path)

    def _rate(self, counts: SweepCounts | None) -> float | None:
        """Return the points per second in this session; None before the first one has ended."""
        if counts is None or counts.ended == counts.earlier:
            return None
        return (counts.ended - counts.earlier) / max(time.monotonic() - self._began, 0.001)

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def _paint(self, picture: _Picture) -> None:
        try:
            live = self._live or self._start()
            for style, line in picture.lines:
                # Only the terminal wraps the line, so that ids and addresses can be copied in one piece.
                live.console.print(
                    clean(line), style=style or None, markup=False, highlight=False, emoji=False, soft_wrap=True
                )
            live.update(self._region(picture, live.console.width), refresh=True)
        except OSError:
            return  # the terminal is gone; the sweep goes on

    def _start(self) -> Live:
        # rich takes as long to import as the rest of the command line.
        from rich.console import Console
        from rich.live import Live

        live = Live(console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=False)
        self._live = live
        live.start()
        return live

    def _region(self, picture: _Picture, width: int) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = []
        if picture.counts is not None:
            parts.append(_bar(picture, picture.counts))
            parts.append(_counts(picture, picture.counts))
        if picture.activity:
            parts.append(Text(_fit(clean(picture.activity), width), style="dim"))
        parts += [self._running(row, width) for row in picture.rows]
        if picture.hidden and picture.rows:
            parts.append(Text(f"  and {picture.hidden} more", style="dim"))
        self._forget(picture.rows)
        return Group(*parts)

    def _running(self, row: _Row, width: int) -> RenderableType:
        from rich.text import Text

        start = f"  {_fit(row.name, 40):<24}  {duration_text(time.time() - row.since):>6}  "
        text = Text(_fit(start, width), style="cyan")
        text.append(_fit(self._tail(row.output), max(width - len(start) - 1, 0)), style="default")
        return text

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

    def _forget(self, rows: Sequence[_Row]) -> None:
        kept = {row.output for row in rows}
        for path in [path for path in self._tails if path not in kept]:
            del self._tails[path]


def _bar(picture: _Picture, counts: SweepCounts) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    share = "" if not counts.total else f"{100 * counts.ended // counts.total:3d}%"
    done = f"{counts.ended}/{'?' if counts.total is None else counts.total}"
    bar = ProgressBar(total=counts.total, completed=counts.ended, width=40, pulse=counts.total is None)
    grid.add_row(Text(_fit(picture.title, 30), style="bold"), bar, Text(done), Text(share))
    return grid


def _counts(picture: _Picture, counts: SweepCounts) -> RenderableType:
    from rich.text import Text

    text = Text("  ")
    for number, word, style in (
        (counts.finished, "finished", "green"),
        (counts.failed, "failed", "red"),
        (counts.killed, "killed", "yellow"),
        (counts.running, "running", "cyan"),
        (counts.retries, "tried again", "yellow"),
        (counts.earlier, "from before", "dim"),
    ):
        if number or word == "running":
            text.append(f"{number} {word}  ", style=style)
    if picture.stopping:
        text.append("stopping  ", style="bold yellow")
    elif picture.rate:
        text.append(f"{_rate_text(picture.rate)}  ")
        if counts.total is not None:
            text.append(f"{duration_text((counts.total - counts.ended) / picture.rate)} left  ")
    text.append(picture.best, style="bold")
    return text


def _rate_text(per_second: float) -> str:
    if per_second >= 1:
        return f"{per_second:.1f}/s"
    return f"{per_second * 60:.1f}/min" if per_second * 60 >= 1 else f"{per_second * 3600:.1f}/h"


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


# ---- texts of all views ---------------------------------------------------------------------------------------------


def result_as_json(result: PointResult) -> dict[str, Any]:
    """Return everything that is known about a point."""
    return {
        "index": result.index,
        "status": result.status,
        "run_id": result.run_id,
        "parameters": {name: _masked(value) for name, value in result.parameters.items()},
        "metrics": dict(result.metrics),
        "attempts": result.attempts,
        "seconds": result.seconds,
        "exit_code": result.exit_code,
        "reason": result.reason,
        "kind": result.kind,
        "earlier": result.earlier,
    }


def _masked(value: object) -> object:
    """Return a value with the secrets of URIs masked; MLflow has the parameter as it was given."""
    return clean(value) if isinstance(value, str) and "://" in value else value


def _opening_line(sweep: Sweep) -> str:
    total = sweep.counts.total
    many = "points" if total is None else "1 point" if total == 1 else f"{total} points"
    return f"sweep {sweep.run_name!r} (run {sweep.run_id}): {many}, up to {sweep.max_concurrent} at once"


def _failure_line(result: PointResult, output: Sequence[str]) -> str:
    tries = f" (attempt {result.attempts})" if result.attempts > 1 else ""
    last = next((clean for line in reversed(output) if (clean := plain_line(line))), "")
    return f"point {result.index}{tries}: {point_text(result.point)}: {result.reason}" + (f": {last}" if last else "")


def _retry_line(event: RunEvent) -> str:
    return f"point {event.index} is tried again, attempt {event.attempt} failed: {event.detail}"
