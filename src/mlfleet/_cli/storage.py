"""``mlfleet cache`` and ``mlfleet envs``: list and remove what is kept on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from mlfleet._cli.options import debug_option, duration, json_option
from mlfleet._cli.output import print_json, print_table
from mlfleet._environments.store import list_environments
from mlfleet._environments.store import prune as prune_environments
from mlfleet._project.cache import list_entries
from mlfleet._project.cache import prune as prune_entries
from mlfleet._project.working_copies import list_copies, prune_copies
from mlfleet._store.content_store import StoredEntry
from mlfleet._store.outputs import list_outputs, prune_outputs

__all__ = ["cache", "envs"]

_older_than = click.option(
    "--older-than",
    "age",
    type=lambda text: timedelta(seconds=duration(text)),
    metavar="TIME",
    help="Keep entries that a run has used within this time, as in 30d or 12h. Without it: keep only those in use.",
)
_outputs = click.option(
    "--outputs", is_flag=True, help="List or remove the captured output of runs instead of the fetched projects."
)


@click.group(no_args_is_help=False)
def cache() -> None:
    """List or remove fetched projects, or the captured output of runs."""


@cache.command("list")
@_outputs
@json_option()
@debug_option
def list_cache(*, outputs: bool, as_json: bool) -> None:
    """List fetched projects and working copies, the last used first."""
    entries = list_outputs() if outputs else [*list_entries(), *list_copies()]
    _print([_cached(entry) for entry in entries], as_json=as_json)


@cache.command("prune")
@_older_than
@_outputs
@json_option()
@debug_option
def prune_cache(*, age: timedelta | None, outputs: bool, as_json: bool) -> None:
    """Remove fetched projects and working copies that are not in use."""
    # Working copies first: while they exist, the projects are in use.
    removed = prune_outputs(age) if outputs else [*prune_copies(age), *prune_entries(age)]
    _removed([_cached(entry) for entry in removed], as_json=as_json)


@click.group(no_args_is_help=False)
def envs() -> None:
    """List or remove the environments that were built for projects."""


@envs.command("list")
@json_option()
@debug_option
def list_envs(*, as_json: bool) -> None:
    """List environments, the last used first."""
    _print([_built(environment) for environment in list_environments()], as_json=as_json)


@envs.command("prune")
@_older_than
@json_option()
@debug_option
def prune_envs(*, age: timedelta | None, as_json: bool) -> None:
    """Remove environments that are not in use, and the remains of failed builds."""
    _removed([_built(environment) for environment in prune_environments(age)], as_json=as_json)


def _cached(entry: StoredEntry) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "uri": entry.uri,
        "version": entry.version,
        "size": entry.size,
        "last_used": entry.last_used,
        "in_use": entry.in_use,
        "path": entry.path,
    }


def _built(environment: StoredEntry) -> dict[str, Any]:
    return {
        "name": environment.path.name,
        "python": environment.version,
        "source": environment.uri or None,
        "complete": environment.complete,
        "size": environment.size,
        "last_used": environment.last_used,
        "in_use": environment.in_use,
        "path": environment.path,
    }


def _print(entries: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(list(entries))
        return
    if not entries:
        click.echo("nothing")
        return
    names = [name for name in entries[0] if name != "path"]
    rows = [[name.replace("_", " ") for name in names]]
    rows += [[_text(name, entry[name]) for name in names] for entry in entries]
    print_table(rows)


def _removed(entries: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(list(entries))
        return
    for entry in entries:
        click.echo(f"removed {entry['path']}")
    click.echo(f"{len(entries)} removed, {_bytes(sum(entry['size'] for entry in entries))}")


def _text(name: str, value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case datetime():
            return _ago(datetime.now(UTC) - value)
        case int() if name == "size":
            return _bytes(value)
        case _:
            # The first characters of a commit or of a content's hash are enough to tell it from others.
            return str(value)[:12] if name == "version" else str(value)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _ago(age: timedelta) -> str:
    minutes = max(int(age.total_seconds() // 60), 0)
    for count, unit in ((minutes // 1440, "d"), (minutes // 60, "h"), (minutes, "min")):
        if count:
            return f"{count} {unit} ago"
    return "now"
