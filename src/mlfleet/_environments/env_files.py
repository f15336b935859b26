"""Reads the files that list what a project needs: ``python_env.yaml``, ``conda.yaml`` and others. Reading blocks."""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from mlfleet._environments.pip_requirements import PipInput, Reader
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet._run_log import get_logger, warn_once
from mlfleet._text.documents import Node, Report, find_toml_line, read_toml, read_yaml, warn_unknown
from mlfleet.errors import SpecError

__all__ = [
    "CondaRequirements",
    "PythonRequirements",
    "content_key",
    "matches",
    "read_conda_file",
    "read_python_requirements",
]

_log = get_logger("mlfleet.environments")

# Part of every key: raise it when environments must be built again.
_FORMAT = 1
_PREFIX_VERSION = re.compile(r"\d+(\.\d+){0,2}")
_CONDA_SPEC = re.compile(
    r"^(?:(?P<channel>[^\s]+)::)?(?P<name>[A-Za-z0-9_.-]+?)(?:\[.*\])?\s*(?P<version>(?:[=<>!~]|\s)[^\s]*)?(?:\s+[^\s]+)?$"
)
_CONDA_LONG_VERSION = re.compile(r"\[(?:.*,)?\s*version\s*=\s*(?P<quote>['\"]?)(?P<version>[^'\"\],]+)(?P=quote).*\]$")
_CONDA_KEYS = ("name", "channels", "dependencies", "prefix", "variables", "platforms")
_BUILD_PACKAGES = ("pip", "setuptools", "wheel")


@dataclass(frozen=True, slots=True)
class PythonRequirements:
    """The contents of an environment of pip packages.

    Attributes:
        python: A version (``3``, ``3.11``, ``3.11.7``) or conditions (``>=3.9,<3.12``); None: the current one.
        build: The packages that are installed first.
        packages: The packages that are installed then.
    """

    python: str | None = None
    build: PipInput = field(default_factory=PipInput)
    packages: PipInput = field(default_factory=PipInput)


@dataclass(frozen=True, slots=True)
class CondaRequirements:
    """The contents of an environment of conda packages. ``name`` and ``prefix`` of the file do not count.

    Attributes:
        channels: The channels, in their order.
        specs: The conda packages.
        packages: The packages that pip installs after them.
        variables: The variables to set in the environment.
    """

    channels: tuple[str, ...] = ()
    specs: tuple[str, ...] = ()
    packages: PipInput = field(default_factory=PipInput)
    variables: tuple[tuple[str, str], ...] = ()


def read_python_requirements(
    folder: Path, source: EnvironmentFile | None, report: Report | None = None
) -> PythonRequirements:
    """Read what an environment of pip packages must hold for the project in `folder`.

    Of a ``conda.yaml``, Python, pip, setuptools, wheel and the ``pip:`` list count; other packages are one warning.
    Of a ``pyproject.toml``, ``requires-python`` and ``dependencies`` count; the project itself is not installed.

    Args:
        folder: The folder of the project.
        source: The file; None: nothing is needed.
        report: See `read_project`.

    Raises:
        SpecError: The file is wrong, or names a file that does not exist.
    """
    if source is None:
        return PythonRequirements()
    report = report or Report()
    if source.kind is EnvironmentFileKind.CONDA:
        return _from_conda(source, report)
    if source.kind is EnvironmentFileKind.REQUIREMENTS:
        return PythonRequirements(packages=Reader(folder, source.root, report).read_file(source.path))
    if not source.kind.is_declared:
        return _from_pyproject(source.path.with_name("pyproject.toml"), report)
    keys = ("python", "build_dependencies", "dependencies")
    document = _document(source.path, keys, "a mapping with python and dependencies", report)
    version = None
    with report.part():
        version = _python_version(document["python"]) if "python" in document else None
    return PythonRequirements(
        python=version,
        build=Reader(folder, source.root, report).read(_items(document, "build_dependencies", report)),
        packages=Reader(folder, source.root, report).read(_items(document, "dependencies", report)),
    )


def read_conda_file(path: Path, root: Path | None = None, report: Report | None = None) -> CondaRequirements:
    """Read a ``conda.yaml``. Paths in its ``pip:`` list are relative to its folder, as conda has it.

    Args:
        path: The file.
        root: The folder that the files it names must be in; None: the Git working tree of its folder, else its folder.
        report: See `read_project`.

    Raises:
        SpecError: The file is wrong, or names a file that does not exist or is elsewhere.
    """
    report = report or Report()
    document = _document(path, _CONDA_KEYS, "a mapping with channels and dependencies", report)
    packages, pip = _conda_dependencies(document, report)
    channels: list[str] = []
    variables: list[tuple[str, str]] = []
    with report.part():
        given = document["variables"].mapping(report=report) if "variables" in document else {}
        variables = [(name, node.text(expected="the value of a variable")) for name, node in given.items()]
    with report.part():
        channels = [node.string(expected="a channel") for node in _items(document, "channels", report)]
    return CondaRequirements(
        channels=tuple(channels),
        specs=tuple(spec for node in packages if (spec := node.text().strip())),
        packages=Reader(path.parent, root, report).read(pip),
        variables=tuple(variables),
    )


def matches(version: str, wanted: str | None) -> bool:
    """Return True if a Python of that version is what was asked for."""
    if wanted is None:
        return True
    if _PREFIX_VERSION.fullmatch(wanted):
        parts = wanted.split(".")
        return version.split(".")[: len(parts)] == parts
    try:
        return Version(version) in SpecifierSet(wanted, prereleases=True)
    except (InvalidVersion, InvalidSpecifier):
        return False


def content_key(manager: str, *parts: object) -> str:
    """Return the key of an environment: a hash of all that it depends on, and of the kind of machine.

    Args:
        manager: The name of the manager.
        parts: Strings, and sequences and pairs of strings.
    """
    text = json.dumps([_FORMAT, manager, sysconfig.get_platform(), parts], ensure_ascii=True)
    # 128 bits tell all environments apart; the folder's name is part of every script's first line, whose length is
    # limited to 127 bytes on older kernels.
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _document(
    path: Path, known: tuple[str, ...], expected: str, report: Report, *, warn: bool = True
) -> dict[str, Node]:
    """Return the keys of an environment file. The error for another kind of file has none of its content.

    Args:
        path: The file.
        known: The keys that have a meaning.
        expected: The noun phrase for the error.
        report: Gets the mistakes.
        warn: True to warn of other keys.
    """
    document = read_yaml(path, defer_duplicates=report.collects)
    is_another = isinstance(document.value, dict) and document.value and document.value.keys().isdisjoint(known)
    if is_another or isinstance(document.value, str):
        what = "other keys" if is_another else "a text"
        raise SpecError(f"expected {expected}, found {what}", path=path, line=document.line, column=document.column)
    keys = document.mapping(known if warn else None, expected=expected, report=report)
    warn_unknown(path, report)
    return keys


def _items(document: dict[str, Node], key: str, report: Report) -> list[Node]:
    found: list[Node] = []
    with report.part():
        if key in document:
            found += document[key].sequence()
    return found


def _conda_dependencies(document: dict[str, Node], report: Report) -> tuple[list[Node], list[Node]]:
    """Return the conda packages of a ``conda.yaml``, which are texts, and the items of its ``pip:`` lists."""
    packages: list[Node] = []
    pip: list[Node] = []
    for node in _items(document, "dependencies", report):
        with report.part():
            if isinstance(node.value, dict):
                pip += _pip_list(node)
            else:
                node.text(expected="a conda package")
                packages.append(node)
    return packages, pip


def _pip_list(node: Node) -> list[Node]:
    items = node.mapping()
    if list(items) != ["pip"]:
        node.fail(f"expected a package or `pip:` with a list, found a mapping with {', '.join(items) or 'nothing'}")
    return items["pip"].sequence(expected="a list of requirements for pip")


def _python_version(node: Node) -> str:
    """Return the version that is asked for; ``3.10`` may stand without quotes."""
    text = node.text(expected="a version of Python").strip().removeprefix("python").strip()
    text = text.removesuffix(".*") if text[:1].isdigit() else text
    if _PREFIX_VERSION.fullmatch(text):
        return text
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        node.fail(
            f"{text!r} is not a version of Python: write one like 3.11 or 3.11.7, or conditions like '>=3.10,<3.13'"
        )
    return text


def _from_conda(source: EnvironmentFile, report: Report) -> PythonRequirements:
    path = source.path
    document = _document(path, _CONDA_KEYS, "a mapping with channels and dependencies", report, warn=False)
    python: str | None = None
    build: list[str] = []
    others: list[str] = []
    packages, pip = _conda_dependencies(document, report)
    for node in packages:
        with report.part():
            name, version = _split_conda_spec(node)
            if name == "python":
                python = _conda_python(node, version)
            elif name in _BUILD_PACKAGES:
                build.append(name + _pip_condition(version))
            else:
                others.append(name)
    if others:
        text = "%s: these conda packages are not installed, since the environment is made by pip: %s; "
        warn_once(_log, f"{text}use --env-manager conda to have them", path, ", ".join(others))
    return PythonRequirements(python, PipInput(lines=tuple(build)), Reader(path.parent, source.root, report).read(pip))


def _from_pyproject(path: Path, report: Report) -> PythonRequirements:
    from packaging.requirements import InvalidRequirement, Requirement

    project = read_toml(path).get("project")
    if not isinstance(project, dict):
        return PythonRequirements()

    def add(key: str, text: str, error: object) -> None:
        line = find_toml_line(path, ("project", key))
        report.add(SpecError(f"project.{key} must be {text}: {error}", path=path, line=line))

    python = project.get("requires-python")
    dependencies = project.get("dependencies", [])
    if not isinstance(dependencies, list):
        add("dependencies", "a list of requirements", "it is not a list")
        dependencies = []
    lines: list[str] = []
    for each in dependencies:
        try:
            lines.append(str(Requirement(each)))
        except (InvalidRequirement, TypeError, AttributeError) as error:
            add("dependencies", "a list of requirements", error)
    try:
        if python is not None:
            SpecifierSet(python)
    except (InvalidSpecifier, TypeError, AttributeError) as error:
        add("requires-python", "conditions such as '>=3.10'", error)
    return PythonRequirements(python=python or None, packages=PipInput(lines=tuple(lines)))


def _split_conda_spec(node: Node) -> tuple[str, str]:
    """Return name and version of a conda package: ``channel::name=version=build`` or ``name version build``."""
    spec = node.text().strip()
    # The long form, as in "python[version='3.11.*']".
    spec = _CONDA_LONG_VERSION.sub(r" \g<version>", spec)
    match = _CONDA_SPEC.match(spec)
    if match is None:
        node.fail(f"{spec!r} is not a conda package")
    return match["name"].lower(), (match["version"] or "").strip()


def _conda_python(node: Node, version: str) -> str | None:
    version = re.sub(r"^(=?[^=<>!~,]+)=.*$", r"\1", version)
    version = re.sub(r"^={1,2}(?=\d)", "", version).removesuffix(".*").removesuffix("*")
    if not version:
        return None
    if _PREFIX_VERSION.fullmatch(version):
        return version
    try:
        SpecifierSet(version)
    except InvalidSpecifier:
        node.fail(f"cannot tell which Python {node.written!r} is: pin it, as in python=3.11")
    return version


def _pip_condition(version: str) -> str:
    """Return a conda version as pip takes it: ``=24.0=build`` is ``==24.0.*``."""
    if match := re.match(r"^=(?P<version>[^=,|]+)(=.*)?$", version):
        return f"=={match['version'].removesuffix('.*').removesuffix('*')}.*"
    if version[:1].isdigit():
        return f"=={version.split('=')[0]}"
    return version
