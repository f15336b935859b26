"""``mlfleet check``: every mistake and warning in the files of a project."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import click

from mlfleet._cli.options import check_options, debug_option, json_option, quiet_option, read_backend_config
from mlfleet._cli.output import print_json, print_line
from mlfleet._concurrency.threads import PROJECTS
from mlfleet._engine.check import Finding, check_project
from mlfleet._engine.request import RunRequest
from mlfleet._progress.terminal import say
from mlfleet._project.fetch import Project, ProjectFetcher

__all__ = ["check"]


@click.command()
@click.argument("uri", metavar="[URI]", default=".")
@check_options
@json_option("Print a JSON list of the mistakes and warnings.")
@quiet_option
@debug_option
def check(*, uri: str, quiet: bool, as_json: bool, **options: Any) -> int:
    """Check the files of the project at URI, the working directory by default, and run nothing.

    All mistakes and warnings are printed, each with its file and line: in MLproject with all entry points, in the
    files of the environment, in the settings of the backend. A mistake is what a run refuses, and a parameter that a
    command uses and that is not declared.

    Exit codes: 0 there is no mistake, 2 there is one.
    """
    options["backend_config"] = read_backend_config(options["backend"], options["backend_config"])
    request = RunRequest.of(uri, **options)

    async def find_all() -> tuple[Project, list[Finding]]:
        project = await ProjectFetcher().fetch(request.uri, request.version)
        work = partial(check_project, project, request.backend, request.read_backend_config, request.env_manager)
        return project, await PROJECTS.run(work)

    project, findings = anyio.run(find_all)
    shown = [_as_json(each, project) for each in findings]
    if as_json:
        print_json(shown)
    else:
        for each in shown:
            place = ":".join(str(each[key]) for key in ("path", "line", "column") if each[key] is not None)
            print_line(" ".join(f"{place}: {each['kind']}: {each['message']}".lstrip(": ").split()))
    mistakes = sum(each.is_mistake for each in findings)
    if not quiet:
        warnings = len(findings) - mistakes
        say(f"{_count(mistakes, 'mistake')}, {_count(warnings, 'warning')}")
    return 2 if mistakes else 0


def _as_json(finding: Finding, project: Project) -> dict[str, Any]:
    return {
        "kind": "error" if finding.is_mistake else "warning",
        "path": None if finding.path is None else _shown(finding.path, project),
        "line": finding.line,
        "column": finding.column,
        "message": finding.message,
    }


def _shown(path: Path, project: Project) -> str:
    """Return a path relative to the top of a project that was fetched, or to the working directory, if it is inside."""
    root = project.root or project.folder
    bases = [root, Path.cwd()] if project.cached else [Path.cwd()]
    return next((os.path.relpath(path, base) for base in bases if path.is_relative_to(base)), str(path))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number or 'no'} {noun}s"
