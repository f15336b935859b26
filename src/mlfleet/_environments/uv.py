"""Virtual environments made and filled by uv."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyio import to_thread

from mlfleet._environments.builder import Build, BuildingManager, Built, venv_environment
from mlfleet._environments.env_files import PythonRequirements, content_key, read_python_requirements
from mlfleet._environments.interpreters import installed
from mlfleet._environments.manager import EnvironmentPlan, log_chosen
from mlfleet._environments.pip_requirements import content_of, failure
from mlfleet._environments.python_downloads import find_or_fetch, uv_program
from mlfleet._environments.python_downloads import hint as remedy
from mlfleet._environments.virtualenv import plan_python
from mlfleet._project.boundary import check_link, find_root, is_inside
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet._run_log import get_logger, warn_once
from mlfleet._store.private_folders import secure_environments
from mlfleet._text.documents import read_toml
from mlfleet.errors import EnvironmentSetupError, SpecError

__all__ = ["UvManager"]

_log = get_logger("mlfleet.environments")

LOCK = "uv.lock"


@dataclass(frozen=True, slots=True)
class Locked:
    """A project with a ``uv.lock``.

    Attributes:
        contents: The hashes of what the environment depends on.
        python: The version or conditions that the project asks for.
    """

    contents: tuple[str, ...]
    python: str | None


class UvManager(BuildingManager):
    """Makes a virtual environment and installs with uv.

    A project with a ``uv.lock`` gets exactly what that holds (``uv sync --frozen --no-dev``), and the lists of its
    ``python_env.yaml`` do not count. The interpreter is found as by the virtualenv manager; if there is none of that
    version, uv downloads one, if its settings allow that, or pyenv builds one.
    """

    name = "uv"

    def plan(self, project_dir: Path, source: EnvironmentFile | None) -> EnvironmentPlan:
        """See `EnvironmentManager.plan`."""
        secure_environments(self._store.root)
        _program()
        root = (source.root if source else None) or find_root(project_dir)
        _check_settings(project_dir, root)
        if (project_dir / LOCK).is_file():
            return self._plan_locked(project_dir, source, root)
        return plan_python(self.name, project_dir, source)

    def _plan_locked(self, project_dir: Path, source: EnvironmentFile | None, root: Path) -> EnvironmentPlan:
        needs = read_python_requirements(project_dir, source)
        if source is not None and source.kind is EnvironmentFileKind.UV_LOCK:
            log_chosen(source.path)
        elif source is not None and (needs.build or needs.packages):
            text = "%s: only its Python counts, since the project has a %s for uv"
            warn_once(_log, text, source.path, LOCK)
        locked = _read_lock(project_dir, root)
        is_own = source is not None and source.kind.is_declared
        python = (needs.python if is_own else None) or locked.python
        return EnvironmentPlan(
            manager=self.name,
            key=content_key(self.name, "locked", python, locked.contents),
            project_dir=project_dir,
            source=source,
            python=python,
            details=locked,
        )

    async def build(self, plan: EnvironmentPlan, build: Build) -> Built:
        """See `BuildingManager.build`."""
        uv = await to_thread.run_sync(_program)
        environ = build.environ()
        interpreter = await find_or_fetch(build, plan.python, self._store.lock_path("python"))
        if interpreter is None and not {"UV_PYTHON_PREFERENCE", "UV_NO_MANAGED_PYTHON"} & environ.keys():
            # What PATH has does not fit, and uv stumbles over programs of pyenv there that do not run.
            environ["UV_PYTHON_PREFERENCE"] = "only-managed"
        python = str(interpreter.path) if interpreter else plan.python or "3"
        if isinstance(plan.details, Locked):
            environ["UV_PROJECT_ENVIRONMENT"] = str(build.target)
            await self._run(plan, build, [uv, "sync", "--frozen", "--no-dev", "--python", python], environ)
        else:
            needs: PythonRequirements = plan.details
            await self._run(plan, build, [uv, "venv", "--no-project", "--python", python, str(build.target)], environ)
            environ = venv_environment(self.name, build.target).apply(environ)
            install = (uv, "pip", "install", "--python", str(build.target / "bin" / "python"))
            await build.install(install, needs.build, environ)
            await build.install(install, needs.packages, environ)
        return Built(interpreter.version if interpreter else plan.python, ("bin/python",))

    async def _run(self, plan: EnvironmentPlan, build: Build, argv: list[str], environ: dict[str, str]) -> None:
        """Run the command that needs an interpreter; if it fails because there is none, list the installed ones."""
        completed = await build.run(argv, environ, check=False)
        if completed.returncode == 0:
            return
        hint = None
        if b"No interpreter found" in completed.stdout or b"downloads are" in completed.stdout:
            hint = f"there is no Python {plan.python} here, only {', '.join(await installed())}; {remedy(plan.python)}"
        raise build.failure(f"`{' '.join(argv[:2])}` ended with exit code {completed.returncode}", hint=hint)


def _program() -> str:
    """Return the program; see `uv_program`."""
    if found := uv_program():
        return found
    raise EnvironmentSetupError(
        "uv is not installed: `pip install uv`, or use the environment manager virtualenv "
        "(which does not read uv.lock)",
        manager="uv",
    )


def _check_settings(folder: Path, root: Path) -> None:
    """Refuse links to elsewhere where uv looks for its settings, since it quotes the lines that it cannot read."""
    real = Path(os.path.realpath(folder))
    for parent in (real, *real.parents):
        if parent.is_relative_to(os.path.realpath(root)):
            for name in ("uv.toml", "pyproject.toml", ".python-version", ".python-versions"):
                check_link(parent / name, root)


def _read_lock(folder: Path, root: Path) -> Locked:
    project_path, lock_path = folder / "pyproject.toml", folder / LOCK
    if not project_path.is_file():
        raise SpecError("there is no pyproject.toml beside it, which uv needs", path=lock_path)
    check_link(lock_path, root)
    read_toml(project_path)
    lock = read_toml(lock_path)
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (project_path, lock_path)]
    sources = map(_local_source, _tables(lock.get("package")))
    local = [source for source in sources if source is not None]
    for path, editable in local:
        if not is_inside(folder / path, root):
            failure(lock_path)(f"the package at {path!r} is outside of the project's repository {root}: copy it there")
        contents.append(content_of(folder / path, editable, failure(lock_path)))
    if local:
        # What is installed are paths into this very folder, or copies of what it holds.
        contents.append(str(folder))
    return Locked(tuple(contents), _python(folder, lock))


def _local_source(package: dict[str, Any]) -> tuple[str, bool] | None:
    """Return the path that a locked package is installed from, and if it is editable; None if it is not local."""
    source = package.get("source")
    if not isinstance(source, dict):
        return None
    for kind in ("editable", "directory", "path"):
        if isinstance(path := source.get(kind), str):
            return path, kind == "editable"
    return None


def _python(folder: Path, lock: dict[str, Any]) -> str | None:
    """Return the version that uv itself would look for."""
    try:
        pinned = (folder / ".python-version").read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        pinned = []
    if pinned and pinned[0][:1].isdigit():
        return pinned[0]
    required = lock.get("requires-python")
    return required if isinstance(required, str) else None


def _tables(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
