"""Reads the files that list what a project needs: ``python_env.yaml`` and ``conda.yaml``. Reading blocks."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from mlfleet._environments.pip_requirements import PipInput, Reader
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet._text.documents import Node, read_yaml

__all__ = [
    "CondaRequirements",
    "PythonRequirements",
    "content_key",
    "matches",
    "read_conda_file",
    "read_python_requirements",
]

_log = logging.getLogger("mlfleet.environments")

# Part of every key: raise it when environments must be built again.
_FORMAT = 1
_PREFIX_VERSION = re.compile(r"\d+(\.\d+){0,2}")
_CONDA_SPEC = re.compile(
    r"^(?:(?P<channel>[^\s]+)::)?(?P<name>[A-Za-z0-9_.-]+?)(?:\[.*\])?\s*(?P<version>(?:[=<>!~]|\s)[^\s]*)?(?:\s+[^\s]+)?$"
)
_CONDA_LONG_VERSION = re.compile(r"\[(?:.*,)?\s*version\s*=\s*(?P<quote>['\"]?)(?P<version>[^'\"\],]+)(?P=quote).*\]$")
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


def read_python_requirements(folder: Path, source: EnvironmentFile | None) -> PythonRequirements:
    """Read what an environment of pip packages must hold for the project in `folder`.

    Of a ``conda.yaml``, Python, pip, setuptools, wheel and the ``pip:`` list count; other packages are one warning.

    Raises:
        SpecError: The file is wrong, or names a file that does not exist.
    """
    if source is None:
        return PythonRequirements()
    if source.kind is EnvironmentFileKind.CONDA:
        return _from_conda(source.path)
    document = read_yaml(source.path).mapping(
        ("python", "build_dependencies", "dependencies"), expected="a mapping with python and dependencies"
    )
    python = document.get("python")
    return PythonRequirements(
        python=_python_version(python) if python is not None and not python.is_null else None,
        build=Reader(folder).read(_items(document, "build_dependencies")),
        packages=Reader(folder).read(_items(document, "dependencies")),
    )


def read_conda_file(path: Path) -> CondaRequirements:
    """Read a ``conda.yaml``. Paths in its ``pip:`` list are relative to its folder, as conda has it.

    Raises:
        SpecError: The file is wrong, or names a file that does not exist.
    """
    document = read_yaml(path).mapping(
        ("name", "channels", "dependencies", "prefix", "variables", "platforms"),
        expected="a mapping with channels and dependencies",
    )
    specs: list[str] = []
    pip: list[Node] = []
    for node in _items(document, "dependencies"):
        if isinstance(node.value, dict):
            pip += _pip_list(node)
        elif spec := node.text(expected="a conda package").strip():
            specs.append(spec)
    variables = document["variables"].mapping() if "variables" in document else {}
    return CondaRequirements(
        channels=tuple(node.string(expected="a channel") for node in _items(document, "channels")),
        specs=tuple(specs),
        packages=Reader(path.parent).read(pip),
        variables=tuple((name, node.text(expected="the value of a variable")) for name, node in variables.items()),
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


def _items(document: dict[str, Node], key: str) -> list[Node]:
    return document[key].sequence() if key in document else []


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


def _from_conda(path: Path) -> PythonRequirements:
    document = read_yaml(path).mapping(expected="a mapping with channels and dependencies")
    python: str | None = None
    build: list[str] = []
    pip: list[Node] = []
    others: list[str] = []
    for node in _items(document, "dependencies"):
        if isinstance(node.value, dict):
            pip += _pip_list(node)
            continue
        name, version = _split_conda_spec(node)
        if name == "python":
            python = _conda_python(node, version)
        elif name in _BUILD_PACKAGES:
            build.append(name + _pip_condition(version))
        else:
            others.append(name)
    if others:
        _warn_ignored(path, tuple(others))
    return PythonRequirements(python, PipInput(lines=tuple(build)), Reader(path.parent).read(pip))


def _split_conda_spec(node: Node) -> tuple[str, str]:
    """Return name and version of a conda package: ``channel::name=version=build`` or ``name version build``."""
    spec = node.text(expected="a conda package").strip()
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


@functools.lru_cache(maxsize=256)
def _warn_ignored(path: Path, names: tuple[str, ...]) -> None:
    """Warn once for a file, not once for each of a thousand runs."""
    _log.warning(
        "%s: these conda packages are not installed, since the environment is made by pip: %s; "
        "use --env-manager conda to have them",
        path,
        ", ".join(names),
    )
