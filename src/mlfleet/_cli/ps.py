"""``mlfleet ps``: runs and sweeps that outlive the process that started them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import anyio
import click

from mlfleet._cli.options import asked_option, debug_option, json_option, read_asked
from mlfleet._cli.output import complain, print_json, print_line
from mlfleet._concurrency.threads import FILES
from mlfleet._engine.conclude import Driver
from mlfleet._engine.records import RunRecord, list_records
from mlfleet._paths import run_folder
from mlfleet._run_log import get_logger
from mlfleet._sweeps import track
from mlfleet._sweeps.record import SweepEntry, list_sweeps
from mlfleet._text.lines import last_lines
from mlfleet._text.plain import plain_line, short
from mlfleet.backends.base import Backend, ListedRun
from mlfleet.backends.registry import find, native
from mlfleet.errors import BackendError, BackendNotFound
from mlfleet.fleet import Fleet, context_of
from mlfleet.runs import REASON_TAG

__all__ = ["on_each_backend", "print_rows", "ps", "run_row"]

_log = get_logger("mlfleet.cli")
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
@click.argument("run_ids", metavar="[RUN_ID]...", nargs=-1)
@asked_option("list the runs of")
@json_option()
@debug_option
def ps(
    *,
    run_ids: tuple[str, ...],
    asked: tuple[str, ...],
    backend_config: str | None,
    tracking_uri: str | None,
    as_json: bool,
) -> None:
    """List the active runs and sweeps that this machine knows, the newest first; or show the runs with these ids.

    "nobody looks after it" means that the process that started the run has died. mlfleet sweep --resume or
    mlfleet.attach(RUN_ID) take over; mlfleet logs, wait and cancel work on all runs. With ids, the status of a run
    that is over and whose process has died is written to MLflow.
    """
    if run_ids:
        print_rows(anyio.run(_rows_by_id, run_ids, tracking_uri), as_json=as_json, none="no runs")
        return
    rows = [_sweep_row(entry) for entry in list_sweeps()]
    configs = read_asked(asked, backend_config)
    found = anyio.run(on_each_backend, configs, tracking_uri, lambda backend: backend.list_runs())
    listed = [run_row(run) for run in found]
    records = {record.run_id: (record, record.driver_lives()) for record in list_records()}
    for row in listed:
        if records.pop(row["run_id"], (None, None))[1] is False:
            row["supervised"] = False
    rows += listed
    # A living process is about to write the status of a run whose outcome it has recorded.
    rows += [_record_row(record, lives) for record, lives in records.values() if not (lives and record.outcome)]
    print_rows(sorted(rows, key=lambda row: row["created"], reverse=True), as_json=as_json, none="no runs")


async def on_each_backend(
    asked: Mapping[str, Mapping[str, Any]],
    tracking_uri: str | None,
    work: Callable[[Backend], Awaitable[Sequence[ListedRun]]],
    *,
    strict: bool = False,
) -> list[ListedRun]:
    """Call `work` with every backend that needs no login, and with those that were asked for.

    Args:
        asked: The names of backends that were asked for, with their ``backend_config``. An error of theirs is raised.
        tracking_uri: The tracking store of the runs; None for the default.
        work: Lists or removes runs.
        strict: True to raise the errors of all backends; False to print a warning in their place.
    """
    found: list[ListedRun] = []
    for name in dict.fromkeys((*await FILES.run(native), *asked)):
        try:
            kind = await FILES.run(partial(find, name))  # in a thread: it imports the backend
            if kind.needs_login and name not in asked:
                continue
            async with kind() as backend:
                if name in asked:
                    await FILES.run(partial(backend.select_service, asked[name], tracking_uri or ""))
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


async def _rows_by_id(run_ids: Sequence[str], tracking_uri: str | None) -> list[dict[str, Any]]:
    async with Fleet(tracking_uri=tracking_uri) as fleet:
        runs = [await track(context_of(fleet), run_id) for run_id in dict.fromkeys(run_ids)]
        found = [(await run._look(), run.info) for run in runs]
    return [
        {
            **_BLANK,
            "run_id": info.run_id,
            "backend": info.tags.get("mlflow.project.backend", ""),
            "state": info.status.value.lower(),
            "supervised": info.status.is_terminal or driver is not Driver.GONE,
            "created": datetime.fromtimestamp((info.start_time or 0) / 1000, UTC),
            "project": plain_line(info.tags.get("mlflow.source.name", "")),
            "last_line": plain_line(info.tags.get(REASON_TAG, "")),
        }
        for driver, info in found
    ]


def _record_row(record: RunRecord, lives: bool | None) -> dict[str, Any]:
    """Return the row of a run that no backend has listed: it is not asked, or has nothing of the run (any more)."""
    created = datetime.fromtimestamp(record.began, UTC)
    output = run_folder(record.run_id) / "output.log" if record.captured and lives is not None else None
    run = ListedRun(
        run_id=record.run_id,
        backend=record.backend,
        created=created,
        state="active" if lives is not False else "left",
        supervised=lives is not False,
        detail={"project": record.project},
        output=output,
    )
    return run_row(run)


def run_row(run: ListedRun) -> dict[str, Any]:
    """Return the row of a run that a backend has listed."""
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


def print_rows(rows: list[dict[str, Any]], *, as_json: bool, none: str) -> None:
    """Print rows, or `none` to standard error if there are no rows."""
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
        print_line(f"{row['run_id']}  {row['backend']:6}  {row['state']:8}  {created}  {what.rstrip()}{after}")


_NAMED = {"run_id", "backend", "state", "supervised", "created", "container"}  # have a column, or are for --json only
