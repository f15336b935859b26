"""Checks a whole project: all of its entry points and files, for ``mlfleet check``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mlfleet._environments.env_files import read_conda_file, read_python_requirements
from mlfleet._environments.manager import choose_manager, create_manager
from mlfleet._project.command import find_placeholders, render
from mlfleet._project.fetch import Project
from mlfleet._project.parameters import ResolvedParameters, resolve
from mlfleet._project.spec import FILE_NAME, TYPES, EntryPoint, EnvironmentFile, ProjectSpec, read_project
from mlfleet._text.documents import Report, nearest
from mlfleet.backends.base import DockerRequest
from mlfleet.backends.registry import find
from mlfleet.errors import BackendNotFound, MlfleetError, SpecError, UsageError

__all__ = ["Finding", "check_project"]

T = TypeVar("T")

_SAMPLES = {"float": "0.5", "int": "1", "bool": "true", "list": "[a]", "path": "/", "uri": "s3://bucket/key"}
"""Values for parameters without a default."""

_ANY_TEXT = "a b"
"""A value that a shell must not read as code."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A mistake or a warning.

    Attributes:
        message: What is wrong, and what to do.
        is_mistake: True if a run would be refused, or would not do what is written; False for a warning.
        path: The file; None if none is to blame.
        line: The line, counted from 1; None if it is unknown.
        column: The column, counted from 1; None if it is unknown.
    """

    message: str
    is_mistake: bool = True
    path: Path | None = None
    line: int | None = None
    column: int | None = None


def check_project(
    project: Project, backend: str = "local", config: Callable[[], Mapping[str, Any]] = dict, manager: str | None = None
) -> list[Finding]:
    """Check all files of a project as runs would read them. Blocking; call it in a thread.

    Args:
        project: The project.
        backend: The name of the backend.
        config: Returns its ``backend_config``. A SpecError of it is a finding.
        manager: The name of the environment manager; None: the one that fits the files.

    Returns:
        The mistakes and warnings, by file and line.

    Raises:
        BackendNotFound: There is no backend of that name.
    """
    find(backend)
    check = _Check(project)
    check.run(backend, config, manager)

    def place(finding: Finding) -> tuple[object, ...]:
        """Order by file and line; what is not in the project comes last."""
        path = finding.path
        is_elsewhere = path is None or not path.is_relative_to(project.root or project.folder)
        return is_elsewhere, str(path), finding.line or 0, finding.column or 0

    return sorted(dict.fromkeys(check.findings), key=place)


class _Check:
    """One check of a project."""

    def __init__(self, project: Project) -> None:
        self.findings: list[Finding] = []
        self._project = project

    def run(self, backend: str, config: Callable[[], Mapping[str, Any]], manager: str | None) -> None:
        with _logged_to(_Warnings(self.findings)):
            spec = self._read(partial(read_project, self._project.folder, self._project.root))
            if spec is None:
                return
            if spec.environment is not None:
                self._check_environment(spec, spec.environment, manager)
        for error in spec.broken.values():
            self._add(error)
        if not (self.findings or spec.entry_points or spec.databricks_spark_job):
            self._check_missing(spec)
        with _logged_to(logging.NullHandler()):  # it is said with its line
            for entry_point in spec.entry_points.values():
                self._check_entry_point(spec, entry_point)
        with _logged_to(_Warnings(self.findings)):
            self._check_backend(spec, backend, config)

    # ---- findings ---------------------------------------------------------------------------------------------------

    def _add(self, error: MlfleetError, *, is_mistake: bool = True, path: Path | None = None) -> None:
        if isinstance(error, SpecError):
            place = Path(error.path) if error.path is not None else path
            self.findings.append(Finding(error.message, is_mistake, place, error.line, error.column))
        else:
            self.findings.append(Finding(str(error), is_mistake, path))

    def _read(self, read: Callable[[Report], T]) -> T | None:
        """Read documents, and keep all mistakes and unknown keys in them. Return None if they cannot be read."""
        report = Report(collect=True)
        result: T | None = None
        try:
            result = read(report)
        except SpecError as error:
            self._add(error)
        for mistake in report.mistakes:
            self._add(mistake)
        for _, warning in report.unknown:
            self._add(warning, is_mistake=False)
        return result

    # ---- the parts of a project -------------------------------------------------------------------------------------

    def _check_missing(self, spec: ProjectSpec) -> None:
        what = f"{FILE_NAME} declares no entry points"
        if spec.path is None:
            # pyproject.toml is so near that it would be named in every folder of Python code.
            names = {entry.name for entry in spec.folder.iterdir() if entry.is_file()} - {"pyproject.toml"}
            similar = next((name for name in names if Path(name).stem.lower() == FILE_NAME.lower()), None)
            hint = nearest(FILE_NAME, names) if similar is None else f": rename {similar!r}"
            what = f"there is no {FILE_NAME} file{hint}"
        scripts = spec.scripts()
        todo = f"a run has to name a script, as in -e {scripts[0]}" if scripts else "there is nothing to run"
        self.findings.append(Finding(f"{what}; {todo}", not scripts, spec.path or spec.folder))

    def _check_entry_point(self, spec: ProjectSpec, entry_point: EntryPoint) -> None:
        def say(message: str | MlfleetError, line: int | None, *, is_mistake: bool = True) -> None:
            subject = f"entry_points.{entry_point.name}: " if isinstance(message, str) else ""  # errors have one
            self.findings.append(Finding(f"{subject}{message}", is_mistake, spec.path, line))

        _, used, unknown = find_placeholders(entry_point.command, entry_point.parameters)
        for name in dict.fromkeys(unknown):
            hint = nearest(name, entry_point.parameters)
            say(
                f"the command uses {{{name}}}, and there is no such parameter{hint} (bash gets {{{name}}} as it is, and"
                f" mlflow refuses it: declare it, or write {{{{{name}}}}} if braces are meant)",
                entry_point.line,
            )
        is_right = True
        for parameter in entry_point.parameters.values():
            if parameter.type not in TYPES:
                hint = nearest(parameter.type, TYPES) or f": there are {', '.join(TYPES)}"
                say(
                    f"the type {parameter.type!r} of the parameter {parameter.name!r} is unknown and counts as"
                    f" string{hint}",
                    parameter.line,
                    is_mistake=False,
                )
            if parameter.name not in used:
                text = f"the parameter {parameter.name!r} is declared, but the command does not use it"
                say(text, parameter.line, is_mistake=False)
            try:
                _resolve(spec, replace(entry_point, parameters={parameter.name: parameter}))
            except MlfleetError as error:
                # A path may exist where the runs are submitted.
                say(error, parameter.line, is_mistake=parameter.type != "path")
                is_right = is_right and parameter.type == "path"
        if is_right:
            self._check_command(spec, entry_point, say)

    def _check_command(self, spec: ProjectSpec, entry_point: EntryPoint, say: Callable[..., None]) -> None:
        # The paths of defaults need not exist here.
        parameters = {
            name: replace(each, default=None) if each.type == "path" else each
            for name, each in entry_point.parameters.items()
        }
        resolved = _resolve(spec, replace(entry_point, parameters=parameters))
        downloaded = {each.name: each.uri for each in resolved.downloads}
        try:
            render(entry_point, resolved, downloaded)
        except MlfleetError as error:
            say(error, entry_point.line)
            return
        for parameter in entry_point.parameters.values():
            if parameter.type in ("float", "int", "bool", "list"):
                continue
            texts = {**resolved.declared, parameter.name: _ANY_TEXT}
            try:
                render(entry_point, replace(resolved, declared=texts), downloaded)
            except MlfleetError as error:
                say(f"some values cannot be given: {error}", entry_point.line, is_mistake=False)

    def _check_environment(self, spec: ProjectSpec, source: EnvironmentFile, manager: str | None) -> None:
        before = len(self.findings)
        try:
            name = choose_manager(manager, source)
            if name == "conda":
                self._read(partial(read_conda_file, source.path, source.root))
            else:
                self._read(partial(read_python_requirements, spec.folder, source))
            if not any(each.is_mistake for each in self.findings[before:]):
                create_manager(name).plan(spec.folder, source)
        except SpecError as error:
            self._add(error)
        except MlfleetError as error:
            # What is installed on this machine is no part of the project.
            self._add(error, is_mistake=isinstance(error, UsageError), path=source.path)

    def _check_backend(self, spec: ProjectSpec, name: str, config: Callable[[], Mapping[str, Any]]) -> None:
        kind = find(name)
        if spec.docker is not None and kind.docker_backend is not None:
            try:
                kind = find(kind.docker_backend)
            except BackendNotFound as error:  # no mistake of the project
                self._add(error, is_mistake=False)
                return
        backend = kind()
        docker = None if spec.docker is None else DockerRequest(env=spec.docker)
        try:
            settings = backend.configure(config())
            if not any(each.is_mistake for each in self.findings):
                backend.check(docker, spec.folder)
                backend.check_config(settings, docker, ())
        except MlfleetError as error:
            self._add(error)


@contextmanager
def _logged_to(handler: logging.Handler) -> Iterator[None]:
    """Let what mlfleet logs in this block go to a handler, and nowhere else."""
    logger = logging.getLogger("mlfleet")
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before


class _Warnings(logging.Handler):
    """Makes findings of warnings.

    Args:
        findings: The list that gets them.
    """

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__(logging.WARNING)
        self._findings = findings

    def emit(self, record: logging.LogRecord) -> None:
        self._findings.append(Finding(record.getMessage(), is_mistake=False))


def _resolve(spec: ProjectSpec, entry_point: EntryPoint) -> ResolvedParameters:
    given = {
        each.name: _SAMPLES.get(each.type, "1")
        for each in entry_point.parameters.values()
        if each.default is None and each.default_error is None
    }
    return resolve(entry_point, given, project_dir=spec.folder)
