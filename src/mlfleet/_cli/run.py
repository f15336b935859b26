"""``mlfleet run``: one run, in a Fleet of its own."""

from __future__ import annotations

import signal
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import click

from mlfleet._cli.dry_run import dry_run
from mlfleet._cli.options import debug_option, dry_run_option, json_option, quiet_option, read_run_options, run_options
from mlfleet._cli.output import (
    complain,
    complain_of,
    error_as_json,
    exit_code,
    print_json,
    print_line,
    print_output,
    where_to_look,
)
from mlfleet._cli.progress import Progress
from mlfleet._engine.request import RunRequest
from mlfleet._engine.run import FleetRun, run_output
from mlfleet._progress import say
from mlfleet._signals import Interrupts, run_until_interrupted
from mlfleet.errors import MlfleetError
from mlfleet.fleet import Fleet, context_of
from mlfleet.runs import Outcome, RunEvent, RunStatus
from mlfleet.tracking.links import run_url

__all__ = ["run"]


@click.command()
@click.argument("uri")
@run_options("run")
@dry_run_option
@json_option("Capture the output in a file, and print one JSON object at the end.")
@quiet_option
@debug_option
def run(
    *, only_show: bool, quiet: bool, as_json: bool, log_output: bool, tracking_uri: str | None, **options: Any
) -> int:
    """Run the project at URI and wait for its end.

    URI is a folder, a Git repository or a zip file; #sub/folder picks a folder inside.

    The first Ctrl-C asks the run to stop, a second one kills it. With --log-output, stdout and stderr are printed as
    one stream. With --detach, the id of the run is printed, and the run goes on.

    Exit codes: 0 the run finished, 1 it failed, 2 there is a mistake in the call or in the project, 130 Ctrl-C, 143
    SIGTERM.
    """
    if options["detach"] and only_show:
        raise click.UsageError("--detach and --dry-run contradict each other: give one of them")
    request = RunRequest.of(
        output="capture" if as_json or log_output or options["detach"] else "inherit",
        log_output=log_output,
        **read_run_options(options),
        **options,
    )
    if only_show:
        return dry_run(request, tracking_uri, as_json=as_json, quiet=quiet)
    prints = request.output == "capture" and not as_json and not request.detach
    command = RunCommand(request=request, tracking_uri=tracking_uri, print_output=prints)
    with closing(Progress(inherits=not as_json, quiet=quiet)) as progress:
        received = run_until_interrupted(partial(command.execute, progress), progress.say)
    _say_end(command, received, quiet=quiet)
    if command.goes_on and not as_json:
        print_line(command.run.run_id if command.run else "")
    if as_json:
        print_json(_as_json(command, received))
    return exit_code(command.error, received)


@dataclass(slots=True, kw_only=True)
class RunCommand:
    """One call of ``mlfleet run`` and its result.

    Attributes:
        request: The run to make.
        tracking_uri: The tracking store; None for the default.
        print_output: Print the captured output as it arrives.
        tracking: The tracking URI that was used, without credentials; None if it could not be opened.
        run: The handle of the run; None if there is no MLflow run.
        outcome: The end of the run; None if there is no MLflow run.
        error: The error that ended the command; None also if a signal ended it before there was a run.
    """

    request: RunRequest
    tracking_uri: str | None = None
    print_output: bool = False
    tracking: str | None = None
    run: FleetRun | None = None
    outcome: Outcome | None = None
    error: MlfleetError | None = None

    @property
    def goes_on(self) -> bool:
        """True if the run goes on, in the care of another process."""
        return self.run is not None and self.outcome is None

    async def execute(self, progress: Progress, interrupts: Interrupts) -> None:
        """Run the project and keep the result. When this returns, nothing of the run is left, unless it is detached."""

        def follow(event: RunEvent) -> None:
            # Not the return value of `start`: an interrupt may arrive before it returns.
            if event.run_id is not None and self.run is None:
                self.run = next(iter(fleet.runs), None)
            progress(event)

        progress.begin()
        with interrupts.scope:
            try:
                async with Fleet(tracking_uri=self.tracking_uri, on_event=follow) as fleet:
                    interrupts.fleet = fleet
                    self.tracking = fleet.tracking.uri
                    run = await context_of(fleet).start(self.request)
                    if self.request.detach:
                        self.run = run
                        return
                    if self.print_output:
                        await _print_output(run)
                    await run.check()
            except MlfleetError as error:
                self.error = error
        if self.run is not None:
            self.outcome = await self.run.outcome()


async def _print_output(run: FleetRun) -> None:
    async for data in run_output(run):
        try:
            await print_output(data)
        except OSError:
            return  # the reader is gone; the run goes on, and its output is in its file


def _say_end(command: RunCommand, received: signal.Signals | None, *, quiet: bool) -> None:
    """Write how the run ended and where to look at it to standard error."""
    status = command.outcome.status if command.outcome else None
    if command.error is not None and received is None:
        complain_of(command.error)
    if received is not None and command.run is not None and command.outcome and status is RunStatus.FAILED:
        complain(f"{command.run.info.name!r} (run {command.run.run_id}) is {status}: {command.outcome.reason}")
    if quiet:
        return
    if received is not None and command.run is None:
        say("stopped before there was a run")
    if command.run is None:
        return
    info = command.run.info
    if command.goes_on:
        say(f"{info.name!r} (run {info.run_id}) goes on; mlfleet logs -f, wait and cancel take its id")
    elif status is RunStatus.FINISHED or (received is not None and status is not RunStatus.FAILED):
        say(f"{info.name!r} (run {info.run_id}) is {status}")
    if command.tracking is not None:
        say(f"to look at it: {where_to_look(command.tracking, info)}")


def _as_json(command: RunCommand, received: signal.Signals | None) -> dict[str, Any]:
    """Return everything that is known about the run, for ``--json``."""
    run, outcome = command.run, command.outcome
    info = run.info if run else None
    output = run.output_path if run else None
    return {
        "run_id": info.run_id if info else None,
        "run_name": info.name if info else None,
        "experiment_id": info.experiment_id if info else None,
        "project": run.project_name if run else None,
        "backend": run.backend if run else command.request.backend,
        "status": outcome.status.value if outcome else RunStatus.RUNNING.value if command.goes_on else None,
        "exit_code": outcome.exit_code if outcome else None,
        "reason": outcome.reason if outcome else None,
        "output": str(output) if output else None,
        "tracking_uri": command.tracking,
        "url": run_url(command.tracking, info.experiment_id, info.run_id) if command.tracking and info else None,
        "tracking_error": str(outcome.tracking_error) if outcome and outcome.tracking_error else None,
        "interrupted": received.name if received else None,
        "error": error_as_json(command.error)["error"] if command.error else None,
    }
