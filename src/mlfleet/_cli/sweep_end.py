"""What ``mlfleet sweep`` says at its end, to people and to machines."""

from __future__ import annotations

import logging
import shlex
import signal
from collections.abc import Sequence
from typing import Any

import click

from mlfleet._cli.report import error_as_json, exit_code, where_to_look
from mlfleet._cli.sweep_best import Best
from mlfleet._cli.sweep_lines import result_as_json, short
from mlfleet._cli.sweep_screen import duration_text
from mlfleet._cli.sweeping import SweepCommand
from mlfleet._cli.terminal import complain, say
from mlfleet._reporting import run_url
from mlfleet.runs import RunStatus

__all__ = ["end_as_json", "print_table", "sweep_exit_code", "tell_sweep"]

_log = logging.getLogger("mlfleet.cli")


def sweep_exit_code(command: SweepCommand, received: signal.Signals | None) -> int:
    """0 if all points finished, 1 if some did not; see `exit_code` for the rest."""
    if received is not None or command.error is not None:
        return exit_code(command.error, received)
    return 0 if _status(command) is RunStatus.FINISHED else 1


def tell_sweep(command: SweepCommand, received: signal.Signals | None, *, quiet: bool, table: bool) -> None:
    """Say how the sweep ended and where to look at it, on standard error; the best runs on standard output."""
    sweep, best = command.sweep, command.best
    if command.error is not None and received is None:
        _log.debug("the error in full", exc_info=command.error)
        complain(str(command.error))
    if sweep is None:
        if received is not None and not quiet:
            say("stopped before the sweep began")
        return
    if table and best.results:
        _print_best(best)
    elif best.metric is not None and command.counts.finished and not best.results:
        known = ", ".join(sorted(best.metrics)) or "none"
        complain(f"no finished run has the metric {best.metric!r}; there are: {known}", word="Warning", color="yellow")
    if quiet:
        return
    say(f"sweep {sweep.run_name!r} (run {sweep.run_id}) is {_status(command)}: {_counts(command)}")
    if sweep.stopped is not None and received is None and command.error is None:
        say(f"it ended early: {sweep.stopped}")
    if command.tracking is not None:
        say(f"to look at it: {where_to_look(command.tracking, sweep.info)}")
    if sweep.name is not None:
        say(_further(sweep.name, done=_status(command) is RunStatus.FINISHED))


def end_as_json(command: SweepCommand, received: signal.Signals | None) -> dict[str, Any]:
    """The last line of ``--json``."""
    sweep, counts = command.sweep, command.counts
    return {
        "event": "end",
        "status": _status(command) if sweep else None,
        "run_id": sweep.run_id if sweep else None,
        "name": sweep.name if sweep else None,
        "total": counts.total,
        "finished": counts.finished,
        "failed": counts.failed,
        "killed": counts.killed,
        "retries": counts.retries,
        "earlier": counts.earlier,
        "stopped": sweep.stopped if sweep else None,
        "best": [result_as_json(result) for result in command.best.results],
        "tracking_uri": command.tracking,
        "url": run_url(command.tracking, sweep.experiment_id, sweep.run_id) if sweep and command.tracking else None,
        "interrupted": received.name if received else None,
        "error": error_as_json(command.error)["error"] if command.error else None,
    }


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows under their headings, on standard output."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _print_best(best: Best) -> None:
    assert best.metric is not None  # noqa: S101 - nothing is kept without it
    names = list(dict.fromkeys(name for result in best.results for name in result.point))
    rows = [[best.metric, *names, "time", "run"]]
    rows += [
        [
            f"{result.metrics[best.metric]:g}",
            *(short(result.point[name]) if name in result.point else "-" for name in names),
            "-" if result.seconds is None else duration_text(result.seconds),
            result.run_id or "-",
        ]
        for result in best.results
    ]
    print_table(rows)


def _status(command: SweepCommand) -> RunStatus:
    return command.sweep.status if command.sweep is not None else RunStatus.FAILED


def _counts(command: SweepCommand) -> str:
    counts = command.counts
    parts = [f"{counts.finished} finished", f"{counts.failed} failed"]
    parts += [f"{counts.killed} killed"] if counts.killed else []
    parts += [f"{counts.total - counts.ended} not run"] if counts.total and counts.total > counts.ended else []
    parts += [f"{counts.earlier} of them before this session"] if counts.earlier else []
    parts += [f"{counts.retries} tried again"] if counts.retries else []
    return ", ".join(parts)


def _further(name: str, *, done: bool) -> str:
    quoted = shlex.quote(name)
    return f"as a page: mlfleet report {quoted}" if done else f"to go on: the same with --name {quoted} --resume"
