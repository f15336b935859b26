"""The work of ``mlfleet run``: one run in a Fleet of its own."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial

import anyio
import anyio.to_thread

from mlfleet._cli.progress import Progress
from mlfleet._engine.request import RunRequest
from mlfleet._engine.run import FleetRun
from mlfleet._signals import Interrupts
from mlfleet.errors import MlfleetError
from mlfleet.fleet import Fleet
from mlfleet.runs import Outcome, RunEvent

__all__ = ["RunCommand"]


@dataclass(slots=True, kw_only=True)
class RunCommand:
    """One call of ``mlfleet run``, and how it went.

    Attributes:
        request: what is to be run.
        tracking_uri: to use; None is the default.
        print_output: print the captured output as it comes.
        tracking: what was used, without credentials; None if it could not be opened.
        run: the handle of the run; None if there is no MLflow run.
        outcome: of the run.
        error: why it did not end well; None also if a signal ended it before there was a run.
    """

    request: RunRequest
    tracking_uri: str | None = None
    print_output: bool = False
    tracking: str | None = None
    run: FleetRun | None = None
    outcome: Outcome | None = None
    error: MlfleetError | None = None

    async def execute(self, progress: Progress, interrupts: Interrupts) -> None:
        """Do it and keep how it went. When this returns, nothing of the run goes on."""

        def follow(event: RunEvent) -> None:
            # Not what `start` returns: an interrupt may come before it does.
            if event.run_id is not None and self.run is None:
                self.run = next(iter(fleet.runs), None)
            progress(event)

        progress.begin()
        with interrupts.scope:
            try:
                async with Fleet(tracking_uri=self.tracking_uri, on_event=follow) as fleet:
                    interrupts.fleet = fleet
                    self.tracking = fleet.tracking.uri
                    run = await fleet.start(self.request)
                    if self.print_output:
                        await _print_output(run)
                    await run.check()
            except MlfleetError as error:
                self.error = error
        if self.run is not None:
            self.outcome = await self.run.outcome()


async def _print_output(run: FleetRun) -> None:
    async for line in run.logs():
        data = f"{line}\n".encode(errors="replace")
        try:
            # In a thread, or whoever does not read our pipe would keep Ctrl-C from us.
            await anyio.to_thread.run_sync(partial(_write, data), abandon_on_cancel=True)
        except OSError:
            return  # nobody reads it any more, which is not the run's concern: its output is in its file


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]
