"""Conda environments, built by conda, mamba or micromamba, or by py-rattler where none of these is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from anyio import to_thread

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._environments.activation import activate
from mlfleet._environments.base import EnvironmentPlan, PreparedEnvironment
from mlfleet._environments.build import Build, clean_environ, pip_install
from mlfleet._environments.built import BuildingManager, Built
from mlfleet._environments.needs import CondaNeeds, content_key, read_conda_needs
from mlfleet._paths import cache_folder
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet._store.locks import file_lock
from mlfleet._text.masking import mask_uri
from mlfleet.errors import EnvironmentSetupError

__all__ = ["CondaManager", "RattlerRequest", "conda_program"]


@dataclass(frozen=True, slots=True)
class RattlerRequest:
    """What the process that runs py-rattler is to do.

    Attributes:
        prefix: where to build the environment.
        channels: in their order.
        specs: what must be in it.
        cache: for packages and channel indexes.
    """

    prefix: str
    channels: tuple[str, ...]
    specs: tuple[str, ...]
    cache: str


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
        if source is None or source.kind is not EnvironmentFileKind.CONDA:
            raise EnvironmentSetupError(f"the project in {project_dir} has no conda.yaml", manager=self.name)
        if conda_program() is None and importlib.util.find_spec("rattler") is None:
            raise EnvironmentSetupError(
                "no conda, mamba or micromamba was found: `pip install 'mlfleet[conda]'` serves conda projects "
                "without them; or set MLFLOW_CONDA_HOME to the folder of your conda",
                manager=self.name,
            )
        needs = _with_pip(read_conda_needs(source.path))
        packages = needs.packages
        return EnvironmentPlan(
            manager=self.name,
            key=content_key(self.name, needs.channels, needs.specs, packages.lines, packages.contents),
            project_dir=project_dir,
            source=source,
            python=next((spec for spec in needs.specs if _is(spec, "python")), None),
            build_dependencies=needs.specs,
            dependencies=tuple(mask_uri(line) for line in packages.shown),
            details=needs,
        )

    async def build(self, plan: EnvironmentPlan, build: Build) -> Built:
        """See `BuildingManager.build`."""
        needs = _needs(plan)
        program = await to_thread.run_sync(conda_program)
        if program is not None:
            # conda's package cache does not bear two at once: https://github.com/conda/conda/issues/8870
            async with file_lock(self._store.lock_path("conda")):
                await _by_program(program, build, needs)
        else:
            await _by_rattler(build, needs)
        if needs.packages:
            environ = (await activate(build.target, {})).apply(clean_environ())
            await build.install(pip_install(build.target), needs.packages, environ)
        return await to_thread.run_sync(_describe, build.target)

    async def enter(self, plan: EnvironmentPlan, root: Path) -> PreparedEnvironment:
        """Activate it, once for all runs, as long as the variables stay as they are that scripts may read."""
        return await self._activating(
            (root, _needs(plan).variables), lambda: self._activate(root, _needs(plan).variables)
        )

    async def _activate(self, root: Path, variables: tuple[tuple[str, str], ...]) -> PreparedEnvironment:
        before = (variables, dict(os.environ))
        known = self._activated.get(root)
        if known is None or known[0] != before:
            known = self._activated[root] = (before, await activate(root, dict(variables)))
        return known[1]


def conda_program() -> str | None:
    """The program that creates conda environments; None if there is none. Blocking (looks through PATH).

    Raises:
        EnvironmentSetupError: the environment names one that is not there.
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


def _with_pip(needs: CondaNeeds) -> CondaNeeds:
    """Add pip where there is a list for it, if the project does not name it."""
    if not needs.packages or any(_is(spec, "pip") for spec in needs.specs):
        return needs
    return replace(needs, specs=(*needs.specs, "pip"))


def _is(spec: str, name: str) -> bool:
    """Whether a conda spec is of the package of that name."""
    rest = spec.rpartition("::")[2].removeprefix(name)
    return spec.rpartition("::")[2].startswith(name) and rest[:1] in ("", "=", "<", ">", "!", "~", " ", "[")


def _needs(plan: EnvironmentPlan) -> CondaNeeds:
    if not isinstance(plan.details, CondaNeeds):
        raise TypeError(f"a plan of the manager {plan.manager} was expected to hold CondaNeeds")
    return plan.details


async def _by_program(program: str, build: Build, needs: CondaNeeds) -> None:
    create = ("create", "--yes") if "micromamba" in Path(program).name else ("env", "create", "--quiet")
    environ = clean_environ() | {"CONDA_ALWAYS_YES": "true", "MAMBA_ALWAYS_YES": "true"}
    # An active environment of the caller is not this one's business.
    for name in ("CONDA_PREFIX", "CONDA_DEFAULT_ENV", "CONDA_SHLVL"):
        environ.pop(name, None)
    # JSON is YAML; a file, since URLs of channels may hold tokens.
    text = json.dumps({"channels": needs.channels, "dependencies": needs.specs})
    async with build.listing(".yml", text) as path:
        await build.run([program, *create, "--prefix", str(build.target), "--file", str(path)], environ)


async def _by_rattler(build: Build, needs: CondaNeeds) -> None:
    # In a process of its own: it can be ended at any moment, and nothing of it goes on writing.
    request = RattlerRequest(str(build.target), needs.channels, needs.specs, str(cache_folder() / "conda"))
    # By its path, without mlfleet; -P, since the project's folder may hold files that are named like modules.
    program = Path(__file__).with_name("rattler.py")
    async with build.listing(".request.json", json.dumps(asdict(request))) as path:
        await build.run([sys.executable, "-P", str(program), str(path)], clean_environ(own=True))


def _describe(prefix: Path) -> Built:
    """The Python of a conda prefix, which need not have one."""
    versions = [path.name.split("-")[1] for path in (prefix / "conda-meta").glob("python-[0-9]*.json")]
    must_exist = ("conda-meta", *(("bin/python",) if versions else ()))
    return Built(versions[0] if versions else None, must_exist)
