"""Which manager builds the environment of a project."""

from __future__ import annotations

from difflib import get_close_matches

from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet.errors import UsageError

__all__ = ["NAMES", "choose", "validate"]

NAMES = ("local", "virtualenv", "uv", "conda")


def validate(env_manager: str | None) -> None:
    """Check the name of a manager; None is fine.

    Raises:
        UsageError: there is no such manager; the text lists those there are.
    """
    if env_manager is None or env_manager in NAMES:
        return
    near = get_close_matches(str(env_manager), NAMES, n=1)
    raise UsageError(
        f"there is no environment manager {env_manager!r}"
        f"{f', did you mean {near[0]!r}?' if near else ''} (there are {', '.join(NAMES)})"
    )


def choose(env_manager: str | None, source: EnvironmentFile | None) -> str:
    """The name of the manager for a project.

    What the caller asks for; else ``conda`` for a project with a conda file and ``virtualenv`` for every other, one
    that lists nothing included. (A ``uv.lock`` alone does not choose ``uv``, in the reference neither.)

    Args:
        env_manager: what the caller asks for.
        source: the project's file that tells what it needs.

    Raises:
        UsageError: there is no such manager, or it is ``conda`` and the project has no conda file.
    """
    validate(env_manager)
    is_conda = source is not None and source.kind is EnvironmentFileKind.CONDA
    if env_manager == "conda" and not is_conda:
        what = f"its environment is described by {source.path}" if source else "it has no conda.yaml"
        raise UsageError(
            f"the project cannot run in a conda environment: {what}; "
            "use the environment manager virtualenv, uv or local"
        )
    if env_manager is not None:
        return env_manager
    return "conda" if is_conda else "virtualenv"
