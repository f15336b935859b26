"""``mlfleet ps`` and ``mlfleet prune``: the containers of runs, also of those whose process died."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio
import click

from mlfleet.cli.options import debug_option, json_option
from mlfleet.cli.report import print_json
from mlfleet.errors import BackendNotFound

__all__ = ["prune", "ps"]

_json = json_option("Print a JSON list.")


@click.command()
@_json
@debug_option
def ps(*, as_json: bool) -> None:
    """List the Docker containers of runs, the newest first.

    One that nobody looks after was left by a process that died: mlfleet.attach(RUN_ID) picks it up.
    """
    inventory = _inventory()
    _print(anyio.run(inventory.list_containers), as_json=as_json, none="no containers of runs")


@click.command()
@click.argument("run_ids", metavar="[RUN_ID]...", nargs=-1)
@click.option("--running", is_flag=True, help="Also those that still run, which kills them.")
@_json
@debug_option
def prune(*, run_ids: tuple[str, ...], running: bool, as_json: bool) -> None:
    """Remove the Docker containers of runs that no process looks after; only of these runs, if any are named."""
    inventory = _inventory()
    removed = anyio.run(partial(inventory.prune_containers, run_ids, running=running))
    _print(removed, as_json=as_json, none="nothing to remove")


def _inventory() -> Any:
    try:
        from mlfleet.backends.docker import inventory
    except ImportError as error:
        raise BackendNotFound(f"{error}. To do: pip install 'mlfleet[docker]'", backend="docker") from error
    return inventory


def _print(entries: list[Any], *, as_json: bool, none: str) -> None:
    rows = [
        {
            "run_id": entry.run_id,
            "state": entry.state,
            "supervised": entry.supervised,
            "created": entry.created,
            "project": entry.project,
            "image": entry.image,
            "container": entry.name,
        }
        for entry in entries
    ]
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo(none, err=True)
    for row in rows:
        after = "" if row["supervised"] else "  (nobody looks after it)"
        created = row["created"].astimezone().strftime("%Y-%m-%d %H:%M")
        click.echo(f"{row['run_id']}  {row['state']:8}  {created}  {row['project']}  {row['image']}{after}")
