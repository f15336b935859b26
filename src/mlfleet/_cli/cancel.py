"""``mlfleet cancel``: end runs that other processes started."""

from __future__ import annotations

import anyio
import click

from mlfleet._cli.options import debug_option, duration, experiment_options, find_experiment, tracking_option
from mlfleet._cli.wait import for_each_run
from mlfleet._reporting import find_sweep
from mlfleet.fleet import Fleet
from mlfleet.runs import RunStatus

__all__ = ["cancel"]


@click.command()
@click.argument("run_ids", metavar="[RUN_ID]...", nargs=-1)
@click.option(
    "--sweep", metavar="NAME", help="The name of a sweep to cancel with all its runs, or the id of its MLflow run."
)
@click.option(
    "--cancel-grace",
    "grace",
    type=duration,
    metavar="TIME",
    help="The time between the request to stop and the kill, as in 30s or 2m.  [default: that of the run]",
)
@experiment_options
@tracking_option
@debug_option
def cancel(
    *,
    run_ids: tuple[str, ...],
    sweep: str | None,
    grace: float | None,
    tracking_uri: str | None,
    experiment_name: str | None,
    experiment_id: str | None,
) -> int:
    """End runs, whichever process started them, and return when nothing of them runs any more.

    They become KILLED, also for the process that started them. Runs that have ended keep their status.

    Exit codes: 0 nothing of the runs runs any more, 1 the end of some was not confirmed, so that they may still run, 2
    there is a mistake in the call.
    """
    if not run_ids and sweep is None:
        raise click.UsageError("give the ids of runs, or --sweep NAME")

    async def all_of_them() -> int:
        chosen = list(run_ids)
        if sweep is not None:
            async with Fleet(tracking_uri=tracking_uri) as fleet:
                where = await find_experiment(fleet.tracking, experiment_name, experiment_id)
                chosen.append((await find_sweep(fleet.tracking, sweep, where)).run_id)
        return await for_each_run(chosen, tracking_uri, lambda run: run.cancel(grace=grace), tuple(RunStatus))

    return anyio.run(all_of_them)
