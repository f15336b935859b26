"""The view of a running sweep for programs: JSON. `_progress` has those for people."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import anyio

from mlfleet._cli.output import masked, to_json
from mlfleet._concurrency.threads import TERMINAL
from mlfleet._progress import say
from mlfleet._sweeps import PointResult, Sweep
from mlfleet._text.lines import write_all
from mlfleet.runs import RunEvent

__all__ = ["SweepJson", "result_as_json"]

_MOST_EVENTS = 10_000  # events that wait for a reader before further ones are dropped


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
            await TERMINAL.run(self._put)

    def _put(self) -> None:
        # Taken in the thread: a call that is cancelled before its thread has begun would lose them.
        text = "".join(f"{to_json(self._lines.popleft())}\n" for _ in range(min(len(self._lines), 100)))
        try:
            if not self._broken:
                write_all(sys.stdout.fileno(), text.encode(errors="replace"))
        except OSError:
            self._broken = True  # the reader is gone; the sweep goes on


def result_as_json(result: PointResult) -> dict[str, Any]:
    """Return everything that is known about a point."""
    return {
        "index": result.index,
        "status": result.status,
        "run_id": result.run_id,
        "parameters": masked(result.parameters),
        "metrics": dict(result.metrics),
        "attempts": result.attempts,
        "seconds": result.seconds,
        "exit_code": result.exit_code,
        "reason": result.reason,
        "kind": result.kind,
        "earlier": result.earlier,
    }
