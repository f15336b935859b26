"""Fetches an interpreter that a project asks for and this machine does not have, by uv or else by pyenv."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from anyio import to_thread
from packaging.version import InvalidVersion, Version

from mlfleet._environments.builder import Build
from mlfleet._environments.env_files import matches
from mlfleet._environments.interpreters import Interpreter, find, probe
from mlfleet._process.process import run_process
from mlfleet._store.locks import file_lock

__all__ = ["find_or_fetch", "hint", "uv_program"]

_FORBIDS_DOWNLOADS = {
    "UV_PYTHON_DOWNLOADS": ("never", "manual", "false"),
    "UV_PYTHON_PREFERENCE": ("system", "only-system"),
    "UV_NO_MANAGED_PYTHON": ("1", "true"),
}


async def find_or_fetch(build: Build, wanted: str | None, lock: Path) -> Interpreter | None:
    """Return what `find` finds, else an interpreter downloaded by uv or built by pyenv; None if neither can do it.

    Where both are there, uv comes first: it takes seconds, and pyenv compiles for minutes.

    Args:
        build: The build that needs it; the output of the commands goes there.
        wanted: A version or conditions, as `matches` takes them; None is the current interpreter.
        lock: The lock file to hold meanwhile: neither program bears two installations of one version at once.

    Raises:
        EnvironmentSetupError: A command cannot be started.
    """
    if (found := await find(wanted)) is not None or wanted is None:
        return found
    async with file_lock(lock):
        # Another build may have fetched it while this one waited.
        return await find(wanted) or await _by_uv(build, wanted) or await _by_pyenv(build, wanted)


def hint(wanted: str | None) -> str:
    """Return what to do where there is no such interpreter, for an error."""
    return (
        f"uv (`pip install uv`) and pyenv (`pyenv install {wanted}`) can fetch a Python, and mlfleet has them do it "
        "where they are installed and allowed to; or ask for another version"
    )


def uv_program() -> str | None:
    """Return the uv on PATH, else that of the package ``uv``; None if there is none. Blocking."""
    if found := shutil.which("uv"):
        return found
    try:
        import uv

        return os.fspath(uv.find_uv_bin())
    except (ImportError, FileNotFoundError):
        return None


async def _by_uv(build: Build, wanted: str) -> Interpreter | None:
    uv = await to_thread.run_sync(uv_program)
    environ = build.environ()
    if uv is None or any(environ.get(name, "").lower() in values for name, values in _FORBIDS_DOWNLOADS.items()):
        return None
    # Beside uv's others, not on the user's PATH.
    environ |= {"UV_PYTHON_PREFERENCE": "only-managed", "UV_PYTHON_INSTALL_BIN": "0"}
    if (await build.run([uv, "python", "install", wanted], environ, check=False)).returncode:
        return None
    # Not where the project is, whose files may ask for another version.
    found = await build.run([uv, "python", "find", "--no-project", wanted], environ, check=False)
    path = found.stdout.decode("utf-8", "surrogateescape").strip().rpartition("\n")[2]
    return None if found.returncode else await _probed(Path(path), wanted)


async def _by_pyenv(build: Build, wanted: str) -> Interpreter | None:
    pyenv = await to_thread.run_sync(_pyenv_program)
    if pyenv is None:
        return None
    environ = build.environ()
    version = wanted
    if not re.fullmatch(r"\d+\.\d+\.\d+", wanted):
        listed = await run_process([pyenv, "install", "--list"], cwd=Path("/"), env=environ)
        version = _newest(listed.stdout.decode("utf-8", "replace"), wanted)
    if not version:
        return None
    if (await build.run([pyenv, "install", "--skip-existing", version], environ, check=False)).returncode:
        return None
    root = await run_process([pyenv, "root"], cwd=Path("/"), env=environ)
    folder = Path(root.stdout.decode("utf-8", "surrogateescape").strip())
    return await _probed(folder / "versions" / version / "bin" / "python", wanted)


async def _probed(path: Path, wanted: str) -> Interpreter | None:
    interpreter = await probe(path)
    return interpreter if interpreter is not None and matches(interpreter.version, wanted) else None


def _pyenv_program() -> str | None:
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    return shutil.which("pyenv") or shutil.which("pyenv", path=str(root / "bin"))


def _newest(listed: str, wanted: str) -> str:
    """Return the newest release in pyenv's list that was asked for; empty if there is none."""
    releases = []
    for line in listed.splitlines():
        try:
            version = Version(line.strip())
        except InvalidVersion:  # pypy3.10-7.3.12, miniconda3-latest, …
            continue
        if version.major == 3 and not version.is_prerelease and matches(str(version), wanted):
            releases.append(version)
    return str(max(releases)) if releases else ""
