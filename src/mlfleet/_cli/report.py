"""``mlfleet report``."""

from __future__ import annotations

import anyio
import click

from mlfleet._cli.options import debug_option, experiment_options, find_experiment, goal_option, tracking_option
from mlfleet._engine.options import Goal
from mlfleet._progress import say
from mlfleet._reporting import SweepReport, load_sweep, render
from mlfleet._sweeps import Report
from mlfleet.tracking import open_tracking

__all__ = ["report"]


@click.command()
@click.argument("sweep")
@click.option("-o", "--output", metavar="FILE", default="report.html", show_default=True, help="The file to write.")
@click.option(
    "--metric",
    metavar="NAME",
    help="The metric that the report shows first; its reader can choose another one.  [default: the first by name]",
)
@goal_option
@experiment_options
@tracking_option
@debug_option
def report(
    *,
    sweep: str,
    output: str,
    metric: str | None,
    goal: Goal,
    tracking_uri: str | None,
    experiment_name: str | None,
    experiment_id: str | None,
) -> int:
    """Write an HTML report about SWEEP, which is a sweep's name or the id of its MLflow run.

    The report is one file that needs no network. It shows when the runs waited and ran, the metric against each
    parameter, parallel coordinates, and a table with links to MLflow.
    """

    async def load() -> SweepReport:
        async with open_tracking(tracking_uri) as tracking:
            where = await find_experiment(tracking, experiment_name, experiment_id)
            return await load_sweep(tracking, sweep, where)

    Report(render(anyio.run(load), metric=metric, goal=goal)).save(output)
    say(f"the report is in {output}")
    return 0
