"""Finds an interpreter of the version that a project asks for."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio import to_thread
from packaging.version import InvalidVersion, Version

from mlfleet._environments.env_files import matches
from mlfleet._process.process import run_process

__all__ = ["Interpreter", "current", "find", "installed", "probe"]

_PROBE = "import platform, sys; print(platform.python_version()); print(sys.executable)"
_PROBE_TIMEOUT = 20.0
_NAME = re.compile(r"python(3(\.\d+)?)?")


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python that runs.

    Attributes:
        path: The path of the program.
        version: The version, such as ``3.11.7``.
    """

    path: Path
    version: str


def current() -> Interpreter:
    """Return the interpreter of this process."""
    return Interpreter(Path(sys.executable), platform.python_version())


async def find(wanted: str | None) -> Interpreter | None:
    """Return the current interpreter if it has that version, else the newest one of pyenv, else the newest on PATH.

    Each candidate is run first: pyenv puts programs on PATH that only say that they are not installed.

    Args:
        wanted: A version or conditions, as `matches` takes them; None is the current interpreter.
    """
    if matches(platform.python_version(), wanted):
        return current()
    for candidates in (_in_pyenv, _on_path):
        found = [
            each for each in await _probe_all(await to_thread.run_sync(candidates)) if matches(each.version, wanted)
        ]
        if found:
            return max(found, key=lambda each: Version(each.version))
    return None


async def installed() -> list[str]:
    """Return the installed versions of Python, newest first; for error messages."""
    paths = await to_thread.run_sync(lambda: [*_in_pyenv(), *_on_path()])
    versions = {each.version for each in (current(), *await _probe_all(paths))}
    return sorted(versions, key=Version, reverse=True)


def _in_pyenv() -> list[Path]:
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    return [path for path in sorted(root.glob("versions/*/bin/python")) if _is_version(path.parent.parent.name)]


def _is_version(name: str) -> bool:
    try:
        return Version(name).major == 3
    except InvalidVersion:
        return False


def _on_path() -> list[Path]:
    found: dict[Path, None] = {}
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        with contextlib.suppress(OSError):
            names = sorted(os.listdir(folder)) if folder else []  # noqa: PTH208 - names are all that is needed
            programs = (Path(folder, name) for name in names if _NAME.fullmatch(name))
            found |= dict.fromkeys(program for program in programs if os.access(program, os.X_OK))
    return list(found)


async def _probe_all(paths: list[Path]) -> list[Interpreter]:
    found: list[Interpreter] = []

    async def probe_one(path: Path) -> None:
        async with slots:
            if (interpreter := await probe(path)) is not None:
                found.append(interpreter)

    slots = anyio.Semaphore(4)
    async with anyio.create_task_group() as tasks:
        for path in paths:
            tasks.start_soon(probe_one, path)
    return found


async def probe(path: Path) -> Interpreter | None:
    """Return the interpreter behind a program, which may be a script of pyenv; None if it does not run."""
    with anyio.move_on_after(_PROBE_TIMEOUT):
        try:
            completed = await run_process([str(path), "-I", "-S", "-c", _PROBE], cwd=Path("/"))
        except OSError:
            return None
        version, _, program = completed.stdout.decode("utf-8", "surrogateescape").strip().partition("\n")
        if completed.returncode == 0 and _is_version(version):
            return Interpreter(Path(program or path), version)
    return None
