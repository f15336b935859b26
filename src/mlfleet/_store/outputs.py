"""The captured output of runs, in the folder of each run."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path

from mlfleet._paths import runs_folder, size_on_disk
from mlfleet._store.content_store import StoredEntry, is_unleased, modified_at, prune_entry, subfolders

__all__ = ["list_outputs", "prune_outputs"]


def list_outputs() -> list[StoredEntry]:
    """Return the folders with the captured output of runs, the last used first. Blocking."""
    folders = subfolders(runs_folder())
    entries = [_run_entry(folder, in_use=not is_unleased(folder / "output.log")) for folder in folders]
    return sorted(entries, key=lambda entry: entry.last_used, reverse=True)


def prune_outputs(older_than: timedelta | None = None) -> list[StoredEntry]:
    """Remove the captured output of runs. Blocking.

    A run whose ``output.log`` is locked (``flock``) is still active and is skipped.

    Args:
        older_than: Only what was not written to in this time; None: all.

    Returns:
        What was removed.
    """
    removed = [
        prune_entry(partial(_run_entry, folder, in_use=False), folder / "output.log", older_than)
        for folder in subfolders(runs_folder())
    ]
    return [entry for entry in removed if entry is not None]


def _run_entry(folder: Path, *, in_use: bool) -> StoredEntry:
    used = max(modified_at(folder), modified_at(folder / "output.log"))
    return StoredEntry("run", folder.name, None, folder, size_on_disk(folder), used, in_use=in_use)
