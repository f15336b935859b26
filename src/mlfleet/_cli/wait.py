"""``mlfleet wait``: wait for runs that other processes started."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio
import click

from mlfleet._cli.options import debug_option, tracking_option
from mlfleet._cli.output import complain, exit_code, print_line
from mlfleet._engine.run import FleetRun
from mlfleet._engine.tracked import TrackedRun
from mlfleet._progress import say
from mlfleet._text.plain import plain_line
from mlfleet.errors import MlfleetError
from mlfleet.fleet import Fleet
from mlfleet.runs import REASON_TAG, RunStatus

__all__ = ["for_each_run", "wait"]


@click.command()
@click.argument("run_ids", metavar="RUN_ID...", nargs=-1, required=True)
@tracking_option
@debug_option
def wait(*, run_ids: tuple[str, ...], tracking_uri: str | None) -> int:
    """Wait until runs have ended, whichever process started them. Ctrl-C leaves them alone.

    Exit codes: 0 all FINISHED, 1 some FAILED or KILLED.
    """
    say("waiting; Ctrl-C leaves the runs alone")
    return anyio.run(for_each_run, run_ids, tracking_uri, lambda run: run.wait(), (RunStatus.FINISHED,))


async def for_each_run(
    run_ids: Sequence[str],
    tracking_uri: str | None,
    work: Callable[[FleetRun | TrackedRun], Awaitable[object]],
    good: Sequence[RunStatus],
) -> int:
    """Call `work` for all runs at the same time, and print id and status of each, and why it did not finish.

    Args:
        run_ids: The ids of the MLflow runs.
        tracking_uri: The tracking store; None for the default.
        work: The operation on one run.
        good: The statuses after which the exit code is 0.

    Returns:
        The highest exit code of all runs.
    """
    codes = [0]

    async def one(fleet: Fleet, run_id: str) -> None:
        try:
            run = await fleet.get(run_id)
            await work(run)
        except* MlfleetError as group:
            for error in group.exceptions:
                complain(str(error))
                codes.append(exit_code(error))
        else:
            info = run.info
            reason = info.tags.get(REASON_TAG)
            print_line(f"{run_id} {info.status}" + (f" ({plain_line(reason)})" if reason else ""))
            codes.append(0 if info.status in good else 1)

    async with Fleet(tracking_uri=tracking_uri) as fleet, anyio.create_task_group() as group:
        for run_id in dict.fromkeys(run_ids):
            group.start_soon(one, fleet, run_id)
    return max(codes)
