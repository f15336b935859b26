"""Environment managers: what they are, which one builds the environment of a project, and the one that builds none."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet._run_log import get_logger
from mlfleet._text.documents import nearest
from mlfleet.errors import UsageError

__all__ = [
    "NAMES",
    "EnvironmentManager",
    "EnvironmentPlan",
    "LocalManager",
    "PreparedEnvironment",
    "choose_manager",
    "create_manager",
    "log_chosen",
    "validate_manager",
]

_log = get_logger("mlfleet.environments")

NAMES = ("local", "virtualenv", "uv", "conda")


@dataclass(frozen=True, slots=True)
class PreparedEnvironment:
    """A complete environment.

    A backend runs the command itself, unchanged, with `apply` on top of the caller's variables: no wrapper, no
    activation per run. What activation scripts do (conda) was captured when the environment was prepared.

    Attributes:
        manager: The name of its manager, as in the tag ``mlflow.project.env``.
        root: The folder of the environment; None for the caller's own environment.
        path: The folders to put before PATH.
        environ: The variables to set; None removes one.
    """

    manager: str
    root: Path | None = None
    path: tuple[str, ...] = ()
    environ: Mapping[str, str | None] = field(default_factory=dict)

    def apply(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the variables `environ` as they are inside this environment."""
        result = dict(environ)
        for name, value in self.environ.items():
            if value is None:
                result.pop(name, None)
            else:
                result[name] = value
        if self.path:
            old = result.get("PATH", "")
            result["PATH"] = ":".join((*self.path, old) if old else self.path)
        return result


@dataclass(frozen=True, slots=True)
class EnvironmentPlan:
    """The environment to build, fixed by its content. Making a plan only reads files and finds a user's mistakes.

    Attributes:
        manager: The name of the manager.
        key: A hash of all that the environment depends on; equal keys are one environment. Empty for ``local``.
        project_dir: The folder of the project.
        source: The file that the plan was read from, if there is one.
        python: The version of Python that the project asks for, or None for the current one.
        details: What the manager itself needs, such as the packages; their lines may hold the passwords of indexes.
        inherit_env: The variables of this process that the build inherits, besides the settings of its tools; not a
            part of the key.
    """

    manager: str
    key: str
    project_dir: Path
    source: EnvironmentFile | None = None
    python: str | None = None
    details: Any = field(default=None, repr=False)
    inherit_env: bool | tuple[str, ...] = True


class EnvironmentManager(ABC):
    """Builds environments of one kind; one instance serves any number of concurrent runs."""

    name: ClassVar[str]

    @abstractmethod
    def plan(self, project_dir: Path, source: EnvironmentFile | None) -> EnvironmentPlan:
        """Read what the project needs. Blocking (reads small files); call it in a thread.

        Raises:
            SpecError: The file is wrong.
            EnvironmentSetupError: This manager cannot serve such a project, or is not installed.
        """

    @abstractmethod
    async def prepare(
        self, plan: EnvironmentPlan, *, on_progress: Callable[[str], None] | None = None
    ) -> PreparedEnvironment:
        """Build the environment, or use the one that was built before.

        One build serves all callers with one key, in this and in other processes. A cancelled caller leaves the
        build to the others; when the last one is gone, the build is ended and nothing of it is left.

        Args:
            plan: A plan of this manager.
            on_progress: A function to call with lines of the build's output.

        Raises:
            EnvironmentSetupError: The build fails; the text has the end of its output. Nothing half-built is left.
        """


class LocalManager(EnvironmentManager):
    """Runs the command in the caller's environment, as it is.

    With one exception: when this process runs in a virtual or conda environment and the caller has activated none
    (``/venv/bin/mlfleet run …``), ``python`` in the command is that environment's, not whatever PATH has first.
    """

    name = "local"

    def plan(self, project_dir: Path, source: EnvironmentFile | None) -> EnvironmentPlan:
        """Make a plan, for which the lists of the project do not count. Blocking (looks through PATH)."""
        return EnvironmentPlan(self.name, "", project_dir, source, details=_path())

    async def prepare(
        self, plan: EnvironmentPlan, *, on_progress: Callable[[str], None] | None = None
    ) -> PreparedEnvironment:
        """Return the caller's environment; nothing is built."""
        return PreparedEnvironment(self.name, path=plan.details)


def _path() -> tuple[str, ...]:
    """Return the folder of this interpreter, if it belongs to an environment and PATH does not lead to it.

    Not if the caller has activated another environment: mlfleet may be a tool in one of its own (pipx, ``uv tool``).
    """
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if active and os.path.realpath(active) != os.path.realpath(sys.prefix):
        return ()
    own = os.path.dirname(sys.executable)  # noqa: PTH120 - not resolved: a venv's python is a link
    in_environment = sys.prefix != sys.base_prefix or Path(sys.prefix, "conda-meta").is_dir()
    found = shutil.which("python")
    if not own or not in_environment or (found and os.path.dirname(found) == own):  # noqa: PTH120
        return ()
    return (own,)


def create_manager(name: str, root: Path | None = None) -> EnvironmentManager:
    """Create the manager of that name. Use one for all runs, so that one build serves them all.

    Args:
        name: ``local``, ``virtualenv``, ``uv`` or ``conda``, as by `choose_manager`.
        root: The folder of built environments; None is ``MLFLOW_ENV_ROOT`` or the user's cache.
    """
    match name:
        case "virtualenv":
            from mlfleet._environments.virtualenv import VirtualenvManager

            return VirtualenvManager(root)
        case "uv":
            from mlfleet._environments.uv import UvManager

            return UvManager(root)
        case "conda":
            from mlfleet._environments.conda import CondaManager

            return CondaManager(root)
        case _:
            return LocalManager()


@functools.lru_cache(maxsize=256)
def log_chosen(path: Path) -> None:
    """Log once which file an environment is made of, where the project does not say so itself."""
    _log.info("the project names no environment: %s lists what it needs", path)


def validate_manager(env_manager: str | None) -> None:
    """Check the name of a manager; None is allowed.

    Raises:
        UsageError: There is no manager of that name; the text lists those there are.
    """
    if env_manager is None or env_manager in NAMES:
        return
    hint = nearest(str(env_manager), NAMES)
    raise UsageError(f"there is no environment manager {env_manager!r}{hint} (there are {', '.join(NAMES)})")


def choose_manager(env_manager: str | None, source: EnvironmentFile | None) -> str:
    """Return the name of the manager for a project.

    It is the one that the caller asks for; else ``conda`` for a project with a conda file, ``uv`` for one without a
    list for MLflow but with a ``uv.lock``, and ``virtualenv`` for every other, including one that lists nothing.

    Args:
        env_manager: The name that the caller asks for, or None.
        source: The file of the project that lists what it needs.

    Raises:
        UsageError: There is no manager of that name, or it is ``conda`` and the project has no conda file.
    """
    validate_manager(env_manager)
    is_conda = source is not None and source.kind is EnvironmentFileKind.CONDA
    if env_manager == "conda" and not is_conda:
        what = f"its environment is described by {source.path}" if source else "it has no conda.yaml"
        raise UsageError(
            f"the project cannot run in a conda environment: {what}; "
            "use the environment manager virtualenv, uv or local"
        )
    if env_manager is not None:
        return env_manager
    if source is not None and source.kind is EnvironmentFileKind.UV_LOCK:
        return "uv"
    return "conda" if is_conda else "virtualenv"
