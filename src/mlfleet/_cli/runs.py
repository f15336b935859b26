"""``mlfleet logs``, ``mlfleet wait`` and ``mlfleet cancel``: runs of other processes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial

import anyio
import click

from mlfleet._cli.options import debug_option, duration, experiment_options, find_experiment, tracking_option
from mlfleet._cli.output import complain, exit_code, print_output, say
from mlfleet._control import cancel_run, read_logs, wait_for
from mlfleet._reporting import find_sweep
from mlfleet.errors import MlfleetError
from mlfleet.fleet import Fleet
from mlfleet.runs import RunStatus
from mlfleet.tracking import RunInfo

__all__ = ["cancel", "logs", "wait"]


@click.command()
@click.argument("run_id")
@click.option("-f", "--follow", is_flag=True, help="Continue until the run has ended.")
@tracking_option
@debug_option
def logs(*, run_id: str, follow: bool, tracking_uri: str | None) -> None:
    """Print the output of a run, whichever process started it. Ctrl-C leaves the run alone."""

    async def show() -> None:
        async with (
            Fleet(tracking_uri=tracking_uri) as fleet,
            aclosing(read_logs(fleet, run_id, follow=follow)) as lines,
        ):
            async for line in lines:
                await print_output(f"{line}\n".encode(errors="replace"))

    try:
        anyio.run(show)
    except BrokenPipeError:
        return


@click.command()
@click.argument("run_ids", metavar="RUN_ID...", nargs=-1, required=True)
@tracking_option
@debug_option
def wait(*, run_ids: tuple[str, ...], tracking_uri: str | None) -> int:
    """Wait until runs have ended, whichever process started them. Ctrl-C leaves them alone.

    Exit codes: 0 all FINISHED, 1 some FAILED or KILLED.
    """
    say("waiting; Ctrl-C leaves the runs alone")
    return anyio.run(_for_each, run_ids, tracking_uri, wait_for, (RunStatus.FINISHED,))


@click.command()
@click.argument("run_ids", metavar="[RUN_ID]...", nargs=-1)
@click.option("--sweep", metavar="NAME", help="A sweep to cancel with all its runs: its name or MLflow run id.")
@click.option(
    "--cancel-grace",
    "grace",
    type=duration,
    metavar="TIME",
    help="Time between SIGTERM and SIGKILL, as in 30s or 2m.  [default: the grace that the run was submitted with]",
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

    They become KILLED, also for the process that started them. Runs that have ended keep their status. A local run of
    mlfleet run, or of a sweep without a name, can be ended only by ending its process.
    """
    if not run_ids and sweep is None:
        raise click.UsageError("give the ids of runs, or --sweep NAME")

    async def all_of_them() -> int:
        chosen = list(run_ids)
        if sweep is not None:
            async with Fleet(tracking_uri=tracking_uri) as fleet:
                where = await find_experiment(fleet.tracking, experiment_name, experiment_id)
                chosen.append((await find_sweep(fleet.tracking, sweep, where)).run_id)
        return await _for_each(chosen, tracking_uri, partial(cancel_run, grace=grace), tuple(RunStatus))

    return anyio.run(all_of_them)


async def _for_each(
    run_ids: Sequence[str],
    tracking_uri: str | None,
    work: Callable[[Fleet, str], Awaitable[RunInfo]],
    good: Sequence[RunStatus],
) -> int:
    """Call `work` for all runs at the same time, print a line for each, and return the highest exit code."""
    codes = [0]

    async def one(fleet: Fleet, run_id: str) -> None:
        try:
            info = await work(fleet, run_id)
        except* MlfleetError as group:
            for error in group.exceptions:
                complain(str(error))
                codes.append(exit_code(error) if isinstance(error, MlfleetError) else 1)
        else:
            click.echo(f"{run_id} {info.status}")
            codes.append(0 if info.status in good else 1)

    async with Fleet(tracking_uri=tracking_uri) as fleet, anyio.create_task_group() as group:
        for run_id in dict.fromkeys(run_ids):
            group.start_soon(one, fleet, run_id)
    return max(codes)
