"""The folder of built environments, shared by all runs and processes of a machine.

    <root>/<manager>-<key>/                an entry of a content store; its facts file is environment.json
    <root>/.locks/<manager>-<key>.lock     held while it is built or removed

An environment is built at the path where it stays, since neither virtual environments nor conda's can be moved.
"""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from mlfleet._paths import environments_folder
from mlfleet._store.content_store import ContentStore, StoredEntry, subfolders
from mlfleet._store.lease import Leases

__all__ = ["list_environments", "lock_path", "open_store", "prune"]

# The folder may be shared with environments of the reference, which are not ours to list and remove.
_NAME = re.compile(r"(?P<manager>virtualenv|uv|conda)-[0-9a-f]{32}")


def open_store(root: Path | None = None) -> ContentStore:
    """Return the store of built environments. It holds a lease on what it acquired until it is garbage.

    The facts of an environment are ``python`` (the version of its Python, or null), ``source`` (the file or project
    that it was first built for), ``created`` (seconds since the epoch), ``size`` (bytes on disk) and ``must_exist``
    (paths inside of it that are gone when its base interpreter is).

    Args:
        root: The folder; None is ``MLFLOW_ENV_ROOT`` or the user's cache.
    """
    folder = root or environments_folder()
    return ContentStore(
        folder,
        Leases(idle=None),
        facts_file="environment.json",
        content_key="attempt",
        lock=lambda name: lock_path(folder, name),
        what="environments",
    )


def lock_path(root: Path, name: str) -> Path:
    """Return the lock file of an environment, or of a program that cannot run twice at the same time."""
    return root / ".locks" / f"{name}.lock"


def list_environments() -> list[StoredEntry]:
    """Return all environments in the shared folder, the last used first. Blocking."""
    store = open_store()
    entries = [_as_environment(store.describe(name)) for name in _names(store)]
    return sorted(entries, key=lambda entry: entry.last_used, reverse=True)


def prune(older_than: timedelta | None = None) -> list[StoredEntry]:
    """Remove the environments that no process uses, and what killed builds left. Blocking.

    Args:
        older_than: Only those that no run asked for in this time; None: all. Leftovers go in any case.

    Returns:
        What was removed.
    """
    store = open_store()
    removed = [store.prune(name, older_than) for name in _names(store)]
    return [_as_environment(entry) for entry in removed if entry is not None]


def _names(store: ContentStore) -> list[str]:
    return [folder.name for folder in subfolders(store.root) if _NAME.fullmatch(folder.name)]


def _as_environment(entry: StoredEntry) -> StoredEntry:
    source, python = entry.facts.get("source"), entry.facts.get("python")
    return replace(
        entry,
        kind=entry.path.name.partition("-")[0],
        uri=str(source) if source is not None else "",
        version=str(python) if python is not None else None,
    )
