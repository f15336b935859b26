"""The folders for what outlives a run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import platformdirs

from mlfleet.errors import UsageError

__all__ = [
    "active_folder",
    "cache_folder",
    "environments_folder",
    "run_folder",
    "runs_folder",
    "size_on_disk",
    "sweeps_folder",
]


def cache_folder() -> Path:
    """Return the folder of fetched projects: ``MLFLEET_CACHE_DIR``, else the user's cache folder.

    It may be deleted when nothing runs.
    """
    return _folder("MLFLEET_CACHE_DIR") or platformdirs.user_cache_path("mlfleet")


def environments_folder() -> Path:
    """Return the folder of built environments: ``MLFLOW_ENV_ROOT``, as in the reference, else in the cache folder."""
    return _folder("MLFLOW_ENV_ROOT") or cache_folder() / "envs"


def runs_folder() -> Path:
    """Return the folder with a folder for each run: in ``MLFLEET_STATE_DIR``, else in the user's state folder."""
    return (_folder("MLFLEET_STATE_DIR") or platformdirs.user_state_path("mlfleet")) / "runs"


def run_folder(run_id: str) -> Path:
    """Return the folder of a run, which need not exist.

    What a tag says about the place of a run's files is not used: others may write tags.

    Raises:
        UsageError: The id would name another place than a folder in `runs_folder`.
    """
    if run_id in ("", ".", "..") or "/" in run_id or "\0" in run_id:
        raise UsageError(f"{run_id!r} is not the id of a run")
    return runs_folder() / run_id


def active_folder() -> Path:
    """Return the folder for the records of active runs, next to `runs_folder`."""
    return runs_folder().with_name("active")


def sweeps_folder() -> Path:
    """Return the folder for the locks of named sweeps, next to `runs_folder`."""
    return runs_folder().with_name("sweeps")


def size_on_disk(folder: Path) -> int:
    """Return the bytes on disk of a folder with all that is in it. Blocking."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512  # noqa: PTH118 - many files
    return total


def _folder(variable: str) -> Path | None:
    given = os.environ.get(variable)
    return Path(given).expanduser().absolute() if given else None
