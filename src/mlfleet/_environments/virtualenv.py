"""Virtual environments made by virtualenv or venv, filled by pip."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from anyio import to_thread

from mlfleet._environments.builder import (
    Build,
    BuildingManager,
    Built,
    pip_install,
    venv_environment,
)
from mlfleet._environments.env_files import PythonRequirements, content_key, read_python_requirements
from mlfleet._environments.interpreters import installed
from mlfleet._environments.manager import EnvironmentPlan, log_chosen
from mlfleet._environments.python_downloads import find_or_fetch, hint
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet._store.private_folders import secure_environments

__all__ = ["VirtualenvManager", "plan_python"]


class VirtualenvManager(BuildingManager):
    """Finds an interpreter of the version, makes a virtual environment and installs with pip.

    The interpreter is the current one if its version fits, else the newest of pyenv's that fits, else one on PATH, else
    one that uv or pyenv fetches.
    """

    name = "virtualenv"

    def plan(self, project_dir: Path, source: EnvironmentFile | None) -> EnvironmentPlan:
        """See `EnvironmentManager.plan`."""
        secure_environments(self._store.root)
        return plan_python(self.name, project_dir, source)

    async def build(self, plan: EnvironmentPlan, build: Build) -> Built:
        """See `BuildingManager.build`."""
        interpreter = await find_or_fetch(build, plan.python, self._store.lock_path("python"))
        if interpreter is None:
            raise build.failure(
                f"there is no Python {plan.python} here, only {', '.join(await installed())}", hint=hint(plan.python)
            )
        await _create(build, interpreter.path)
        needs: PythonRequirements = plan.details
        environ = venv_environment(self.name, build.target).apply(build.environ())
        pip = pip_install(build.target)
        await build.install(pip, needs.build, environ)
        await build.install(pip, needs.packages, environ)
        return Built(interpreter.version, ("bin/python",))


def plan_python(manager: str, project_dir: Path, source: EnvironmentFile | None) -> EnvironmentPlan:
    """Return the plan for an environment that pip or uv fills; its details are `PythonRequirements`.

    Args:
        manager: The name of the manager.
        project_dir: The folder of the project.
        source: The file that lists what the project needs.
    """
    needs = read_python_requirements(project_dir, source)
    if source is not None and source.kind is EnvironmentFileKind.UV_LOCK:
        source = replace(source, kind=EnvironmentFileKind.PYPROJECT, path=source.path.with_name("pyproject.toml"))
    if source is not None and not source.kind.is_declared:
        log_chosen(source.path)
    key = content_key(
        manager,
        needs.python or platform.python_version(),
        *((each.lines, each.contents) for each in (needs.build, needs.packages)),
    )
    return EnvironmentPlan(
        manager=manager,
        key=key,
        project_dir=project_dir,
        source=source,
        python=needs.python,
        details=needs,
    )


async def _create(build: Build, python: Path) -> None:
    """Create the virtual environment: by virtualenv, which is faster and needs no ensurepip, else by venv.

    virtualenv's current versions cannot make environments of every old Python; venv is part of each.
    """
    venv = [str(python), "-I", "-m", "venv", str(build.target)]
    if virtualenv := await to_thread.run_sync(_virtualenv):
        argv = [*virtualenv, "--python", str(python), str(build.target)]
        completed = await build.run(argv, build.environ(own=True), check=False)
        if completed.returncode == 0:
            return
        venv.append("--clear")
    await build.run(venv, build.environ())


def _virtualenv() -> tuple[str, ...]:
    options = ("--quiet", "--no-periodic-update")
    if importlib.util.find_spec("virtualenv") is not None:
        return (sys.executable, "-P", "-m", "virtualenv", *options)
    program = shutil.which("virtualenv")
    return (program, *options) if program else ()
