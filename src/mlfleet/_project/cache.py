"""The cache of fetched projects, shared by all runs and processes of a machine.

<cache folder>/projects/
    git-<hash of the URL>/         one folder for each repository
        lock                       held while something is added or removed
        shelf.json                 the URI of the repository
        mirror/                    a bare clone
        trees/<commit>/            an entry of a content store: the pristine files of a commit
        tmp-…/                     a clone in progress, or left by a process that was killed
    zip-<hash of the content>/     the same with one tree, without a mirror
    copies/                        where the working copies of runs are: see working_copies.py
    downloads/                     what is known of URLs of zips, for asking whether they changed
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlfleet._concurrency.threads import PROJECTS
from mlfleet._paths import cache_folder, size_on_disk
from mlfleet._store.content_store import (
    ContentStore,
    StoredEntry,
    claim,
    modified_at,
    read_facts,
    remove_tree,
    subfolders,
    write_facts,
)
from mlfleet._store.lease import Leases
from mlfleet.errors import FetchError

__all__ = [
    "ProjectStore",
    "list_entries",
    "projects_folder",
    "prune",
]

_TMP = "tmp-"
_SOURCE = "shelf.json"


class ProjectStore:
    """All that the cache has of one repository or of one zip. Every method but `make_tree` blocks; call it in a thread.

    Args:
        folder: The folder of the repository or zip in the folder of fetched projects.
        leases: The leases on the trees that are in use.

    Attributes:
        trees: The pristine files of each version.
        mirror: The bare clone of a repository.
        lock_path: The lock file to hold while something is added or removed.
    """

    def __init__(self, folder: Path, leases: Leases) -> None:
        self.folder = folder
        self.lock_path = folder / "lock"
        self.mirror = folder / "mirror"
        self.trees = ContentStore(
            folder / "trees",
            leases,
            facts_file="tree.json",
            content_key="name",
            lock=lambda _: self.lock_path,
            what="fetched projects",
        )

    @property
    def uri(self) -> str:
        """The URI of the repository or zip, without credentials."""
        return str((read_facts(self.folder / _SOURCE) or {}).get("uri", self.folder.name))

    async def make_tree(self, version: str, uri: str, work: Callable[[Path], Awaitable[Path]]) -> Path:
        """Return the files of a version with a lease on them, and make them before if needed. The lock must be held.

        Args:
            version: The commit, or the hash of the zip.
            uri: The URI to keep, without credentials.
            work: Makes the files in an empty folder, and returns the folder inside that they are in. When it fails or
                is cancelled, what it made is removed.

        Raises:
            FetchError: Somebody removed the files at once.
        """

        def begin(attempt: Path) -> None:
            self._keep_uri(uri)
            attempt.mkdir()

        async def make(attempt: Path) -> tuple[Path, Mapping[str, Any]]:
            await PROJECTS.run(lambda: begin(attempt))
            return await work(attempt), {}

        if (made := await self.trees.make(version, make)) is None:
            raise FetchError(f"{uri} vanished from the cache while it was made", uri=uri)
        return made

    def begin_mirror(self, uri: str) -> Path:
        """Return a new empty folder for a clone, after leftovers were removed. The lock must be held."""
        self._keep_uri(uri)
        for leftover in self.leftovers():
            remove_tree(leftover)
        attempt = self._temporary_path()
        attempt.mkdir()
        return attempt

    def publish_mirror(self, attempt: Path) -> None:
        """Make a complete bare clone the mirror, instead of the present one. The lock must be held."""
        # The path of the mirror must stay the same: trees and working copies name it.
        if self.mirror.exists():
            self.mirror.rename(self._temporary_path())
        attempt.rename(self.mirror)

    def leftovers(self) -> list[Path]:
        """Return the clones in progress, or left by processes that were killed."""
        return [folder for folder in subfolders(self.folder) if folder.name.startswith(_TMP)]

    def entries(self) -> list[StoredEntry]:
        """Return all that is there."""
        found = [self._as_tree(self.trees.describe(tree.name)) for tree in subfolders(self.trees.root)]
        found += [self._as_leftover(folder) for folder in self.leftovers()]
        if self.mirror.is_dir():
            found.append(self._as_mirror())
        return found

    def prune(self, older_than: timedelta | None) -> list[StoredEntry]:
        """Remove what no process uses or makes, and return what was removed.

        Args:
            older_than: Only what no run asked for in this time; None: all. Leftovers go in any case.
        """
        removed = [self.trees.prune(tree.name, older_than) for tree in subfolders(self.trees.root)]
        found = [self._as_tree(entry) for entry in removed if entry is not None]
        with claim(self.lock_path) as is_mine:
            if is_mine:
                for folder in self.leftovers():
                    found.append(self._as_leftover(folder))
                    remove_tree(folder)
                # Trees and working copies read the history that is in the mirror.
                if self.mirror.is_dir() and not subfolders(self.trees.root):
                    entry = self._as_mirror()
                    if entry.is_expired(older_than):
                        found.append(entry)
                        # Renamed first: what is half removed must not be taken for whole.
                        gone = self._temporary_path()
                        self.mirror.rename(gone)
                        remove_tree(gone)
        return found

    def _keep_uri(self, uri: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _SOURCE).exists():
            write_facts(self.folder / _SOURCE, {"uri": uri})

    def _temporary_path(self) -> Path:
        return self.folder / f"{_TMP}{secrets.token_hex(4)}"

    def _as_tree(self, entry: StoredEntry) -> StoredEntry:
        kind = self.folder.name.partition("-")[0] if entry.complete else "leftover"
        return replace(entry, kind=kind, uri=self.uri, version=entry.path.name if entry.complete else None)

    def _as_leftover(self, folder: Path) -> StoredEntry:
        return StoredEntry(
            "leftover", self.uri, None, folder, size_on_disk(folder), modified_at(folder), in_use=False, complete=False
        )

    def _as_mirror(self) -> StoredEntry:
        used = modified_at(self.mirror)
        return StoredEntry("mirror", self.uri, None, self.mirror, size_on_disk(self.mirror), used, in_use=False)


def list_entries() -> list[StoredEntry]:
    """Return all fetched projects on this machine, the last used first. Blocking."""
    entries = [entry for store in _stores() for entry in store.entries()]
    return sorted(entries, key=lambda entry: entry.last_used, reverse=True)


def prune(older_than: timedelta | None = None) -> list[StoredEntry]:
    """Remove fetched projects that no process uses, and what killed processes left. Blocking.

    It is safe while others use the cache: what is being fetched or used is skipped.

    Args:
        older_than: Only what no run asked for in this time; None: all.

    Returns:
        What was removed.
    """
    removed = [entry for store in _stores() for entry in store.prune(older_than)]
    _prune_downloads(projects_folder() / "downloads", older_than)
    return removed


def projects_folder() -> Path:
    """Return the folder of fetched projects."""
    return cache_folder() / "projects"


def _stores() -> list[ProjectStore]:
    leases = Leases()
    folders = [folder for folder in subfolders(projects_folder()) if folder.name.startswith(("git-", "zip-"))]
    return [ProjectStore(folder, leases) for folder in folders]


def _prune_downloads(folder: Path, older_than: timedelta | None) -> None:
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(folder.iterdir()):
            is_old = older_than is None or modified_at(path) < datetime.now(UTC) - older_than
            if path.suffix != ".lock" and is_old:
                with claim(path.with_suffix(".lock")) as is_mine:
                    if is_mine:
                        path.unlink(missing_ok=True)
