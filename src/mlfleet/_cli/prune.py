"""``mlfleet prune``: remove what backends keep of runs."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from functools import partial

import anyio
import click

from mlfleet._cli.options import asked_option, debug_option, json_option, read_asked
from mlfleet._cli.ps import on_each_backend, print_rows, run_row
from mlfleet.backends.base import Backend, ListedRun

__all__ = ["prune"]


@click.command()
@click.argument("run_ids", metavar="[RUN_ID]...", nargs=-1)
@click.option("--running", is_flag=True, help="Also remove containers and jobs that still run, which ends them.")
@click.option("--dry-run", is_flag=True, help="Print what would be removed; remove nothing.")
@asked_option("prune")
@json_option("Print a JSON list of what was removed.")
@debug_option
def prune(
    *,
    run_ids: tuple[str, ...],
    running: bool,
    dry_run: bool,
    asked: tuple[str, ...],
    backend_config: str | None,
    tracking_uri: str | None,
    as_json: bool,
) -> None:
    """Remove what backends keep of runs that no process looks after, such as containers.

    With RUN_IDs, remove only what is kept of these runs.
    """

    def work(backend: Backend) -> Awaitable[Sequence[ListedRun]]:
        return backend.prune(run_ids, running=running, dry_run=dry_run)

    configs = read_asked(asked, backend_config)
    removed = anyio.run(partial(on_each_backend, configs, tracking_uri, work, strict=True))
    print_rows([run_row(run) for run in removed], as_json=as_json, none="nothing to remove")
