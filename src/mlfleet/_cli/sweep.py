"""``mlfleet sweep``."""

from __future__ import annotations

import secrets
import time
from functools import partial
from typing import Any

import click

from mlfleet._cli.options import debug_option, json_option, project_options, quiet_option, read_project_options
from mlfleet._cli.sweep_best import Best
from mlfleet._cli.sweep_end import end_as_json, sweep_exit_code, tell_sweep
from mlfleet._cli.sweep_lines import SweepJson, SweepLines, json_line
from mlfleet._cli.sweep_screen import SweepScreen
from mlfleet._cli.sweep_space import read_space
from mlfleet._cli.sweeping import SweepCommand, SweepView
from mlfleet._cli.terminal import is_interactive
from mlfleet._signals import run_until_interrupted
from mlfleet._sweeps import Goal, Retry
from mlfleet.runs import FailureKind

__all__ = ["sweep"]


@click.command()
@click.argument("uri")
@click.option(
    "-P",
    "--param-list",
    metavar="NAME=VALUES",
    multiple=True,
    help="alpha=0.5: one value for all runs. alpha=0.1,0.2: each of these. l1=0:1:0.1: from 0 to 1 in steps of 0.1. "
    "With --sample also lr=loguniform(1e-5,1), uniform(a,b), randint(a,b), normal(mean,deviation), choice(a,b,c). "
    'note="a,b": one text.',
)
@click.option("--sample", "draws", type=click.IntRange(min=1), metavar="N", help="N random points, not the whole grid.")
@click.option("--seed", type=int, metavar="N", help="Of --sample: the same seed draws the same points.  [default: 0]")
@click.option("--points", metavar="FILE", help="Take the points from a .csv or .jsonl file.")
@click.option("--name", metavar="NAME", help="Of the sweep, by which it can be resumed.  [default: made of the time]")
@click.option("--resume", is_flag=True, help="Go on with the sweep of that name: what has finished is skipped.")
@click.option("--resume-changed", is_flag=True, help="Likewise, although the project's files have changed since.")
@click.option("--retry-failed/--no-retry-failed", default=True, help="With --resume: run again what had failed.  [yes]")
@click.option(
    "-j", "--jobs", type=click.IntRange(min=1), metavar="N", help="Runs at once.  [default: one for each CPU]"
)
@click.option("--retries", type=click.IntRange(min=0), default=0, metavar="N", help="Try failed points N times more.")
@click.option(
    "--retry-on",
    type=click.Choice([kind.value for kind in FailureKind]),
    multiple=True,
    help="Only these kinds of failure; may be given many times.",
)
@click.option(
    "--on-failure",
    type=click.Choice(["continue", "stop"]),
    default="continue",
    show_default=True,
    help="stop: the first failed point ends the sweep.",
)
@click.option("--max-failures", type=click.IntRange(min=1), metavar="N", help="So many failed points end the sweep.")
@click.option("--metric", metavar="NAME", help="Show the best runs by this metric.")
@click.option("--goal", type=click.Choice(["min", "max"]), default="min", show_default=True, help="Which are the best.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many of them to show.")
@project_options
@click.option("--log-output", is_flag=True, help="Log the output of each run as an artifact, too.")
@json_option("Print one JSON object a line for everything that happens.")
@quiet_option
@debug_option
def sweep(
    *,
    uri: str,
    param_list: tuple[str, ...],
    draws: int | None,
    seed: int | None,
    points: str | None,
    metric: str | None,
    goal: Goal,
    top: int,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Run the project at URI once for each point of a space, many at a time.

    The best runs go to standard output. Ctrl-C asks the runs to stop, a second one kills them.

    Exit codes: 0 all points finished, 1 some failed, 2 there is a mistake in the call or the project, 130 Ctrl-C.
    """
    fixed, space = read_space(param_list, draws=draws, seed=seed, points=points)
    command = SweepCommand(
        uri=uri,
        space=space,
        jobs=options.pop("jobs"),
        tracking_uri=options.pop("tracking_uri"),
        best=Best(metric, goal, top),
        options={"parameters": fixed, **_settings(options), **read_project_options(options), **options},
    )
    view = _view(command, as_json=as_json, quiet=quiet)
    received = run_until_interrupted(partial(command.execute, view), view.say)
    tell_sweep(command, received, quiet=quiet, table=not as_json)
    if as_json:
        click.echo(json_line(end_as_json(command, received)), nl=False)
    return sweep_exit_code(command, received)


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """What is of the sweep rather than of its runs."""
    name, resumes = options.pop("name"), options.pop("resume")
    changed, kinds = options.pop("resume_changed"), options.pop("retry_on")
    if (resumes or changed) and name is None:
        raise click.UsageError("--resume needs the sweep's --name")
    retries = options.pop("retries")
    if kinds and not retries:
        raise click.UsageError("--retry-on is of --retries N, which is not given")
    return {
        "name": name or _new_name(),
        "resume": "changed" if changed else resumes,
        "retry_failed": options.pop("retry_failed"),
        "on_failure": options.pop("on_failure"),
        "max_failures": options.pop("max_failures"),
        "retry": Retry(attempts=retries + 1, on=kinds or tuple(FailureKind)),
    }


def _new_name() -> str:
    """Every sweep gets a name: what was started by hand may be worth resuming, too."""
    return f"sweep-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _view(command: SweepCommand, *, as_json: bool, quiet: bool) -> SweepView:
    if as_json:
        return SweepJson(quiet=quiet)
    if is_interactive() and not quiet:
        return SweepScreen(command.best, fixed=command.options["parameters"])
    return SweepLines(command.best, quiet=quiet)
