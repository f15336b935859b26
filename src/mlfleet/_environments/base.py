"""What the environment of a run is: how its command gets its Python and its libraries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from mlfleet._project.spec import EnvironmentFile

__all__ = ["EnvironmentManager", "EnvironmentPlan", "PreparedEnvironment"]


@dataclass(frozen=True, slots=True)
class PreparedEnvironment:
    """An environment that is there and complete.

    A backend runs the command itself, unchanged, with `apply` on top of the caller's variables: no wrapper, no
    activation per run. What activation scripts do (conda) was captured when the environment was prepared.

    Attributes:
        manager: its manager's name, as in the tag ``mlflow.project.env``.
        root: its folder; None for the caller's own environment.
        path: folders to put before PATH.
        environ: variables to set; None removes one.
    """

    manager: str
    root: Path | None = None
    path: tuple[str, ...] = ()
    environ: Mapping[str, str | None] = field(default_factory=dict)

    def apply(self, environ: Mapping[str, str]) -> dict[str, str]:
        """`environ` as it is inside this environment."""
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
    """What to build, fixed by its content. Making it reads files only; it is where a user's mistakes show.

    Attributes:
        manager: the manager's name.
        key: a hash of all that the environment depends on; equal keys are one environment. Empty for ``local``.
        project_dir: the folder of the project.
        source: the file it was read from, if there is one.
        python: the version of Python that is asked for, or None for the current one.
        build_dependencies: lines for pip, installed first.
        dependencies: lines for pip, paths in them made absolute.
        details: whatever else the manager itself needs.
    """

    manager: str
    key: str
    project_dir: Path
    source: EnvironmentFile | None = None
    python: str | None = None
    build_dependencies: tuple[str, ...] = ()
    dependencies: tuple[str, ...] = ()
    details: object = None


class EnvironmentManager(ABC):
    """Builds environments of one kind; one instance serves any number of concurrent runs."""

    name: ClassVar[str]

    @abstractmethod
    def plan(self, project_dir: Path, source: EnvironmentFile | None) -> EnvironmentPlan:
        """Read what the project needs. Blocking (reads small files); call it in a thread.

        Raises:
            SpecError: the file is wrong.
            EnvironmentSetupError: this manager cannot serve such a project, or is not installed.
        """

    @abstractmethod
    async def prepare(
        self, plan: EnvironmentPlan, *, on_progress: Callable[[str], None] | None = None
    ) -> PreparedEnvironment:
        """Build the environment, or take the one that is there already.

        One build serves all callers with one key, in this and in other processes. A cancelled caller leaves the
        build to the others; when the last one is gone, the build is ended and nothing of it is left.

        Args:
            plan: of this manager.
            on_progress: is called with lines of the build's output.

        Raises:
            EnvironmentSetupError: with the end of the build's output; nothing half-built is left.
        """
