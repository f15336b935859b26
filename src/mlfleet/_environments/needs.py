"""What the files of a project ask for: ``python_env.yaml`` and ``conda.yaml``. Reading them blocks."""

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

from mlfleet._environments.requirements import PipInput, Reader
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet._text.documents import Node, read_yaml

__all__ = ["CondaNeeds", "PythonNeeds", "content_key", "matches", "read_conda_needs", "read_python_needs"]

_log = logging.getLogger("mlfleet.environments")

# Environments that another version of this layout built are not this one's.
_FORMAT = 1
_PREFIX_VERSION = re.compile(r"\d+(\.\d+){0,2}")
_CONDA_SPEC = re.compile(
    r"^(?:(?P<channel>[^\s]+)::)?(?P<name>[A-Za-z0-9_.-]+?)(?:\[.*\])?\s*(?P<version>(?:[=<>!~]|\s)[^\s]*)?(?:\s+[^\s]+)?$"
)
_BUILD_PACKAGES = ("pip", "setuptools", "wheel")


@dataclass(frozen=True, slots=True)
class PythonNeeds:
    """What an environment of pip packages needs.

    Attributes:
        python: a version (``3``, ``3.11``, ``3.11.7``) or conditions (``>=3.9,<3.12``); None: the current one.
        build: is installed first.
        packages: is installed then.
    """

    python: str | None = None
    build: PipInput = field(default_factory=PipInput)
    packages: PipInput = field(default_factory=PipInput)


@dataclass(frozen=True, slots=True)
class CondaNeeds:
    """What an environment of conda packages needs. ``name`` and ``prefix`` of the file do not matter here.

    Attributes:
        channels: in their order.
        specs: of conda packages.
        packages: what pip installs after them.
        variables: to set in the environment.
    """

    channels: tuple[str, ...] = ()
    specs: tuple[str, ...] = ()
    packages: PipInput = field(default_factory=PipInput)
    variables: tuple[tuple[str, str], ...] = ()


def read_python_needs(folder: Path, source: EnvironmentFile | None) -> PythonNeeds:
    """What an environment of pip packages must hold for the project in `folder`.

    Of a ``conda.yaml``, Python, pip, setuptools, wheel and the ``pip:`` list count; other packages are one warning.

    Raises:
        SpecError: the file is wrong, or names one that is not there.
    """
    if source is None:
        return PythonNeeds()
    if source.kind is EnvironmentFileKind.CONDA:
        return _from_conda(source.path)
    document = read_yaml(source.path).mapping(
        ("python", "build_dependencies", "dependencies"), expected="a mapping with python and dependencies"
    )
    python = document.get("python")
    return PythonNeeds(
        python=_python_version(python) if python is not None and not python.is_null else None,
        build=Reader(folder).read(_items(document, "build_dependencies")),
        packages=Reader(folder).read(_items(document, "dependencies")),
    )


def read_conda_needs(path: Path) -> CondaNeeds:
    """What ``conda.yaml`` asks for. Paths in its ``pip:`` list are relative to its folder, as conda has it.

    Raises:
        SpecError: the file is wrong, or names one that is not there.
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
    return CondaNeeds(
        channels=tuple(node.string(expected="a channel") for node in _items(document, "channels")),
        specs=tuple(specs),
        packages=Reader(path.parent).read(pip),
        variables=tuple((name, node.text(expected="the value of a variable")) for name, node in variables.items()),
    )


def matches(version: str, wanted: str | None) -> bool:
    """Whether a Python of that version is what was asked for."""
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
    """The key of an environment: a hash of all that it depends on, and of the machine's kind.

    Args:
        manager: its name.
        parts: strings, and sequences and pairs of them.
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
    """The version that is asked for; ``3.10`` may stand without quotes."""
    text = node.text(expected="a version of Python").strip().removeprefix("python").strip()
    text = text.removesuffix(".*") if text[:1].isdigit() else text
    if _PREFIX_VERSION.fullmatch(text):
        return text
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        node.fail(f"{text!r} is no version of Python: write one like 3.11 or 3.11.7, or conditions like '>=3.10,<3.13'")
    return text


def _from_conda(path: Path) -> PythonNeeds:
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
    return PythonNeeds(python, PipInput(lines=tuple(build)), Reader(path.parent).read(pip))


def _split_conda_spec(node: Node) -> tuple[str, str]:
    """The name and the version of a conda package: ``channel::name=version=build`` or ``name version build``."""
    spec = node.text(expected="a conda package").strip()
    match = _CONDA_SPEC.match(spec)
    if match is None:
        node.fail(f"{spec!r} is no conda package")
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
    """A conda version as pip takes it: ``=24.0=build`` is ``==24.0.*``."""
    if match := re.match(r"^=(?P<version>[^=,|]+)(=.*)?$", version):
        return f"=={match['version'].removesuffix('.*').removesuffix('*')}.*"
    if version[:1].isdigit():
        return f"=={version.split('=')[0]}"
    return version


@functools.lru_cache(maxsize=256)
def _warn_ignored(path: Path, names: tuple[str, ...]) -> None:
    """Once for a file, not once for each of a thousand runs."""
    _log.warning(
        "%s: these conda packages are not installed, since the environment is made by pip: %s; "
        "use --env-manager conda to have them",
        path,
        ", ".join(names),
    )
