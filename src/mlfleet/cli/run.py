"""``mlfleet run``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from mlfleet.cli.dry_run import DryRun, show
from mlfleet.cli.interrupts import run_until_interrupted
from mlfleet.cli.options import complete_backend, debug_option, duration, json_option, read_config, read_pairs
from mlfleet.cli.progress import Progress
from mlfleet.cli.report import exit_code, print_json, run_as_json, tell
from mlfleet.cli.running import RunCommand
from mlfleet.environments.choose import NAMES
from mlfleet.request import RunRequest
from mlfleet.runs import DEFAULT_CANCEL_GRACE, Timeouts

__all__ = ["run"]


@click.command()
@click.argument("uri")
@click.option(
    "-e",
    "--entry-point",
    metavar="NAME",
    default="main",
    show_default=True,
    help="An entry point of MLproject, or a .py, .sh or .R script of the project.",
)
@click.option("-v", "--version", metavar="VERSION", help="Commit, branch or tag of a Git project.")
@click.option(
    "-P",
    "--param-list",
    metavar="NAME=VALUE",
    multiple=True,
    help="A parameter. One that the entry point does not declare is appended to its command.",
)
@click.option(
    "-A",
    "--docker-args",
    metavar="NAME[=VALUE]",
    multiple=True,
    help="An option of `docker run`, as in -A gpus=all or -A t.",
)
@click.option(
    "--experiment-name",
    metavar="NAME",
    help="The experiment, which is made if there is none.  [env var: MLFLOW_EXPERIMENT_NAME]",
)
@click.option("--experiment-id", metavar="ID", help="The experiment by its id.  [env var: MLFLOW_EXPERIMENT_ID]")
@click.option(
    "-b",
    "--backend",
    metavar="NAME",
    default="local",
    show_default=True,
    shell_complete=complete_backend,
    help="Where to run it: local, docker, kubernetes, databricks, or a plugin's name.",
)
@click.option("-c", "--backend-config", metavar="FILE|JSON", help="A path that ends in .json, or JSON.")
@click.option("--env-manager", type=click.Choice(NAMES), help="Default: by the project's files.")
@click.option(
    "--storage-dir",
    metavar="FOLDER",
    envvar="MLFLOW_TMP_DIR",
    show_envvar=True,
    help="Where parameters of type path are downloaded to.",
)
@click.option("--run-id", metavar="ID", help="An existing MLflow run to use rather than a new one.")
@click.option("--run-name", metavar="NAME", help="The name of the MLflow run.")
@click.option("--build-image", is_flag=True, help="Docker: build an image with the project's files in it.")
@click.option(
    "--tracking-uri",
    metavar="URI",
    help="A server (http://…), sqlite:///FILE, or databricks.  [env var: MLFLOW_TRACKING_URI]",
)
@click.option("--tag", "tags", metavar="NAME=VALUE", multiple=True, help="A tag of the MLflow run.")
@click.option(
    "--timeout-setup",
    type=duration,
    metavar="TIME",
    help="How long it may take to the start of the command: 90s, 5m, 1h30m; a number is seconds.",
)
@click.option("--timeout-run", type=duration, metavar="TIME", help="How long the command may take.")
@click.option(
    "--cancel-grace",
    type=duration,
    metavar="TIME",
    default=DEFAULT_CANCEL_GRACE,
    help=f"How long it has to stop when asked to, before it is killed.  [default: {DEFAULT_CANCEL_GRACE:g}s]",
)
@click.option("--log-output", is_flag=True, help="Log the output as an artifact, too; it is printed as one stream.")
@click.option("--dry-run", is_flag=True, help="Show what would be run, where and how; make nothing.")
@json_option("Capture the output into a file; print one JSON object at the end.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors.")
@debug_option
def run(
    *, dry_run: bool, quiet: bool, as_json: bool, log_output: bool, tracking_uri: str | None, **options: Any
) -> int:
    """Run the project at URI: a folder, a Git repository or a zip; #sub/folder picks a folder inside.

    Exit codes: 0 it finished, 1 it failed, 2 there is a mistake in the call or the project, 130 Ctrl-C, 143 SIGTERM.
    """
    request = RunRequest.of(
        parameters=read_pairs("-P", options.pop("param_list")),
        docker_args=read_pairs("-A", options.pop("docker_args"), flags=True),
        backend_config=read_config(options.pop("backend_config")),
        tags=read_pairs("--tag", options.pop("tags")),
        timeouts=Timeouts(
            setup=options.pop("timeout_setup"), run=options.pop("timeout_run"), cancel_grace=options.pop("cancel_grace")
        ),
        output="capture" if as_json or log_output else "inherit",
        log_output=log_output,
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
