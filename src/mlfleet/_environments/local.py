"""The caller's own environment."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from mlfleet._environments.base import EnvironmentManager, EnvironmentPlan, PreparedEnvironment
from mlfleet._project.spec import EnvironmentFile

__all__ = ["LocalManager"]


class LocalManager(EnvironmentManager):
    """Runs the command in the caller's environment, as it is.

    One thing is seen to: when this process runs in a virtual or conda environment that was not activated
    (``/venv/bin/mlfleet run …``), ``python`` in the command is that environment's, not whatever PATH has first.
    """

    name = "local"

    def plan(self, project_dir: Path, source: EnvironmentFile | None) -> EnvironmentPlan:
        """What the project lists does not matter here. Blocking (looks through PATH)."""
        return EnvironmentPlan(self.name, "", project_dir, source, details=_path())

    async def prepare(
        self, plan: EnvironmentPlan, *, on_progress: Callable[[str], None] | None = None
    ) -> PreparedEnvironment:
        """There is nothing to build."""
        path = plan.details if isinstance(plan.details, tuple) else ()
        return PreparedEnvironment(self.name, path=path)


def _path() -> tuple[str, ...]:
    """The folder of this interpreter, if it is an environment's and PATH does not lead to it."""
    own = os.path.dirname(sys.executable)  # noqa: PTH120 - not resolved: a venv's python is a link
    in_environment = sys.prefix != sys.base_prefix or Path(sys.prefix, "conda-meta").is_dir()
    found = shutil.which("python")
    if not own or not in_environment or (found and os.path.dirname(found) == own):  # noqa: PTH120
        return ()
    return (own,)
