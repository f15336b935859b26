"""``mlfleet sweep``: one sweep, in a Fleet of its own."""

from __future__ import annotations

import math
import secrets
import shlex
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from mlfleet._cli.dry_run import dry_run
from mlfleet._cli.options import (
    debug_option,
    dry_run_option,
    goal_option,
    jobs_option,
    json_option,
    quiet_option,
    read_run_options,
    run_options,
)
from mlfleet._cli.output import (
    complain,
    complain_of,
    error_as_json,
    exit_code,
    print_json,
    print_table,
    where_to_look,
)
from mlfleet._cli.sweep_json import SweepJson, result_as_json
from mlfleet._cli.sweep_space import read_space
from mlfleet._engine.options import Goal
from mlfleet._engine.request import RunRequest
from mlfleet._progress import BestRuns, LinePainter, SweepScreen, TerminalPainter, is_interactive, say, shown
from mlfleet._signals import Interrupts, run_until_interrupted
from mlfleet._sweeps import PointResult, Retry, Sweep, SweepCounts
from mlfleet._text.plain import duration_text, short
from mlfleet.errors import MlfleetError, UsageError
from mlfleet.fleet import Fleet
from mlfleet.runs import FailureKind, RunStatus
from mlfleet.spaces import Points, Space
from mlfleet.tracking.links import run_url

__all__ = ["sweep"]


@click.command()
@click.argument("uri")
@click.option(
    "-P",
    "--param-list",
    metavar="NAME=VALUES",
    multiple=True,
    help="A parameter; may be given several times. alpha=0.5: one value for all runs. alpha=0.1,0.2: each of these. "
    "l1=0:1:0.1: from 0 to 1 in steps of 0.1. With --sample also lr=loguniform(1e-5,1), uniform(a,b), randint(a,b), "
    'normal(mean,deviation), choice(a,b,c). note="a,b": one text.',
)
@click.option(
    "--sample",
    "draws",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run N random points instead of the whole grid.",
)
@click.option("--seed", type=int, metavar="N", help="With --sample: the same seed draws the same points.  [default: 0]")
@click.option("--points", metavar="FILE", help="Run the points in the rows of a .csv or .jsonl file.")
@click.option("--name", metavar="NAME", help="The name by which the sweep is resumed.  [default: sweep- and the time]")
@click.option("--resume", is_flag=True, help="Continue the sweep of that --name; skip the points that have finished.")
@click.option("--resume-changed", is_flag=True, help="Like --resume, even if the project's files have changed since.")
@click.option(
    "--retry-failed/--no-retry-failed",
    default=True,
    help="With --resume: run the points again that had failed.  [default: retry-failed]",
)
@jobs_option
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    show_default=True,
    help="Try each failed point up to N times more.",
)
@click.option(
    "--retry-on",
    type=click.Choice([kind.value for kind in FailureKind]),
    multiple=True,
    help="With --retries: retry only after this kind of failure; may be given several times.  [default: every kind]",
)
@click.option(
    "--on-failure",
    type=click.Choice(["continue", "stop"]),
    default="continue",
    show_default=True,
    help="What the first failed point does to the sweep; stop ends it and cancels its runs.",
)
@click.option(
    "--max-failures",
    type=click.IntRange(min=1),
    metavar="N",
    help="End the sweep at N failed points.  [default: no limit]",
)
@click.option("--metric", metavar="NAME", help="Show the best runs by this metric at the end.")
@goal_option
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="N",
    default=5,
    show_default=True,
    help="With --metric: the number of best runs to show.",
)
@run_options("sweep")
@dry_run_option
@json_option("Print one JSON object per line for every event, result and the end.")
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
    only_show: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Run the project at URI once for each point of a space, several at a time.

    URI is a folder, a Git repository or a zip file; #sub/folder picks a folder inside. The best runs are printed to
    standard output.

    The first Ctrl-C asks the runs to stop, a second one kills them.

    Exit codes: 0 all points finished, 1 some failed, 2 there is a mistake in the call or in the project, 130 Ctrl-C.
    """
    fixed, space = read_space(param_list, draws=draws, seed=seed, points=points)
    settings = _settings(options)
    jobs, tracking_uri = options.pop("jobs"), options.pop("tracking_uri")
    of_runs = {**read_run_options(options), **options}
    if only_show:
        if settings["resume"]:
            raise click.UsageError("--dry-run shows all points, and --resume runs some of them: give one of them")
        first = _first_request(uri, fixed, space, settings["name"], of_runs)
        return dry_run(first, tracking_uri, space=space, as_json=as_json, quiet=quiet)
    best = BestRuns(metric, goal, top)
    command = SweepCommand(
        uri=uri,
        space=space,
        options={"parameters": fixed, **settings, **of_runs},
        best=best,
        view=_view(best, fixed, as_json=as_json, quiet=quiet),
        jobs=jobs,
        tracking_uri=tracking_uri,
    )
    received = run_until_interrupted(command.execute, command.view.say)
    _say_end(command, received, quiet=quiet, table=not as_json)
    if as_json:
        print_json(_end_as_json(command, received), indent=None)
    if received is not None or command.error is not None:
        return exit_code(command.error, received)
    return 0 if command.status is RunStatus.FINISHED else 1


def _first_request(
    uri: str, fixed: Mapping[str, Any], space: Space, name: str, of_runs: Mapping[str, Any]
) -> RunRequest:
    """Return the request for the run of the first point."""
    point = next(iter(space), None)
    if point is None:
        raise UsageError("the space of the sweep has no points: there is nothing to run")
    return RunRequest.of(uri, **{**of_runs, "parameters": {**fixed, **point}, "run_name": f"{name}-0"})


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of the sweep out of `options`, and leave those of its runs."""
    name, resumes = options.pop("name"), options.pop("resume")
    changed, kinds = options.pop("resume_changed"), options.pop("retry_on")
    if (resumes or changed) and name is None:
        raise click.UsageError("--resume needs the sweep's --name")
    retries = options.pop("retries")
    if kinds and not retries:
        raise click.UsageError("--retry-on needs --retries N")
    return {
        "name": name or _new_name(),
        "resume": "changed" if changed else resumes,
        "retry_failed": options.pop("retry_failed"),
        "on_failure": options.pop("on_failure"),
        "max_failures": options.pop("max_failures"),
        "retry": Retry(attempts=retries + 1, on=kinds or tuple(FailureKind)),
    }


def _new_name() -> str:
    # Every sweep gets a name, so that every sweep can be resumed.
    return f"sweep-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _view(best: BestRuns, fixed: Mapping[str, Any], *, as_json: bool, quiet: bool) -> SweepScreen | SweepJson:
    if as_json:
        return SweepJson(quiet=quiet)
    if is_interactive() and not quiet:
        return SweepScreen(TerminalPainter(), best, fixed)
    return SweepScreen(LinePainter(math.inf), best, says_all=True, quiet=quiet)


# ---- the work -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class SweepCommand:
    """One call of ``mlfleet sweep`` and its result.

    Attributes:
        uri: The project.
        space: The points of the sweep.
        options: The other arguments of `Fleet.sweep`.
        best: The best results.
        view: Shows the sweep.
        jobs: The number of runs at the same time; None for as many as the Fleet allows.
        tracking_uri: The tracking store; None for the default.
        tracking: The tracking URI that was used, without credentials; None if it could not be opened.
        sweep: The handle of the sweep; None if it did not begin.
        error: The error that ended the command; failed points are not errors.
    """

    uri: str
    space: Points
    options: Mapping[str, Any]
    best: BestRuns
    view: SweepScreen | SweepJson
    jobs: int | None = None
    tracking_uri: str | None = None
    tracking: str | None = None
    sweep: Sweep | None = None
    error: MlfleetError | None = None

    @property
    def counts(self) -> SweepCounts:
        """The number of points by their end."""
        return self.sweep.counts if self.sweep is not None else SweepCounts()

    @property
    def status(self) -> RunStatus:
        """The status of the sweep; FAILED if it did not begin."""
        return self.sweep.status if self.sweep is not None else RunStatus.FAILED

    async def execute(self, interrupts: Interrupts) -> None:
        """Run the sweep and keep the result. When this returns, nothing of the sweep is left."""
        async with shown(self.view):
            # Inside the view, so that it shows how the runs stop after an interrupt.
            with interrupts.scope:
                try:
                    await self._run(interrupts)
                except MlfleetError as error:
                    self.error = error
            await self._keep_rest()

    async def _run(self, interrupts: Interrupts) -> None:
        async with Fleet(tracking_uri=self.tracking_uri, max_concurrent=self.jobs, on_event=self.view.follow) as fleet:
            interrupts.fleet = fleet
            self.tracking = fleet.tracking.uri
            async with fleet.sweep(self.uri, self.space, max_concurrent=self.jobs, **self.options) as sweep:
                self.sweep = sweep
                self.view.entered(sweep)
                async for result in sweep:
                    await self._keep(result)

    async def _keep_rest(self) -> None:
        """Keep the results that came after an interrupt."""
        if self.sweep is None:
            return
        try:
            async for result in self.sweep:
                await self._keep(result)
        except MlfleetError as error:
            self.error = error

    async def _keep(self, result: PointResult) -> None:
        self.best.add(result)
        self.view.ended(result, () if result.run is None else (await result.run.outcome()).output)


# ---- the end --------------------------------------------------------------------------------------------------------


def _say_end(command: SweepCommand, received: signal.Signals | None, *, quiet: bool, table: bool) -> None:
    """Write how the sweep ended and where to look at it to standard error, and the best runs to standard output."""
    sweep, best = command.sweep, command.best
    if command.error is not None and received is None:
        complain_of(command.error)
    if sweep is None:
        if received is not None and not quiet:
            say("stopped before the sweep began")
        return
    if table and best.results:
        _print_best(best)
    elif best.metric is not None and command.counts.finished and not best.results:
        known = ", ".join(sorted(best.metrics)) or "none"
        complain(f"no finished run has the metric {best.metric!r}; there are: {known}", word="Warning", color="yellow")
    if quiet:
        return
    say(f"sweep {sweep.run_name!r} (run {sweep.run_id}) is {command.status}: {command.counts}")
    if sweep.stopped is not None and received is None and command.error is None:
        say(f"it ended early: {sweep.stopped}")
    if command.tracking is not None:
        say(f"to look at it: {where_to_look(command.tracking, sweep.info)}")
    if sweep.name is not None:
        name = shlex.quote(sweep.name)
        done = command.status is RunStatus.FINISHED
        say(f"HTML report: mlfleet report {name}" if done else f"to resume: the same with --name {name} --resume")


def _end_as_json(command: SweepCommand, received: signal.Signals | None) -> dict[str, Any]:
    """Return the last line of ``--json``."""
    sweep, counts = command.sweep, command.counts
    return {
        "event": "end",
        "status": command.status if sweep else None,
        "run_id": sweep.run_id if sweep else None,
        "name": sweep.name if sweep else None,
        "total": counts.total,
        "finished": counts.finished,
        "failed": counts.failed,
        "killed": counts.killed,
        "retries": counts.retries,
        "earlier": counts.earlier,
        "stopped": sweep.stopped if sweep else None,
        "best": [result_as_json(result) for result in command.best.results],
        "tracking_uri": command.tracking,
        "url": run_url(command.tracking, sweep.experiment_id, sweep.run_id) if sweep and command.tracking else None,
        "interrupted": received.name if received else None,
        "error": error_as_json(command.error)["error"] if command.error else None,
    }


def _print_best(best: BestRuns) -> None:
    assert best.metric is not None  # noqa: S101 - without a metric there are no results
    names = list(dict.fromkeys(name for result in best.results for name in result.point))
    rows = [[best.metric, *names, "time", "run"]]
    rows += [
        [
            f"{result.metrics[best.metric]:g}",
            *(short(result.point[name]) if name in result.point else "-" for name in names),
            "-" if result.seconds is None else duration_text(result.seconds),
            result.run_id or "-",
        ]
        for result in best.results
    ]
    print_table(rows)
