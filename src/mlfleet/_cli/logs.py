"""``mlfleet logs``: the output of a run that another process started."""

from __future__ import annotations

from contextlib import aclosing

import anyio
import click

from mlfleet._cli.options import debug_option, tracking_option
from mlfleet._cli.output import print_output
from mlfleet._engine.tracked import tracked_output
from mlfleet._sweeps import track
from mlfleet.fleet import Fleet, context_of

__all__ = ["logs"]


@click.command()
@click.argument("run_id")
@click.option("-f", "--follow", is_flag=True, help="Continue until the run has ended.")
@click.option("-n", "--tail", type=int, metavar="N", help="Begin with the last N lines.  [default: all lines]")
@tracking_option
@debug_option
def logs(*, run_id: str, follow: bool, tail: int | None, tracking_uri: str | None) -> None:
    """Print the output of a run, whichever process started it. Ctrl-C leaves the run alone."""

    async def show() -> None:
        async with (
            Fleet(tracking_uri=tracking_uri) as fleet,
            aclosing(tracked_output(await track(context_of(fleet), run_id), follow=follow, tail=tail)) as chunks,
        ):
            async for data in chunks:
                await print_output(data)

    try:
        anyio.run(show)
    except BrokenPipeError:
        return
