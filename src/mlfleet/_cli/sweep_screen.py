"""A sweep on a terminal: what stays is above, how far it is below, painted again and again."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from mlfleet._cli.sweep_best import Best
from mlfleet._cli.sweep_lines import failure_line, opening_line, plain_line, retry_line, values
from mlfleet._cli.terminal import say
from mlfleet._concurrency.threads import TERMINAL
from mlfleet._engine.run import FleetRun
from mlfleet._sweeps import PointResult, Sweep, SweepCounts
from mlfleet._text.lines import last_lines
from mlfleet.runs import RunEvent, RunStatus, Stage

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

__all__ = ["SweepScreen", "duration_text"]

_INTERVAL = 0.4  # seconds between two pictures
_MOST_ROWS = 8  # running points that are shown
_TAIL = 2048  # bytes at the end of an output in which its last line is looked for


@dataclass(frozen=True, slots=True)
class _Row:
    """A point that runs."""

    name: str
    since: float
    output: Path | None


@dataclass(frozen=True, slots=True)
class _Picture:
    """What is to be seen now."""

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
    """The live view.

    Args:
        best: which metric to tell.
        fixed: names of the parameters that are the same for all points.
    """

    def __init__(self, best: Best, fixed: Collection[str] = ()) -> None:
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
        """The first picture follows."""

    def follow(self, event: RunEvent) -> None:
        """Note what goes on."""
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
        """Tell how large it is."""
        self._sweep = sweep
        self._activity = ""
        self._began = time.monotonic()
        self.say(opening_line(sweep))

    def ended(self, result: PointResult, output: Sequence[str]) -> None:
        """Note a failure; what went well is in the counts."""
        if result.status is RunStatus.FAILED:
            self._lines.append(("red", failure_line(result, output)))

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._closed:
            say(text)
            return
        self._stopping = self._stopping or "stopping" in text
        self._lines.append(("", f"mlfleet: {text}"))
        self._wake.set()

    async def keep_up(self) -> None:
        """Paint a picture a few times a second, in a thread: a terminal can be held (Ctrl-S)."""
        while True:
            await TERMINAL.run(partial(self._paint, self._picture()))
            with anyio.move_on_after(_INTERVAL):
                await self._wake.wait()
            self._wake = anyio.Event()

    async def close(self) -> None:
        """Write the last lines and take the rest away."""
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
            best=self._best_so_far(),
            rate=self._rate(counts),
            stopping=self._stopping or bool(sweep and sweep.stopped),
        )

    def _row(self, run: FleetRun) -> _Row:
        request = run.plan.request
        point = {name: value for name, value in request.parameters.items() if name not in self._fixed}
        # A run of an earlier session is known by its name only.
        name = f"{request.member.index}: {values(point)}" if request.member else run.info.name
        return _Row(name, run.times[Stage.STARTED], run.output_path)

    def _best_so_far(self) -> str:
        if not self._best.results or self._best.metric is None:
            return ""
        best = self._best.results[0]
        return f"best {self._best.metric} {best.metrics[self._best.metric]:g} (point {best.index})"

    def _rate(self, counts: SweepCounts | None) -> float | None:
        """Points a second, in this session."""
        if counts is None or counts.ended == counts.earlier:
            return None
        return (counts.ended - counts.earlier) / max(time.monotonic() - self._began, 0.001)

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def _paint(self, picture: _Picture) -> None:
        try:
            live = self._live or self._start()
            for style, line in picture.lines:
                # Wrapped by the terminal alone, so that ids and addresses can be copied whole.
                live.console.print(
                    line, style=style or None, markup=False, highlight=False, emoji=False, soft_wrap=True
                )
            live.update(self._region(picture, live.console.width), refresh=True)
        except OSError:
            return  # the terminal is gone, which is not the sweep's concern

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
            parts.append(Text(_fit(picture.activity, width), style="dim"))
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
        """The last line of a file, read again only if the file has grown."""
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


def duration_text(seconds: float) -> str:
    """A time in its two largest units."""
    whole = max(int(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"
