"""``--dry-run`` of ``mlfleet run`` and ``sweep``: show a run without making it.

Only the cache of fetched projects is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import anyio.to_thread

from mlfleet._cli.output import exit_code, masked, print_json, print_line
from mlfleet._cli.progress import Progress
from mlfleet._engine.job import draft
from mlfleet._engine.plan import Plan, Planner
from mlfleet._engine.request import RunRequest, choose_experiment
from mlfleet._engine.variables import check_reserved
from mlfleet._environments.store import list_environments
from mlfleet._project.fetch import ProjectFetcher
from mlfleet._signals import Interrupts, run_until_interrupted
from mlfleet._text.masking import MASK
from mlfleet._text.plain import point_text
from mlfleet.backends.base import Backend
from mlfleet.runs import RunEvent, RunStatus, Stage, Timeouts
from mlfleet.spaces import Space
from mlfleet.tracking import default_uri, open_tracking
from mlfleet.tracking.base import RunInfo
from mlfleet.tracking.locations import absolute_uri

__all__ = ["dry_run", "used_tracking_uri"]

_LATER = "(of the run)"
_SHOWN_POINTS = 5
_RUN_ID = "0" * 32  # stands for the id of the MLflow run; backends derive names from it


def dry_run(
    request: RunRequest, tracking_uri: str | None, *, space: Space | None = None, as_json: bool, quiet: bool
) -> int:
    """Show a run, and return the exit code.

    Args:
        request: The run; of a sweep, that of its first point.
        tracking_uri: The tracking store; None for the default.
        space: The points of the sweep, of which the first ones are shown; None for a single run.
        as_json: Print a JSON object.
        quiet: Show no progress.

    Raises:
        MlfleetError: There is a mistake in the request or the project.
    """
    found: dict[str, Any] = {}

    async def describe(interrupts: Interrupts) -> None:
        with interrupts.scope:
            found.update(masked(await _describe(request, tracking_uri, progress)))

    with closing(Progress(inherits=False, quiet=quiet)) as progress:
        received = run_until_interrupted(describe, progress.say)
    if found:
        if space is not None:
            points = [masked(point) for point in islice(space, _SHOWN_POINTS)]
            found = {"points": {"count": len(space), "first": points}, **found}
        print_json(found) if as_json else _show(found)
    return exit_code(None, received)


async def _describe(request: RunRequest, tracking_uri: str | None, progress: Progress) -> dict[str, Any]:
    # Not a Fleet: opening its tracking would make a database, or ask a server.
    backends: dict[str, Backend] = {}
    planner = Planner(ProjectFetcher(), lambda kind: backends.setdefault(kind.name, kind()))
    plan = await planner.plan(
        request,
        on_progress=lambda line: progress(RunEvent(Stage.FETCHING, request.uri, detail=line)),
    )
    uri = await anyio.to_thread.run_sync(partial(used_tracking_uri, tracking_uri))
    tracking = open_tracking(uri)
    backends[plan.backend].check_tracking(plan.tracking_uri(tracking.uri), plan.config)
    if request.env:
        plain, secret = await tracking.environ()
        check_reserved(request.env, {*plain, *secret}, tracking_uri=tracking.uri)
    name, experiment_id = choose_experiment(request.experiment_name, request.experiment_id)
    info = RunInfo(request.run_id or _RUN_ID, experiment_id or "0", "", RunStatus.SCHEDULED, "")
    job = await draft(plan, info, tracking, output=None, timeouts=Timeouts())
    backend = backends[plan.backend]
    shown, hidden = backend.variables(job)
    return {
        "project": plan.project_name,
        "uri": plan.project.uri,
        "commit": plan.project.commit,
        "entry_point": plan.entry_point.name,
        "command": plan.provisional_command,
        "folder": str(plan.spec.folder),
        "copied": plan.project.cached,
        "parameters": dict(plan.parameters.logged),
        "downloads": {each.name: each.uri for each in plan.parameters.downloads},
        "environment": await anyio.to_thread.run_sync(partial(_environment, plan)),
        "backend": plan.backend,
        "tracking_uri": tracking.uri,
        "experiment": name or f"id {experiment_id}",
        "run_name": request.run_name,
        "variables": {
            **shown,
            "MLFLOW_EXPERIMENT_ID": experiment_id or _LATER,
            "MLFLOW_RUN_ID": request.run_id or _LATER,
            **dict.fromkeys(hidden, MASK),
        },
        "tags": dict(plan.tags),
        "request": await anyio.to_thread.run_sync(backend.preview, job),
    }


def _show(found: Mapping[str, Any]) -> None:
    """Print the description of a run. A backend's request stays a document of its own: the rest is comments in it."""
    environment = found["environment"]
    rows = {
        "points": _points(found["points"]) if "points" in found else "",
        "project": found["project"] + (f" at {found['commit'][:12]}" if found["commit"] else ""),
        "entry point": found["entry_point"],
        "command": found["command"].rstrip("\n"),
        "folder": found["folder"] + (" (the run gets a copy)" if found["copied"] else ""),
        "environment": environment["manager"] or "of the backend",
        "backend": found["backend"],
        "tracking": found["tracking_uri"],
        "experiment": found["experiment"],
        "run name": found["run_name"] or "(chosen by MLflow)",
        "parameters": _pairs(found["parameters"]),
        "downloads": _pairs(found["downloads"]),
        "variables": _pairs(found["variables"]),
    }
    if environment["image"] is not None:
        rows["environment"] += f" image {environment['image']}"
    if environment["source"] is not None:
        rows["environment"] += f" of {environment['source']}"
    if environment["built"] is not None:
        rows["environment"] += ", built already" if environment["built"] else ", to be built"
    mark = "" if found["request"] is None else "# "
    for name, text in rows.items():
        if text:
            print_line(f"{mark}{name:<12} " + text.replace("\n", f"\n{mark}{'':<13}"))
    if found["request"] is not None:
        print_line(f"\n{found['request']}")


def _points(points: Mapping[str, Any]) -> str:
    count, first = points["count"], points["first"]
    lines = [f"{count}; the first one is the run below", *map(point_text, first)]
    return "\n".join(lines + ["…"] * (count > len(first)))


def used_tracking_uri(uri: str | None) -> str:
    """Return the URI of the tracking store to use, absolute. Blocking: reads the working directory.

    Args:
        uri: The URI that an option gives; None for that of the environment, or else the default.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    return absolute_uri(chosen) if chosen else default_uri()


def _environment(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(("manager", "python", "built", "image", "source"))
    environment = plan.environment
    if environment is not None:
        found |= {"manager": environment.manager, "python": environment.python}
        if environment.key:
            name = f"{environment.manager}-{environment.key}"
            found["built"] = any(each.path.name == name and each.complete for each in list_environments())
            found["source"] = str(environment.source.path) if environment.source else None
    elif plan.docker is not None:
        found |= {"manager": "docker", "image": plan.docker.env.image}
    return found


def _pairs(values: Mapping[str, object]) -> str:
    return "\n".join(f"{name}={value}" for name, value in values.items())
