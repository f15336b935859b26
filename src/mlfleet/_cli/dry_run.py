"""``mlfleet run --dry-run``: show a run without making it. Only the cache of fetched projects is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio.to_thread

from mlfleet._cli.output import print_line
from mlfleet._cli.progress import Progress
from mlfleet._engine.job import draft
from mlfleet._engine.plan import Plan, Planner
from mlfleet._engine.request import RunRequest, choose_experiment
from mlfleet._engine.variables import check_reserved
from mlfleet._environments.store import list_environments
from mlfleet._project.fetch import ProjectFetcher
from mlfleet._signals import Interrupts
from mlfleet._text.masking import MASK
from mlfleet._text.plain import clean
from mlfleet.backends.base import Backend
from mlfleet.errors import MlfleetError
from mlfleet.runs import RunEvent, RunStatus, Stage, Timeouts
from mlfleet.tracking import default_uri, open_tracking
from mlfleet.tracking.base import RunInfo
from mlfleet.tracking.locations import absolute_uri

__all__ = ["DryRun", "show"]

_LATER = "(of the run)"
_SHOWN = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID")
_RUN_ID = "0" * 32  # stands for the id of the MLflow run; backends derive names from it


@dataclass(slots=True, kw_only=True)
class DryRun:
    """One call of ``mlfleet run --dry-run`` and its result.

    Attributes:
        request: The run to show.
        tracking_uri: The tracking store; None for the default.
        found: The description of the run; None if there was an error.
        error: The mistake in the request or the project; None if there is none.
    """

    request: RunRequest
    tracking_uri: str | None = None
    found: dict[str, Any] | None = None
    error: MlfleetError | None = None

    async def execute(self, progress: Progress, interrupts: Interrupts) -> None:
        """Plan the run and keep its description."""
        with interrupts.scope:
            try:
                self.found = _masked(await self._describe(progress))
            except MlfleetError as error:
                self.error = error

    async def _describe(self, progress: Progress) -> dict[str, Any]:
        # Not a Fleet: opening its tracking would make a database, or ask a server.
        backends: dict[str, Backend] = {}
        planner = Planner(ProjectFetcher(), lambda kind: backends.setdefault(kind.name, kind()))
        plan = await planner.plan(
            self.request,
            on_progress=lambda line: progress(RunEvent(Stage.FETCHING, self.request.uri, detail=line)),
        )
        uri = await anyio.to_thread.run_sync(partial(_absolute, self.tracking_uri))
        tracking = open_tracking(uri)
        backends[plan.backend].check_tracking(plan.tracking_uri(tracking.uri), plan.config)
        if self.request.env:
            plain, secret = await tracking.environ()
            check_reserved(self.request.env, {*plain, *secret}, tracking_uri=tracking.uri)
        name, experiment_id = choose_experiment(self.request.experiment_name, self.request.experiment_id)
        info = RunInfo(self.request.run_id or _RUN_ID, experiment_id or "0", "", RunStatus.SCHEDULED, "")
        job = await draft(plan, info, tracking, output=None, timeouts=Timeouts())
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
            "run_name": self.request.run_name,
            "variables": {
                "MLFLOW_TRACKING_URI": tracking.uri,
                "MLFLOW_EXPERIMENT_ID": experiment_id or _LATER,
                "MLFLOW_RUN_ID": self.request.run_id or _LATER,
                **{name: text for name, text in job.environ.items() if name not in _SHOWN},
                **dict.fromkeys(job.secrets, MASK),
            },
            "tags": dict(plan.tags),
            "request": await anyio.to_thread.run_sync(backends[plan.backend].preview, job),
        }


def _masked(value: Any) -> Any:
    """Return JSON data with the secrets of the URIs in its texts masked."""
    match value:
        case str() if "://" in value:
            return clean(value)
        case Mapping():
            return {name: _masked(each) for name, each in value.items()}
        case list() | tuple():
            return [_masked(each) for each in value]
        case _:
            return value


def show(found: Mapping[str, Any]) -> None:
    """Print the description of a run. A backend's request stays a document of its own: the rest is comments in it."""
    environment = found["environment"]
    rows = {
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


def _absolute(uri: str | None) -> str:
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    return absolute_uri(chosen) if chosen else default_uri()


def _environment(plan: Plan) -> dict[str, Any]:
    if plan.environment is None:
        image = plan.docker.env.image if plan.docker else None
        return {"manager": "docker" if image else None, "python": None, "built": None, "image": image, "source": None}
    environment = plan.environment
    name = f"{environment.manager}-{environment.key}"
    built = any(each.path.name == name and each.complete for each in list_environments()) if environment.key else None
    source = str(environment.source.path) if environment.source and environment.key else None
    return {
        "manager": environment.manager,
        "python": environment.python,
        "built": built,
        "image": None,
        "source": source,
    }


def _pairs(values: Mapping[str, object]) -> str:
    return "\n".join(f"{name}={value}" for name, value in values.items())
