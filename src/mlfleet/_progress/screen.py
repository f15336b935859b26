"""Live views of a run and of a sweep: what happens is noted, and a picture of it painted several times a second."""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import anyio

from mlfleet._concurrency.cancellation import complete, wait_done
from mlfleet._concurrency.threads import TERMINAL
from mlfleet._engine.run import FleetRun
from mlfleet._progress.picture import (
    BestRuns,
    Painter,
    Picture,
    Row,
    activity,
    failure_line,
    opening_line,
    result_line,
    retry_line,
    share,
)
from mlfleet._progress.terminal import say
from mlfleet._run_log import get_logger
from mlfleet._sweeps import PointResult, Sweep, SweepCounts
from mlfleet._text.lines import last_lines
from mlfleet._text.plain import plain_line, point_text
from mlfleet.runs import RunEvent, RunStatus, Stage

__all__ = ["RunScreen", "Screen", "SweepScreen", "View", "shown"]

logger = get_logger("mlfleet.progress")

_INTERVAL = 0.4  # seconds between two pictures
_MOST_ROWS = 8  # active points that are shown
_TAIL = 2048  # bytes at the end of an output in which its last line is searched


class View(Protocol):
    """A view that `shown` keeps up to date."""

    async def keep_up(self) -> None:
        """Write everything that is to be shown, until this call is cancelled."""
        ...

    async def close(self) -> None:
        """Write the rest, and nothing after it."""
        ...


class Screen(ABC):
    """A live view: a picture is painted several times a second.

    Args:
        painter: Shows the pictures.
        quiet: Show failures only.
    """

    def __init__(self, painter: Painter, *, quiet: bool = False) -> None:
        self._painter = painter
        self._quiet = quiet
        self._lines: deque[tuple[str, str]] = deque()
        self._activity = ""
        self._wake = anyio.Event()
        self._closed = False
        self._tails: dict[Path, tuple[int, str]] = {}

    def say(self, text: str, color: str = "") -> None:
        """Show a line that stays."""
        if self._quiet:
            return
        if self._closed:
            say(text)
        else:
            self._add(color, f"mlfleet: {text}")

    async def keep_up(self) -> None:
        """Paint until this call is cancelled, in a thread: a stopped terminal (Ctrl-S) blocks the writer."""
        while True:
            await self._paint()
            with anyio.move_on_after(_INTERVAL):
                await self._wake.wait()
            self._wake = anyio.Event()

    async def close(self) -> None:
        """Paint the last picture and remove what does not stay."""
        await self._paint()
        self._closed = True
        await TERMINAL.run(self._painter.close)

    @abstractmethod
    def _picture(self) -> Picture:
        """Return the picture of this moment without the lines that stay. Called on the event loop."""

    def _add(self, color: str, line: str) -> None:
        self._lines.append((color, line))
        self._wake.set()

    async def _paint(self) -> None:
        await TERMINAL.run(partial(self._show, self._picture()))

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def _show(self, picture: Picture) -> None:
        # Taken here: a call that is cancelled before its thread has begun would lose them.
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        rows = [replace(row, last=self._tail(row.output)) for row in picture.rows]
        kept = {row.output for row in rows}
        for path in [path for path in self._tails if path not in kept]:
            del self._tails[path]
        self._painter.paint(replace(picture, lines=lines, rows=rows))

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
        says_all: Say what takes long and how each point ended, too, for a painter that shows the lines only.
        quiet: Show failures only.
    """

    def __init__(
        self,
        painter: Painter,
        best: BestRuns,
        fixed: Collection[str] = (),
        *,
        says_all: bool = False,
        quiet: bool = False,
    ) -> None:
        super().__init__(painter, quiet=quiet)
        self._activity = "opening the tracking store"
        self._best = best
        self._fixed = fixed
        self._says_all = says_all
        self._said: set[Stage] = set()
        self._sweep: Sweep | None = None
        self._began = time.monotonic()

    def follow(self, event: RunEvent) -> None:
        """Note the activity that an event begins, or a retry."""
        if event.stage is Stage.RETRIED:
            self.say(retry_line(event), "yellow")
        elif event.stage in (Stage.QUEUED, Stage.STARTED, Stage.FINISHED):
            self._activity = ""
        elif event.detail or event.stage is Stage.FETCHING:  # the others take too little time to show them for each run
            self._activity = activity(event.stage, event.detail)
            if self._says_all and event.detail and event.stage not in self._said:
                self._said.add(event.stage)
                self.say(activity(event.stage, event.detail, brief=True))

    def entered(self, sweep: Sweep) -> None:
        """Show the size of the sweep."""
        self._sweep = sweep
        self._activity = ""
        self._began = time.monotonic()
        self.say(opening_line(sweep))

    def ended(self, result: PointResult, output: Sequence[str]) -> None:
        """Show how a point ended, if it failed or `says_all`; the counts show the other points.

        Args:
            result: The result.
            output: The last lines of a failed run's output.
        """
        place = f"[{share(self._sweep.counts)}]" if self._sweep else ""
        if result.status is not RunStatus.FAILED:
            if self._says_all:
                self.say(f"{place} {result_line(result, self._best.metric)}")
        elif self._says_all:
            self._add("red", f"Failed: {place} {failure_line(result, output)}")
        else:
            self._add("red", failure_line(result, output))

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
        """Say how the sweep ended."""
        sweep = self._sweep
        if sweep is not None:
            self.say(f"sweep {sweep.run_name!r} is {sweep.status}: {sweep.counts}")

    def _picture(self) -> Picture:
        sweep = self._sweep
        if sweep is None:
            return Picture(activity=self._activity)
        counts, rows = sweep.counts, self._rows(sweep)
        return Picture(
            title=sweep.run_name,
            counts=counts,
            rows=rows,
            hidden=max(counts.running - len(rows), 0),
            activity=self._activity,
            best=self._best.describe(),
            rate=self._rate(counts),
            stopping=bool(sweep.stopped),
            done=sweep.status.is_terminal,
        )

    def _rows(self, sweep: Sweep) -> list[Row]:
        started = [run for run in sweep.runs if Stage.STARTED in run.times]
        started.sort(key=lambda run: run.times[Stage.STARTED])
        return [Row(self._name(run), run.times[Stage.STARTED], run.output_path) for run in started[:_MOST_ROWS]]

    def _name(self, run: FleetRun) -> str:
        point = {name: value for name, value in run.parameters.items() if name not in self._fixed}
        # Of a run of an earlier session only the name is known.
        return f"{run.index}: {point_text(point)}" if run.index is not None else run.info.name

    def _rate(self, counts: SweepCounts) -> float | None:
        """Return the points per second in this session; None before the first one has ended."""
        if counts.ended == counts.earlier:
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
                    self._activity = activity(event.stage, event.detail)
            elif event.run_id == self._run.run_id:
                self._detail = event.detail

    def entered(self, run: FleetRun) -> None:
        """Show the run, which now has an id."""
        self._run = run
        self.say(f"running {run.info.name!r} (run {run.run_id})")

    async def finish(self) -> None:
        """Say how the run ended."""
        run = self._run
        if run is None:
            return
        outcome = await run.outcome()
        failed = outcome.status is RunStatus.FAILED
        reason = f": {outcome.reason}" if failed and outcome.reason else ""
        self.say(f"{run.info.name!r} (run {run.run_id}) is {outcome.status}{reason}", "red" if failed else "")

    def _picture(self) -> Picture:
        run = self._run
        if run is None:
            return Picture(activity=self._activity)
        rows = []
        if run.stage is Stage.STARTED:
            rows = [Row(run.info.name, run.times[Stage.STARTED], run.output_path)]
        return Picture(title=run.info.name, rows=rows, activity=activity(run.stage, self._detail))


@asynccontextmanager
async def shown(view: View, finish: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[None]:
    """Keep a view up to date for the time of the block. A view that fails harms nothing.

    Args:
        view: The view.
        finish: Says how the work has ended, before the view is closed; None for a caller that does so afterwards.
    """

    async def keep_up() -> None:
        try:
            await view.keep_up()
        except Exception:
            logger.warning("the progress cannot be shown any more", exc_info=True)

    async def end() -> None:
        painting.cancel()
        await wait_done(painting)
        try:
            if finish is not None:
                await finish()
            await view.close()
        except Exception:
            logger.warning("the end of the progress could not be shown", exc_info=True)

    painting = asyncio.ensure_future(keep_up())
    try:
        yield
    finally:
        await complete(end, restart=True)
