"""``mlfleet run``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from mlfleet._cli.dry_run import DryRun, show
from mlfleet._cli.options import (
    debug_option,
    json_option,
    project_options,
    quiet_option,
    read_pairs,
    read_project_options,
)
from mlfleet._cli.progress import Progress
from mlfleet._cli.report import exit_code, print_json, run_as_json, tell
from mlfleet._cli.running import RunCommand
from mlfleet._engine.request import RunRequest
from mlfleet._signals import run_until_interrupted

__all__ = ["run"]


@click.command()
@click.argument("uri")
@click.option(
    "-P",
    "--param-list",
    metavar="NAME=VALUE",
    multiple=True,
    help="A parameter. One that the entry point does not declare is appended to its command.",
)
@project_options
@click.option("--run-id", metavar="ID", help="An existing MLflow run to use rather than a new one.")
@click.option("--log-output", is_flag=True, help="Log the output as an artifact, too; it is printed as one stream.")
@click.option("--dry-run", is_flag=True, help="Show what would be run, where and how; make nothing.")
@json_option("Capture the output into a file; print one JSON object at the end.")
@quiet_option
@debug_option
def run(
    *, dry_run: bool, quiet: bool, as_json: bool, log_output: bool, tracking_uri: str | None, **options: Any
) -> int:
    """Run the project at URI: a folder, a Git repository or a zip; #sub/folder picks a folder inside.

    Exit codes: 0 it finished, 1 it failed, 2 there is a mistake in the call or the project, 130 Ctrl-C, 143 SIGTERM.
    """
    request = RunRequest.of(
        parameters=read_pairs("-P", options.pop("param_list")),
        output="capture" if as_json or log_output else "inherit",
        log_output=log_output,
        **read_project_options(options),
        **options,
    )
    if dry_run:
        return _dry_run(request, tracking_uri, as_json=as_json, quiet=quiet)
    return _run(request, tracking_uri, as_json=as_json, quiet=quiet)


def _run(request: RunRequest, tracking_uri: str | None, *, as_json: bool, quiet: bool) -> int:
    prints = request.output == "capture" and not as_json
    command = RunCommand(request=request, tracking_uri=tracking_uri, print_output=prints)
    with Progress(inherits=not as_json, quiet=quiet) as progress:
        received = run_until_interrupted(partial(command.execute, progress), progress.say)
    tell(command, received, quiet=quiet)
    if as_json:
        print_json(run_as_json(command, received))
    return exit_code(command.error, received)


def _dry_run(request: RunRequest, tracking_uri: str | None, *, as_json: bool, quiet: bool) -> int:
    dry = DryRun(request=request, tracking_uri=tracking_uri)
    with Progress(inherits=False, quiet=quiet) as progress:
        received = run_until_interrupted(partial(dry.execute, progress), progress.say)
    if dry.error is not None:
        raise dry.error
    if dry.found is not None:
        print_json(dry.found) if as_json else show(dry.found)
    return exit_code(None, received)
