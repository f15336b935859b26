"""How the command of a run gets its Python: the caller's environment, or one that is built once and shared."""

from __future__ import annotations

from pathlib import Path

from mlfleet._environments.base import EnvironmentManager, EnvironmentPlan, PreparedEnvironment

__all__ = ["EnvironmentManager", "EnvironmentPlan", "PreparedEnvironment", "manager"]


def manager(name: str, root: Path | None = None) -> EnvironmentManager:
    """The manager of that name. Use one for all runs, so that one build serves them all.

    Args:
        name: ``local``, ``virtualenv``, ``uv`` or ``conda``.
        root: the folder of built environments; None is ``MLFLOW_ENV_ROOT`` or the user's cache.

    Raises:
        UsageError: there is no such manager.
    """
    from mlfleet._environments.choose import validate

    validate(name)
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
            from mlfleet._environments.local import LocalManager

            return LocalManager()
