"""What a sweep tells in lines: to people where there is no terminal, or as JSON to programs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import anyio

from mlfleet._cli.sweep_best import Best
from mlfleet._cli.terminal import complain, say
from mlfleet._concurrency.threads import TERMINAL
from mlfleet._sweeps import PointResult, Sweep
from mlfleet.runs import RunEvent, RunStatus, Stage

__all__ = [
    "SweepJson",
    "SweepLines",
    "failure_line",
    "json_line",
    "opening_line",
    "plain_line",
    "result_as_json",
    "retry_line",
    "short",
    "values",
]

_MOST_EVENTS = 10_000
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|.)")


class SweepLines:
    """One line for each point that has ended, on standard error.

    Args:
        best: which metric to tell.
        quiet: only failures.
    """

    def __init__(self, best: Best, *, quiet: bool) -> None:
        self._best = best
        self._quiet = quiet
        self._sweep: Sweep | None = None
        self._told: set[str] = set()

    def begin(self) -> None:
        """Nothing is worth a line yet."""

    def follow(self, event: RunEvent) -> None:
        """Tell what takes long, and what is tried again."""
        activity = {Stage.FETCHING: "fetching the project", Stage.PREPARING: "building the environment"}
        if event.detail and event.stage in activity and event.stage not in self._told:
            self._told.add(event.stage)
            self.say(activity[event.stage])
        if event.stage is Stage.RETRIED:
            self.say(retry_line(event))

    def entered(self, sweep: Sweep) -> None:
        """Tell how large it is."""
        self._sweep = sweep
        self.say(opening_line(sweep))

    def ended(self, result: PointResult, output: Sequence[str]) -> None:
        """Tell how a point ended."""
        if result.status is RunStatus.FAILED:
            complain(f"{self._place()} {failure_line(result, output)}", word="Failed")
        else:
            metric = self._best.metric
            told = f" {metric}={result.metrics[metric]:g}" if metric is not None and metric in result.metrics else ""
            took = "" if result.seconds is None else f" ({result.seconds:.1f} s)"
            before = ", before this session" if result.earlier else ""
            self.say(
                f"{self._place()} {result.status} point {result.index}: {values(result.point)}{told}{took}{before}"
            )

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            say(text)

    async def keep_up(self) -> None:
        """Every line is told at once."""

    async def close(self) -> None:
        """There is nothing left."""

    def _place(self) -> str:
        counts = self._sweep.counts if self._sweep else None
        if counts is None:
            return ""
        return f"[{counts.ended}/{'?' if counts.total is None else counts.total}]"


class SweepJson:
    """One JSON object a line on standard output for everything that happens.

    Args:
        quiet: tell nothing on standard error.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._lines: deque[dict[str, Any]] = deque()
        self._lost = 0
        self._changed = anyio.Event()
        self._broken = False

    def begin(self) -> None:
        """There is no event yet."""

    def follow(self, event: RunEvent) -> None:
        """Tell of it, unless the reader is far behind."""
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
        """Tell what it is."""
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
        """Tell how a point ended."""
        self._add({"event": "result", **result_as_json(result), "output": list(output)})

    def say(self, text: str) -> None:
        """For people, who may look at standard error."""
        if not self._quiet:
            say(text)

    async def keep_up(self) -> None:
        """Write in a thread: whoever does not read our pipe must not keep Ctrl-C from us."""
        while True:
            await self._changed.wait()
            await self._write()

    async def close(self) -> None:
        """Write what is left."""
        await self._write()

    def _add(self, found: dict[str, Any]) -> None:
        self._lines.append(found)
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def _write(self) -> None:
        while self._lines:
            text = "".join(json_line(self._lines.popleft()) for _ in range(min(len(self._lines), 100)))
            if not self._broken:
                await TERMINAL.run(partial(self._put, text.encode(errors="replace")))

    def _put(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(sys.stdout.fileno(), data) :]
        except OSError:
            self._broken = True  # nobody reads it any more, which is not the sweep's concern


def json_line(found: Mapping[str, Any]) -> str:
    """One object, with its line end."""
    return json.dumps(found, ensure_ascii=False, default=str) + "\n"


def result_as_json(result: PointResult) -> dict[str, Any]:
    """All that is known of a point."""
    return {
        "index": result.index,
        "status": result.status,
        "run_id": result.run_id,
        "parameters": dict(result.parameters),
        "metrics": dict(result.metrics),
        "attempts": result.attempts,
        "seconds": result.seconds,
        "exit_code": result.exit_code,
        "reason": result.reason,
        "kind": result.kind,
        "earlier": result.earlier,
    }


def opening_line(sweep: Sweep) -> str:
    """What has begun."""
    total = sweep.counts.total
    many = "points" if total is None else "1 point" if total == 1 else f"{total} points"
    return f"sweep {sweep.run_name!r} (run {sweep.run_id}): {many}, up to {sweep.max_concurrent} at once"


def failure_line(result: PointResult, output: Sequence[str]) -> str:
    """Which point failed, why, and the last that it said."""
    tries = f" (attempt {result.attempts})" if result.attempts > 1 else ""
    last = next((clean for line in reversed(output) if (clean := plain_line(line))), "")
    return f"point {result.index}{tries}: {values(result.point)}: {result.reason}" + (f": {last}" if last else "")


def plain_line(line: str) -> str:
    """What a terminal would show of a line in the end, without anything that could move its cursor."""
    text = _ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2]
    return "".join(character if character.isprintable() else " " for character in text).strip()


def retry_line(event: RunEvent) -> str:
    """Which point is tried again, and why."""
    return f"point {event.index} is tried again, attempt {event.attempt} failed: {event.detail}"


def values(point: Mapping[str, Any]) -> str:
    """The parameters of a point in one short line."""
    return " ".join(f"{name}={short(value)}" for name, value in point.items())


def short(value: object) -> str:
    """A value as people want to read it."""
    text = f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:39]}…"
