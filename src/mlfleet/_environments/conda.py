"""Conda environments, built by conda, mamba or micromamba, or by py-rattler where none of these is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from anyio import to_thread

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._environments.builder import Build, BuildingManager, Built, pip_install
from mlfleet._environments.env_files import CondaRequirements, content_key, read_conda_file
from mlfleet._environments.manager import EnvironmentPlan, PreparedEnvironment
from mlfleet._paths import cache_folder
from mlfleet._process.inherit import inherited
from mlfleet._process.process import run_process
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet._store.locks import file_lock
from mlfleet._store.private_folders import secure_cache, secure_environments
from mlfleet.errors import EnvironmentSetupError

__all__ = ["CondaManager", "conda_program"]


_SCRIPT = 'for script in "$@"; do . "$script" || exit; done 1>&2; exec env -0'
# Variables that bash sets for itself.
_OF_BASH = {"_", "SHLVL", "PWD", "OLDPWD"}


class CondaManager(BuildingManager):
    """Builds what ``conda.yaml`` lists; pip then installs its ``pip:`` list.

    The program is the one of ``MLFLOW_CONDA_CREATE_ENV_CMD``, looked for in ``MLFLOW_CONDA_HOME`` first; else conda,
    mamba or micromamba by ``CONDA_EXE``, ``MAMBA_EXE`` or PATH; else py-rattler, from the extra ``mlfleet[conda]``.
    """

    name = "conda"

    def __init__(self, root: Path | None = None) -> None:
        super().__init__(root)
        self._activating: SingleFlight[object, PreparedEnvironment] = SingleFlight()
        self._activated: dict[Path, tuple[object, PreparedEnvironment]] = {}

    def plan(self, project_dir: Path, source: EnvironmentFile | None) -> EnvironmentPlan:
        """See `EnvironmentManager.plan`."""
        secure_environments(self._store.root)
        if source is None or source.kind is not EnvironmentFileKind.CONDA:
            raise EnvironmentSetupError(f"the project in {project_dir} has no conda.yaml", manager=self.name)
        if conda_program() is None and importlib.util.find_spec("rattler") is None:
            raise EnvironmentSetupError(
                "no conda, mamba or micromamba was found: `pip install 'mlfleet[conda]'` serves conda projects "
                "without them; or set MLFLOW_CONDA_HOME to the folder of your conda",
                manager=self.name,
            )
        needs = _with_pip(read_conda_file(source.path, source.root))
        packages = needs.packages
        return EnvironmentPlan(
            manager=self.name,
            key=content_key(self.name, needs.channels, needs.specs, packages.lines, packages.contents),
            project_dir=project_dir,
            source=source,
            python=next((spec for spec in needs.specs if _is(spec, "python")), None),
            details=needs,
        )

    async def build(self, plan: EnvironmentPlan, build: Build) -> Built:
        """See `BuildingManager.build`."""
        needs: CondaRequirements = plan.details
        program = await to_thread.run_sync(conda_program)
        if program is not None:
            # conda's package cache does not bear two at once: https://github.com/conda/conda/issues/8870
            async with file_lock(self._store.lock_path("conda")):
                await _by_program(program, build, needs)
        else:
            await _by_rattler(build, needs)
        if needs.packages:
            environ = build.environ()
            environ = (await _activate_prefix(build.target, {}, environ)).apply(environ)
            await build.install(pip_install(build.target), needs.packages, environ)
        return await to_thread.run_sync(_describe, build.target)

    async def enter(self, plan: EnvironmentPlan, root: Path) -> PreparedEnvironment:
        """Activate the environment, once for all runs, unless the variables change that scripts may read."""
        variables, inherit_env = plan.details.variables, plan.inherit_env
        return await self._activating(
            (root, variables, inherit_env), lambda: self._activate(root, variables, inherited(inherit_env))
        )

    async def _activate(
        self, root: Path, variables: tuple[tuple[str, str], ...], environ: Mapping[str, str]
    ) -> PreparedEnvironment:
        before = (variables, environ)
        known = self._activated.get(root)
        if known is None or known[0] != before:
            known = self._activated[root] = (before, await _activate_prefix(root, dict(variables), environ))
        return known[1]


def conda_program() -> str | None:
    """Return the program that creates conda environments; None if there is none. Blocking (looks through PATH).

    Raises:
        EnvironmentSetupError: A variable names a program that does not exist.
    """
    asked = os.environ.get("MLFLOW_CONDA_CREATE_ENV_CMD")
    home = os.environ.get("MLFLOW_CONDA_HOME")
    if home:
        path = Path(home, "bin", asked or "conda")
        if not os.access(path, os.X_OK):
            raise EnvironmentSetupError(f"MLFLOW_CONDA_HOME is {home}, but there is no {path}", manager="conda")
        return str(path)
    beside = [os.environ[name] for name in ("CONDA_EXE", "MAMBA_EXE") if os.environ.get(name)]
    if asked:
        folders = [*(str(Path(each).parent) for each in beside), os.environ.get("PATH", os.defpath)]
        if (found := shutil.which(asked, path=os.pathsep.join(folders))) is None:
            raise EnvironmentSetupError(
                f"MLFLOW_CONDA_CREATE_ENV_CMD is {asked!r}, which is not on PATH", manager="conda"
            )
        return found
    candidates = (*beside, "conda", "mamba", "micromamba")
    return next(filter(None, map(shutil.which, candidates)), None)


def _with_pip(needs: CondaRequirements) -> CondaRequirements:
    """Add pip where there is a list for it, if the project does not name it."""
    if not needs.packages or any(_is(spec, "pip") for spec in needs.specs):
        return needs
    return replace(needs, specs=(*needs.specs, "pip"))


def _is(spec: str, name: str) -> bool:
    """Return True if a conda spec names that package."""
    rest = spec.rpartition("::")[2].removeprefix(name)
    return spec.rpartition("::")[2].startswith(name) and rest[:1] in ("", "=", "<", ">", "!", "~", " ", "[")


async def _by_program(program: str, build: Build, needs: CondaRequirements) -> None:
    create = ("create", "--yes") if "micromamba" in Path(program).name else ("env", "create", "--quiet")
    environ = build.environ() | {"CONDA_ALWAYS_YES": "true", "MAMBA_ALWAYS_YES": "true"}
    # An active environment of the caller must not count.
    for name in ("CONDA_PREFIX", "CONDA_DEFAULT_ENV", "CONDA_SHLVL"):
        environ.pop(name, None)
    # JSON is YAML; a file, since URLs of channels may hold tokens.
    text = json.dumps({"channels": needs.channels, "dependencies": needs.specs})
    async with build.listing(".yml", text) as path:
        await build.run([program, *create, "--prefix", str(build.target), "--file", str(path)], environ)


async def _by_rattler(build: Build, needs: CondaRequirements) -> None:
    # In a process of its own: it can be ended at any moment, and nothing of it goes on writing.
    await to_thread.run_sync(secure_cache)  # packages are kept there
    request = {
        "prefix": str(build.target),
        "channels": needs.channels,
        "specs": needs.specs,
        "cache": str(cache_folder() / "conda"),  # for packages and the indexes of channels
    }
    # By its path, without mlfleet; -P, since the project's folder may hold files that are named like modules.
    program = Path(__file__).with_name("rattler.py")
    async with build.listing(".request.json", json.dumps(request)) as path:
        await build.run([sys.executable, "-P", str(program), str(path)], build.environ(own=True))


def _describe(prefix: Path) -> Built:
    """Return the Python of a conda prefix, which need not have one."""
    versions = [path.name.split("-")[1] for path in (prefix / "conda-meta").glob("python-[0-9]*.json")]
    must_exist = ("conda-meta", *(("bin/python",) if versions else ()))
    return Built(versions[0] if versions else None, must_exist)


async def _activate_prefix(root: Path, variables: Mapping[str, str], environ: Mapping[str, str]) -> PreparedEnvironment:
    """Return the environment at `root`, activated on top of the variables that a command inherits.

    The steps are those of conda's own activator: a few variables, ``bin`` before PATH, the variables of the
    environment, and the scripts that packages put into ``etc/conda/activate.d``. They are done once, so that no run
    needs ``conda run`` or ``conda activate``.
    https://docs.conda.io/projects/conda/en/stable/dev-guide/deep-dives/activation.html

    Args:
        root: A conda prefix.
        variables: More variables to set, which win over those that its packages set.
        environ: The variables that a command inherits.

    Raises:
        EnvironmentSetupError: An activation script fails.
    """
    packages, scripts = await to_thread.run_sync(_read_packages, root)
    basic = PreparedEnvironment(
        "conda",
        root,
        path=(str(root / "bin"),),
        environ={
            **packages,
            **variables,
            "CONDA_PREFIX": str(root),
            "CONDA_DEFAULT_ENV": str(root),
            "CONDA_SHLVL": "1",
            "CONDA_PROMPT_MODIFIER": f"({root}) ",
            "PYTHONHOME": None,
            "VIRTUAL_ENV": None,
        },
    )
    return await _run_scripts(basic, scripts, environ) if scripts else basic


def _read_packages(root: Path) -> tuple[dict[str, str], list[Path]]:
    """Return the variables and the scripts that packages bring."""
    variables: dict[str, str] = {}
    for path in sorted((root / "etc" / "conda" / "env_vars.d").glob("*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EnvironmentSetupError(f"{path} cannot be read: {error}", manager="conda") from error
        variables |= {str(name): str(value) for name, value in raw.items()}
    return variables, sorted((root / "etc" / "conda" / "activate.d").glob("*.sh"))


async def _run_scripts(
    basic: PreparedEnvironment, scripts: list[Path], inherits: Mapping[str, str]
) -> PreparedEnvironment:
    """Run the scripts, and add the variables that they changed."""
    before = basic.apply(inherits)
    completed = await run_process(["bash", "-c", _SCRIPT, "activate", *map(str, scripts)], cwd=basic.root, env=before)
    if completed.returncode != 0:
        output = tuple(completed.stderr.decode("utf-8", "replace").splitlines()[-20:])
        raise EnvironmentSetupError(
            "\n  ".join((f"a script in {scripts[0].parent} failed with exit code {completed.returncode}", *output)),
            manager="conda",
            output=output,
        )
    entries = (entry.partition("=") for entry in os.fsdecode(completed.stdout).split("\0") if entry)
    after = {name: value for name, _, value in entries}
    environ = dict(basic.environ)
    for name in (before.keys() | after.keys()) - _OF_BASH - {"PATH"}:
        if before.get(name) != after.get(name):
            environ[name] = after.get(name)
    caller, path = inherits.get("PATH", ""), after.get("PATH", "")
    if path.endswith(f":{caller}"):
        folders = path.removesuffix(f":{caller}").split(":")
        return PreparedEnvironment(basic.manager, basic.root, tuple(folders), environ)
    return PreparedEnvironment(basic.manager, basic.root, (), {**environ, "PATH": path})
