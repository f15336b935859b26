"""``mlfleet ps`` and ``mlfleet prune``: runs that outlive their process, and what is left of them."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import anyio
import click

from mlfleet._cli.options import debug_option, json_option
from mlfleet._cli.output import complain, print_json, short
from mlfleet._sweeps.notes import SweepEntry, list_sweeps
from mlfleet._text.lines import last_lines
from mlfleet._text.plain import plain_line
from mlfleet.backends.local.inventory import LocalEntry, list_local
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
@_json
@debug_option
def ps(*, as_json: bool) -> None:
    """List what goes on without needing its process, the newest first: sweeps with a name, their runs, containers.

    What nobody looks after was left by a process that died: mlfleet sweep --resume or mlfleet.attach(RUN_ID) picks it
    up; mlfleet logs, wait and cancel work on all.
    """
    rows = [_sweep_row(entry) for entry in list_sweeps()]
    rows += [_local_row(entry) for entry in list_local()]
    try:
        rows += [_container_row(entry) for entry in anyio.run(_inventory().list_containers)]
    except BackendNotFound:
        _log.debug("containers are not listed", exc_info=True)
    except BackendError as error:
        complain(f"containers are not listed: {error}", word="Warning", color="yellow")
    _print(sorted(rows, key=lambda row: row["created"], reverse=True), as_json=as_json, none="no runs")


@click.command()
@click.argument("run_ids", metavar="[RUN_ID]...", nargs=-1)
@click.option("--running", is_flag=True, help="Also those that still run, which kills them.")
@_json
@debug_option
def prune(*, run_ids: tuple[str, ...], running: bool, as_json: bool) -> None:
    """Remove the Docker containers of runs that no process looks after; only of these runs, if any are named."""
    inventory = _inventory()
    removed = anyio.run(partial(inventory.prune_containers, run_ids, running=running))
    _print([_container_row(entry) for entry in removed], as_json=as_json, none="nothing to remove")


def _inventory() -> Any:
    try:
        from mlfleet.backends.docker import inventory
    except ImportError as error:
        raise BackendNotFound(f"{error}. To do: pip install 'mlfleet[docker]'", backend="docker") from error
    return inventory


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


def _local_row(entry: LocalEntry) -> dict[str, Any]:
    lines = reversed(last_lines(entry.output, 3))
    return {
        **_BLANK,
        "run_id": entry.run_id,
        "backend": "local",
        "state": "running",
        "supervised": entry.supervised,
        "created": entry.created,
        "pid": entry.pid,
        "last_line": next((clean for line in lines if (clean := plain_line(line))), ""),
    }


def _container_row(entry: Any) -> dict[str, Any]:
    return {
        **_BLANK,
        "run_id": entry.run_id,
        "backend": "docker",
        "state": entry.state,
        "supervised": entry.supervised,
        "created": entry.created,
        "project": entry.project,
        "image": entry.image,
        "container": entry.name,
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
        else:
            what = f"pid {row['pid']}  {short(row['last_line'])}" if row["pid"] else f"{row['project']}  {row['image']}"
        click.echo(f"{row['run_id']}  {row['backend']:6}  {row['state']:8}  {created}  {what.rstrip()}{after}")
