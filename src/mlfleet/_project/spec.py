"""Reads MLproject, the file in which a project declares its entry points, parameters and environment."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from mlfleet._project.boundary import check_link, find_root, is_inside
from mlfleet._project.lists import format_list
from mlfleet._run_log import get_logger, warn_once
from mlfleet._text.documents import Node, Report, nearest, read_toml, read_yaml, warn_unknown
from mlfleet.errors import SpecError

__all__ = [
    "DockerEnv",
    "EntryPoint",
    "EnvironmentFile",
    "EnvironmentFileKind",
    "Parameter",
    "ProjectSpec",
    "read_project",
]

_log = get_logger("mlfleet.project")

FILE_NAME = "MLproject"
TYPES = ("string", "float", "int", "bool", "list", "path", "uri")
"""The types of parameters. Any other counts as a string."""

_KEYS = ("name", "docker_env", "python_env", "conda_env", "entry_points", "databricks_spark_job")
_ENVIRONMENT_KEYS = ("docker_env", "python_env", "conda_env")
_SCRIPTS = (".py", ".sh", ".R")
_LISTED = 20
# Written into the command as it is.
_OPTION = re.compile(r"([-+]{0,2}[A-Za-z0-9_][A-Za-z0-9_.-]*=?)?", re.A)


class EnvironmentFileKind(StrEnum):
    """The kinds of files in which a project lists what it needs."""

    PYTHON_ENV = "python_env"
    CONDA = "conda"
    UV_LOCK = "uv.lock"
    PYPROJECT = "pyproject.toml"
    REQUIREMENTS = "requirements.txt"

    @property
    def is_declared(self) -> bool:
        """True for the formats of MLflow; the others are taken where a project has none of these."""
        return self in (EnvironmentFileKind.PYTHON_ENV, EnvironmentFileKind.CONDA)


@dataclass(frozen=True, slots=True)
class EnvironmentFile:
    """The file of a project that lists what it needs.

    Attributes:
        kind: The format of the file.
        path: The absolute path.
        root: The folder that this file and those it names must be in; None: the repository of the project.
    """

    kind: EnvironmentFileKind
    path: Path
    root: Path | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A declared parameter of an entry point.

    Attributes:
        name: The name, as in ``{name}`` in the command.
        type: ``string``, ``float``, ``int``, ``bool``, ``list``, ``path`` or ``uri``; any other counts as a string.
        default: The text of the default; None: the parameter is required.
        default_error: The reason why the default cannot be used; it counts only if no value is given.
        optional: True if an empty value leaves the parameter out of the command.
        line: The line of the declaration; None if it is unknown.
        option: The option that the placeholder writes before the value; None for none, or, with the types ``bool`` and
            ``list``, for ``--`` and the name. Empty: a list is written as words.
    """

    name: str
    type: str = "string"
    default: str | None = None
    default_error: str | None = None
    optional: bool = False
    option: str | None = None
    line: int | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """A command of the project that can be run.

    Attributes:
        name: The name, or the path of a script inside the project.
        command: The format string of the command for ``bash -c``.
        parameters: The declared parameters, in their order.
        line: The line of the command; None if it is unknown.
    """

    name: str
    command: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    line: int | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class DockerEnv:
    """``docker_env`` of MLproject.

    Attributes:
        image: The base image.
        volumes: The volumes, as ``docker run -v`` takes them.
        environment: The names and values of variables; None copies the caller's value.
    """

    image: str
    volumes: tuple[str, ...] = ()
    environment: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True, slots=True)
class ProjectSpec:
    """The content of MLproject, or the defaults of a project without one.

    Attributes:
        folder: The absolute path of the project's folder.
        name: The name in MLproject, or None.
        path: The MLproject file; None if it does not exist.
        entry_points: The declared entry points that can be run.
        broken: The errors of the other ones. They count only for who runs these, as in the reference.
        environment: The file that lists the Python and libraries that the project needs.
        docker: ``docker_env``.
        databricks_spark_job: ``python_file`` (or None), ``parameters`` and ``python_libraries`` (lists of text).
    """

    folder: Path
    name: str | None = None
    path: Path | None = None
    entry_points: Mapping[str, EntryPoint] = field(default_factory=dict)
    broken: Mapping[str, SpecError] = field(default_factory=dict)
    environment: EnvironmentFile | None = None
    docker: DockerEnv | None = None
    databricks_spark_job: Mapping[str, Any] | None = None

    def entry_point(self, name: str) -> EntryPoint:
        """Return the entry point of that name, declared or a script of the project. Blocking (looks for scripts).

        A Databricks Spark job that names its file has that one entry point, whatever the name, as in the reference.

        Raises:
            SpecError: The entry point is wrong, or does not exist; the text lists those that do.
        """
        if name in self.broken:
            raise self.broken[name]
        for error in self.broken.values():
            warn_once(_log, "another entry point of the project is wrong and cannot be run: %s", str(error))
        job = self.databricks_spark_job
        if job is not None and job["python_file"] is not None:
            return EntryPoint(name, _literal(shlex.join(["python", job["python_file"], *job["parameters"]])))
        if name in self.entry_points:
            return self.entry_points[name]
        if job is None and name.endswith(_SCRIPTS) and "\0" not in name:
            return self._script(name)
        raise self._no_entry_point(name)

    def _script(self, name: str) -> EntryPoint:
        try:
            file = (self.folder / name).resolve()
            inside = file.is_relative_to(self.folder.resolve())
            found = file.is_file()
        except (OSError, RuntimeError, ValueError):  # A loop of links, a name that no file can have.
            inside, found = True, False
        if not inside:
            raise SpecError(f"the script {name!r} is outside the project", path=self.folder)
        if not found:
            raise self._no_entry_point(name)
        # A script whose name begins with a dash must not be taken for an option.
        script = f"./{name}" if name.startswith("-") else name
        if name.endswith(".R"):
            text = re.sub(r"([\\'])", r"\\\1", script)
            source = re.sub(r'([\\"$`])', r"\\\1", f"mlflow::mlflow_source('{text}')")
            return EntryPoint(name, _literal(f'Rscript -e "{source}" --args'))
        program = "python" if name.endswith(".py") else shlex.quote(os.environ.get("SHELL") or "bash")
        return EntryPoint(name, _literal(f"{program} {shlex.quote(script)}"))

    def _no_entry_point(self, name: str) -> SpecError:
        scripts = self.scripts()
        hint = nearest(name, [*self.entry_points, *scripts])
        parts = [f"there is no entry point {name!r}{hint}"]
        if self.entry_points:
            parts.append(f"MLproject declares {_listed(self.entry_points)}")
        elif self.path is None:
            parts.append("the project has no MLproject file")
        else:
            parts.append("MLproject declares none")
        if self.databricks_spark_job is None:
            found = f", here {_listed(scripts)}" if scripts else ""
            parts.append(f"a script ({', '.join(_SCRIPTS)}) of the project can be given by its path{found}")
        return SpecError("; ".join(parts), path=self.path or self.folder)

    def scripts(self) -> list[str]:
        """Return the names of the scripts in the project's folder, which can be entry points. Blocking."""
        return sorted(name for name in _names(self.folder) if name.endswith(_SCRIPTS))


def read_project(folder: Path, root: Path | None = None, report: Report | None = None) -> ProjectSpec:
    """Read the project in `folder`. Blocking; call it in a thread.

    Args:
        folder: The folder of the project.
        root: The folder that MLproject and the files it names must be in; None: the Git working tree of `folder`, else
            `folder` itself.
        report: Gets all mistakes, if it collects them, and the unknown keys; None: the first mistake is raised.

    Raises:
        SpecError: MLproject is wrong, or names a file outside of `root`; the text has file, line, column and what was
            expected.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - like absolute(), but without the dots
    root = root or find_root(folder)
    path = _find(folder)
    if path is None:
        return ProjectSpec(folder=folder, environment=_default_environment(folder, root))
    check_link(path, root)
    report = report or Report()
    document = read_yaml(path, defer_duplicates=True)
    keys = document.mapping(_KEYS, expected="a mapping with the keys of an MLproject file", report=report)
    environments = [key for key in _ENVIRONMENT_KEYS if key in keys]
    entry_points: dict[str, EntryPoint] = {}
    broken: dict[str, SpecError] = {}
    job, docker, name, environment = None, None, None, None
    with report.part():
        if len(environments) > 1:
            given = ", ".join(_ENVIRONMENT_KEYS)
            keys[environments[1]].fail(f"only one of {given} can be given, here are {environments}")
    with report.part():
        entry_points, broken = _entry_points(keys.get("entry_points"), report)
    with report.part():
        job = _spark_job(keys, [*entry_points, *broken], entry_points, report)
        if job is not None and job["python_file"] is not None and not is_inside(folder / job["python_file"], root):
            keys["databricks_spark_job"].fail(
                f"the file {job['python_file']!r} is outside of the project's repository {root}: copy the file there"
            )
    with report.part():
        docker = _docker(keys["docker_env"], report) if "docker_env" in keys else None
    warn_unknown(path, report)
    with report.part():
        name = keys["name"].text() if "name" in keys else None
    with report.part():
        environment = None if docker or job else _environment(folder, root, keys)
    return ProjectSpec(
        folder=folder,
        name=name,
        path=path,
        entry_points=entry_points,
        broken=broken,
        environment=environment,
        docker=docker,
        databricks_spark_job=job,
    )


def _find(folder: Path) -> Path | None:
    try:
        names = [entry.name for entry in folder.iterdir() if entry.name.lower() == FILE_NAME.lower()]
    except FileNotFoundError as error:
        raise SpecError("there is no such folder", path=folder) from error
    except NotADirectoryError as error:
        raise SpecError("a project is a folder, this is a file", path=folder) from error
    except (OSError, ValueError) as error:
        raise SpecError(f"the project's folder cannot be read: {error}", path=folder) from error
    if not names:
        return None
    return folder / (FILE_NAME if FILE_NAME in names else min(names))


def _environment(folder: Path, root: Path, keys: Mapping[str, Node]) -> EnvironmentFile | None:
    for key, kind in (("python_env", EnvironmentFileKind.PYTHON_ENV), ("conda_env", EnvironmentFileKind.CONDA)):
        if key in keys:
            name = keys[key].string(expected="the path of a file")
            path = Path(os.path.abspath(folder / name))  # noqa: PTH100 - as above
            if os.path.realpath(path) != (real := os.path.realpath(folder / name)):
                path = Path(real)  # `..` behind a link
            if not is_inside(path, root):
                keys[key].fail(
                    f"{name!r} is outside of the project's repository {root}: copy the file there, or give a URI that "
                    "names the folder of both, as in folder#sub/folder"
                )
            if not _is_file(path):
                keys[key].fail(f"there is no file {str(path)!r}{nearest(name, _names(folder))}")
            return EnvironmentFile(kind, path, root)
    return _default_environment(folder, root)


def _names(folder: Path) -> list[str]:
    """Return the names in a folder, for hints."""
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _default_environment(folder: Path, root: Path) -> EnvironmentFile | None:
    """Return the file that lists what the project needs, where MLproject names none."""
    candidates = (
        ("python_env.yaml", EnvironmentFileKind.PYTHON_ENV),
        ("conda.yaml", EnvironmentFileKind.CONDA),
        ("uv.lock", EnvironmentFileKind.UV_LOCK),
        ("pyproject.toml", EnvironmentFileKind.PYPROJECT),
        ("requirements.txt", EnvironmentFileKind.REQUIREMENTS),
    )
    for name, kind in candidates:
        path = folder / name
        if not _is_file(path):
            continue
        check_link(path, root)
        if kind is EnvironmentFileKind.UV_LOCK and not _is_file(folder / "pyproject.toml"):
            continue
        if kind is EnvironmentFileKind.PYPROJECT and not _lists_dependencies(path):
            continue
        return EnvironmentFile(kind, path, root)
    return None


def _lists_dependencies(path: Path) -> bool:
    """Return True if a ``pyproject.toml`` says what the project needs; many only configure tools."""
    project = read_toml(path).get("project")
    if not isinstance(project, dict):
        return False
    dynamic = project.get("dynamic")
    return not (isinstance(dynamic, list) and "dependencies" in dynamic)


def _entry_points(node: Node | None, report: Report) -> tuple[dict[str, EntryPoint], dict[str, SpecError]]:
    entry_points: dict[str, EntryPoint] = {}
    broken: dict[str, SpecError] = {}
    for name, entry in node.mapping().items() if node is not None else ():
        try:
            entry_points[name] = _entry_point(name, entry, report)
        except SpecError as error:
            broken[name] = error
    return entry_points, broken


def _entry_point(name: str, node: Node, report: Report) -> EntryPoint:
    expected = "a mapping with a command and its parameters"
    keys = node.mapping(("parameters", "command"), expected=expected, report=report)
    declared: dict[str, Node] = {}
    with report.part():
        if "parameters" in keys:
            declared = keys["parameters"].mapping(expected="a mapping of names and types", report=report)
    parameters = {key: Parameter(key) for key in declared}
    for key, value in declared.items():
        with report.part():
            parameters[key] = replace(_parameter(key, value, report), line=value.line)
    if "command" not in keys:
        node.fail("the command is missing")
    return EntryPoint(name, keys["command"].string(expected="a command"), parameters, keys["command"].line)


def _parameter(name: str, node: Node, report: Report) -> Parameter:
    if node.is_null:
        return Parameter(name)
    if isinstance(node.value, str):
        return Parameter(name, node.value)
    if not isinstance(node.value, dict):
        node.wrong("a type, or a mapping with type and default")
    # `description` is for people; many projects have it. `optional` and `option` are not the reference's.
    keys = node.mapping(("type", "default", "description", "optional", "option"), report=report)
    types = f"a type ({', '.join(TYPES[:-1])} or {TYPES[-1]})"
    kind = keys["type"].string(expected=types) if "type" in keys else "string"
    optional = _boolean(keys["optional"]) if "optional" in keys else False
    option = _option(keys["option"]) if "option" in keys else None
    default, error = "" if optional else None, None
    if "default" in keys:
        try:
            default = _list_text(keys["default"]) if kind == "list" else _plain_text(keys["default"])
        except SpecError as wrong:
            default, error = None, f"its default is wrong ({wrong})"
    return Parameter(name, kind, default, error, optional, option)


def _boolean(node: Node) -> bool:
    if not isinstance(node.value, bool):
        node.wrong("true or false")
    return node.value


def _option(node: Node) -> str:
    option = node.string(expected="an option such as --name")
    if not _OPTION.fullmatch(option):
        node.fail(f"{option!r} is not an option such as --name, -n or --name=")
    return option


def _list_text(node: Node) -> str:
    """Return the default of a list as text."""
    if not isinstance(node.value, list):
        return _plain_text(node)
    return format_list([_plain_text(item) for item in node.value])


def _plain_text(node: Node) -> str:
    """Return a plain value as the reference writes it: the text of the parsed value (0.10 is 0.1, yes is True)."""
    node.text(expected="a string, a number, a boolean or a date")
    return str(node.value)


def _docker(node: Node, report: Report) -> DockerEnv:
    expected = "a mapping with an image"
    keys = node.mapping(("image", "volumes", "environment"), expected=expected, report=report)
    image, volumes, environment = "", list[str](), list[tuple[str, str | None]]()
    with report.part():
        if "image" not in keys:
            node.fail("the image is missing")
        image = keys["image"].string(expected="the name of an image")
        if not image.strip():
            keys["image"].fail("the image is empty")
    with report.part():
        given = keys["volumes"].sequence(expected='a list such as ["/data:/data:ro"]') if "volumes" in keys else []
        volumes = [volume.string(expected="a volume such as /data:/data:ro") for volume in given]
    with report.part():
        expected = 'a list such as [["NAME", "value"], "NAME_TO_COPY"]'
        given = keys["environment"].sequence(expected=expected) if "environment" in keys else []
        environment = [_variable(variable) for variable in given]
    return DockerEnv(image=image, volumes=tuple(volumes), environment=tuple(environment))


def _variable(node: Node) -> tuple[str, str | None]:
    expected = 'a pair such as ["NAME", "value"], or the name of a variable to copy'
    if isinstance(node.value, str):
        name, value = node, None
    else:
        pair = node.sequence(expected=expected)
        if len(pair) != 2:
            node.fail(f"expected {expected}, found a list of {len(pair)}")
        name, value = pair[0], _plain_text(pair[1])
    if not name.string(expected="the name of a variable") or "=" in name.value:
        name.fail(f'{name.value!r} is not the name of a variable; to set one, write ["NAME", "value"]')
    return name.value, value


def _spark_job(
    keys: Mapping[str, Node], names: Sequence[str], entry_points: Mapping[str, EntryPoint], report: Report
) -> Mapping[str, Any] | None:
    if "databricks_spark_job" not in keys:
        return None
    node = keys["databricks_spark_job"]
    job = node.mapping(("python_file", "parameters", "python_libraries"), report=report)
    file = job["python_file"].string(expected="the path of a Python file") if "python_file" in job else None
    if file is None and not names:
        node.fail("python_file or entry_points must say what to run")
    if file is not None and names:
        node.fail("python_file and entry_points cannot both be given")
    for key in _ENVIRONMENT_KEYS:
        if key in keys:
            keys[key].fail("a databricks_spark_job brings its own environment, this cannot be given with it")
    for entry_point in entry_points.values():
        for parameter in entry_point.parameters.values():
            if parameter.type == "path":
                node.fail(f"the parameter {parameter.name!r} is a path, which a databricks_spark_job cannot have")
    parameters = job["parameters"].sequence() if "parameters" in job else []
    libraries = job["python_libraries"].sequence() if "python_libraries" in job else []
    return {
        "python_file": file,
        "parameters": [_plain_text(parameter) for parameter in parameters],
        "python_libraries": [library.string(expected="a requirement for pip") for library in libraries],
    }


def _literal(command: str) -> str:
    """Return the format string that renders exactly this command."""
    return command.replace("{", "{{").replace("}", "}}")


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
