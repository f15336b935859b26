"""``mlfleet logs``: the output of a run that another process started."""

from __future__ import annotations

from contextlib import aclosing

import anyio
import click

from mlfleet._cli.options import debug_option, tracking_option
from mlfleet._cli.output import print_output
from mlfleet._control import read_output
from mlfleet.fleet import Fleet

__all__ = ["logs"]


@click.command()
@click.argument("run_id")
@click.option("-f", "--follow", is_flag=True, help="Continue until the run has ended.")
@tracking_option
@debug_option
def logs(*, run_id: str, follow: bool, tracking_uri: str | None) -> None:
    """Print the output of a run from its beginning, whichever process started it. Ctrl-C leaves the run alone."""

    async def show() -> None:
        async with (
            Fleet(tracking_uri=tracking_uri) as fleet,
            aclosing(read_output(fleet, run_id, follow=follow)) as chunks,
        ):
            async for data in chunks:
                await print_output(data)

    try:
        anyio.run(show)
    except BrokenPipeError:
        return
