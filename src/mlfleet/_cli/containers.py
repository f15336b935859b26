"""``mlfleet ps`` and ``mlfleet prune``: runs that outlive their process, and what is left of them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Any

import anyio
import click

from mlfleet._cli.options import debug_option, json_option
from mlfleet._cli.output import complain, print_json, short
from mlfleet._concurrency.threads import FILES
from mlfleet._sweeps.notes import SweepEntry, list_sweeps
from mlfleet._text.lines import last_lines
from mlfleet._text.plain import plain_line
from mlfleet.backends.base import Backend, ListedRun
from mlfleet.backends.registry import find, native
from mlfleet.errors import BackendError, BackendNotFound

__all__ = ["prune", "ps"]

_log = logging.getLogger("mlfleet.cli")
_json = json_option("Print a JSON list.")
_BLANK = dict.fromkeys(
    (
        "run_id",
        "backend",
        "state",
        "supervised",
        "created",
        "project",
        "image",
        "container",
        "pid",
        "last_line",
        "sweep",
    )
)


@click.command()
@click.option(
    "-b",
    "--backend",
    "asked",
    metavar="NAME",
    multiple=True,
    help="List also the runs of this backend, which needs a login and is not asked otherwise; repeatable.",
)
@_json
@debug_option
def ps(*, asked: tuple[str, ...], as_json: bool) -> None:
    """List runs and sweeps that outlive the process that started them, the newest first.

    What nobody looks after was left by a process that died: mlfleet sweep --resume or mlfleet.attach(RUN_ID) picks it
    up; mlfleet logs, wait and cancel work on all.
    """
    rows = [_sweep_row(entry) for entry in list_sweeps()]
    rows += [_run_row(run) for run in anyio.run(_on_each_backend, asked, lambda backend: backend.list_runs())]
    _print(sorted(rows, key=lambda row: row["created"], reverse=True), as_json=as_json, none="no runs")


@click.command()
@click.argument("run_ids", metavar="[RUN_ID]...", nargs=-1)
@click.option("--running", is_flag=True, help="Remove also what still runs, which ends it.")
@click.option("--dry-run", is_flag=True, help="Print what would be removed, and remove nothing.")
@click.option(
    "-b",
    "--backend",
    "asked",
    metavar="NAME",
    multiple=True,
    help="Prune also this backend, which needs a login and is not asked otherwise; repeatable.",
)
@_json
@debug_option
def prune(*, run_ids: tuple[str, ...], running: bool, dry_run: bool, asked: tuple[str, ...], as_json: bool) -> None:
    """Remove what backends keep of runs that no process looks after, such as containers.

    With ids of runs, remove only what is kept of these.
    """

    def work(backend: Backend) -> Awaitable[Sequence[ListedRun]]:
        return backend.prune(run_ids, running=running, dry_run=dry_run)

    removed = anyio.run(partial(_on_each_backend, asked, work, strict=True))
    _print([_run_row(run) for run in removed], as_json=as_json, none="nothing to remove")


async def _on_each_backend(
    asked: Collection[str], work: Callable[[Backend], Awaitable[Sequence[ListedRun]]], *, strict: bool = False
) -> list[ListedRun]:
    """Call `work` with every backend that needs no login, and with those that were asked for.

    Args:
        asked: The names of backends that were asked for. An error of theirs is raised.
        work: Lists or removes runs.
        strict: True to raise the errors of all backends; False to print a warning in their place.
    """
    found: list[ListedRun] = []
    for name in dict.fromkeys((*native(), *asked)):
        try:
            kind = await FILES.run(partial(find, name))  # in a thread: it imports the backend
            if kind.needs_login and name not in asked:
                continue
            async with kind() as backend:
                found += await work(backend)
        except BackendNotFound:
            if name in asked:
                raise
            _log.debug("the backend %s is left out", name, exc_info=True)
        except BackendError as error:
            if strict or name in asked:
                raise
            complain(f"the runs of the backend {name!r} are not listed: {error}", word="Warning", color="yellow")
    return found


def _sweep_row(entry: SweepEntry) -> dict[str, Any]:
    return {
        **_BLANK,
        "run_id": entry.run_id,
        "backend": "sweep",
        "state": "running" if entry.driven else "left",
        "supervised": entry.driven,
        "created": entry.began,
        "project": entry.project,
        "sweep": entry.name,
    }


def _run_row(run: ListedRun) -> dict[str, Any]:
    lines = () if run.output is None else reversed(last_lines(run.output, 3))
    last_line = next((clean for line in lines if (clean := plain_line(line))), "")
    return {
        **_BLANK,
        "last_line": None if run.output is None else last_line,
        **run.detail,
        "run_id": run.run_id,
        "backend": run.backend,
        "state": run.state,
        "supervised": run.supervised,
        "created": run.created,
    }


def _print(rows: list[dict[str, Any]], *, as_json: bool, none: str) -> None:
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo(none, err=True)
    for row in rows:
        after = "" if row["supervised"] else "  (nobody looks after it)"
        created = row["created"].astimezone().strftime("%Y-%m-%d %H:%M")
        if row["sweep"]:
            what = f"{row['sweep']}  {row['project']}"
        elif row["pid"]:
            what = f"pid {row['pid']}  {short(row['last_line'] or '')}"
        else:
            what = "  ".join(str(value) for name, value in row.items() if name not in _NAMED and value)
        click.echo(f"{row['run_id']}  {row['backend']:6}  {row['state']:8}  {created}  {what.rstrip()}{after}")


_NAMED = {"run_id", "backend", "state", "supervised", "created", "container"}  # have a column, or are for --json only
