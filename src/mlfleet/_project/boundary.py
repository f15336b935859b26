"""The folder that all files of a project must be in, so that a project cannot have other files of its user read.

A project names files: its environment, requirements, packages. Lines of them stand in errors and in the output of
builds, also in ``--dry-run``, before anybody decided to run the project's code. So none of them may be elsewhere,
whether by an absolute path, by ``..`` or by a symbolic link.
"""

from __future__ import annotations

import os
from pathlib import Path

from mlfleet.errors import SpecError

__all__ = ["check_link", "find_root", "git_root", "is_inside"]


def git_root(folder: Path) -> Path | None:
    """Return the Git working tree that a folder is in, if there is one. Blocking; git is not asked."""
    real = Path(os.path.realpath(folder))
    return next((parent for parent in (real, *real.parents) if os.path.lexists(parent / ".git")), None)


def find_root(folder: Path) -> Path:
    """Return the folder that the files of a project in `folder` must be in: its Git working tree, else `folder` itself.

    Blocking.
    """
    return git_root(folder) or Path(os.path.realpath(folder))


def is_inside(path: Path, root: Path) -> bool:
    """Return True if the file behind `path`, with all links followed, is in a folder. Blocking."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
    except (OSError, ValueError):  # a name that no file can have
        return False


def check_link(path: Path, root: Path) -> None:
    """Refuse a file of the project that is a symbolic link to elsewhere. Blocking.

    Raises:
        SpecError: The link leads out of `root`.
    """
    if not is_inside(path, root):
        raise SpecError(
            f"it is a symbolic link that leads out of the project's repository {root}: put the file itself there",
            path=path,
        )
