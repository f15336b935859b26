"""The cache of fetched projects, shared by all runs and processes of a machine.

    <cache folder>/projects/
        git-<hash of the URL>/         one shelf for each repository
            lock                       held while something is added or removed
            shelf.json                 what it is of
            mirror/                    a bare clone
            trees/<commit>/
                in-use                 locked (shared) by every process that uses the tree; its time is the last use
                tree.json
                <name>/                the pristine files
            tmp-…/                     being made, or left by a process that was killed
        zip-<hash of the content>/     likewise, with one tree and no mirror
        copies/                        where the working copies of runs are: see copies.py
        downloads/                     what is known of URLs of zips: state for asking whether they changed

A tree is made in ``tmp-…`` and renamed when it is complete: what is below ``trees`` is whole, whatever was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlfleet._paths import cache_folder, runs_folder, size_on_disk
from mlfleet._store.lease import Marks, unused

__all__ = [
    "CacheEntry",
    "Shelf",
    "is_older",
    "list_entries",
    "list_runs",
    "projects_folder",
    "prune",
    "prune_runs",
    "remove_tree",
    "time_of",
]

_IN_USE = "in-use"
_TMP = "tmp-"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """Something on disk that `prune` or `prune_runs` may remove.

    Attributes:
        kind: ``git``, ``zip``, ``mirror`` (the history of a Git repository), ``copy`` (for one run to work in),
            ``leftover`` or ``run``.
        uri: of the project, without credentials; the run's id for a run; the path of a copy.
        version: the commit, or the hash of a zip's content; None for what has none.
        path: its folder.
        size: bytes on disk.
        last_used: when a run last asked for it.
        in_use: whether a process uses it now; it is not removed then.
    """

    kind: str
    uri: str
    version: str | None
    path: Path
    size: int
    last_used: datetime
    in_use: bool


class Shelf:
    """All that the cache has of one repository or of one zip. Every method blocks; call it in a thread."""

    def __init__(self, root: Path, kind: str, key: str) -> None:
        """Name a shelf; nothing is made yet.

        Args:
            root: the folder of fetched projects.
            kind: ``git`` or ``zip``.
            key: what is the same for the same content, fit for a file name.
        """
        self.folder = root / f"{kind}-{key}"
        self.lock_path = self.folder / "lock"
        self.mirror = self.folder / "mirror"

    def take(self, version: str, marks: Marks, *, pin: bool = False) -> Path | None:
        """The pristine folder of that version, marked as in use from now on; None: there is none."""
        tree = self.tree(version)
        if not marks.take(tree / _IN_USE, pin=pin):
            return None
        facts = _read(tree / "tree.json")
        if facts is None:
            return None
        return tree / str(facts["name"])

    def tree(self, version: str) -> Path:
        """Where the tree of that version is, or will be."""
        return self.folder / "trees" / version

    def mark(self, version: str) -> Path:
        """The file that tells that the tree of that version is in use."""
        return self.tree(version) / _IN_USE

    def begin(self, uri: str) -> Path:
        """A new empty folder to make something in, after leftovers were removed. The lock must be held."""
        (self.folder / "trees").mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{_TMP}*"):
            remove_tree(leftover)
        if not (self.folder / "shelf.json").exists():
            _write(self.folder / "shelf.json", {"uri": uri})
        folder = self._spare()
        folder.mkdir()
        return folder

    def publish(self, made: Path, version: str, name: str) -> None:
        """Make the folder that `begin` gave, with `name` in it, the tree of that version. The lock must be held."""
        _write(made / "tree.json", {"name": name})
        (made / _IN_USE).touch()
        if self.tree(version).exists():
            self.tree(version).rename(self._spare())
        made.rename(self.tree(version))

    def publish_mirror(self, made: Path) -> None:
        """Make a complete bare clone the mirror, in place of another one. The lock must be held."""
        if self.mirror.exists():
            self.mirror.rename(self._spare())
        made.rename(self.mirror)

    def _spare(self) -> Path:
        return self.folder / f"{_TMP}{secrets.token_hex(4)}"


def list_entries(root: Path | None = None) -> list[CacheEntry]:
    """All fetched projects on this machine, the last used first. Blocking.

    Args:
        root: the folder of fetched projects; None is the one in the user's cache (``MLFLEET_CACHE_DIR``).
    """
    entries = [entry for shelf in _shelves(root) for entry in _on_shelf(shelf)]
    return sorted(entries, key=lambda entry: entry.last_used, reverse=True)


def prune(older_than: timedelta | None = None, root: Path | None = None) -> list[CacheEntry]:
    """Remove fetched projects that no process uses, and what killed processes left. Blocking.

    Safe while others use the cache: what is being fetched or used is skipped.

    Args:
        older_than: only what no run asked for in this time; None: all.
        root: the folder of fetched projects; None is the one in the user's cache.

    Returns:
        What was removed.
    """
    removed: list[CacheEntry] = []
    for shelf in _shelves(root):
        with _free_lock(shelf / "lock") as free:
            if free:
                removed += _prune_shelf(shelf, older_than)
    _prune_downloads((root or projects_folder()) / "downloads", older_than)
    return removed


def list_runs(root: Path | None = None) -> list[CacheEntry]:
    """The folders with the captured output of runs, the last used first. Blocking.

    Args:
        root: the folder of the runs; None is the user's own (``MLFLEET_STATE_DIR``).
    """
    entries = [_run_entry(folder) for folder in _folders(root or runs_folder())]
    return sorted(entries, key=lambda entry: entry.last_used, reverse=True)


def prune_runs(older_than: timedelta | None = None, root: Path | None = None) -> list[CacheEntry]:
    """Remove the captured output of runs. Blocking.

    A run whose ``output.log`` is locked (``flock``) is still running and is skipped.

    Args:
        older_than: only what was not written to in this time; None: all.
        root: the folder of the runs; None is the user's own.

    Returns:
        What was removed.
    """
    removed = []
    for folder in _folders(root or runs_folder()):
        with unused(folder / "output.log") as free:
            entry = _run_entry(folder, in_use=not free)
            if free and is_older(entry.last_used, older_than):
                remove_tree(folder)
                removed.append(entry)
    return removed


def projects_folder() -> Path:
    """Where fetched projects are kept."""
    return cache_folder() / "projects"


def remove_tree(folder: Path) -> None:
    """Remove a folder, also where a program took away its own permissions. What cannot be removed stays. Blocking."""

    def open_and_retry(function: Callable[[str], object], path: str, _: object) -> None:
        with contextlib.suppress(OSError):
            parent = Path(path).parent
            parent.chmod(stat.S_IMODE(parent.stat().st_mode) | stat.S_IRWXU)
            if function in (os.open, os.scandir, os.lstat):
                Path(path).chmod(stat.S_IRWXU)
                shutil.rmtree(path, ignore_errors=True)
            else:
                function(path)

    shutil.rmtree(folder, onerror=open_and_retry)


def _prune_shelf(shelf: Path, older_than: timedelta | None) -> list[CacheEntry]:
    removed = []
    for entry in _on_shelf(shelf):
        if entry.version is not None and not is_older(entry.last_used, older_than):
            continue
        if entry.kind == "mirror" and (_folders(shelf / "trees") or not is_older(entry.last_used, older_than)):
            continue  # working copies read the history that is in the mirror
        with unused(entry.path / _IN_USE) as free:
            if free:
                # Renamed first: what is half removed must not be taken for whole.
                gone = shelf / f"{_TMP}{secrets.token_hex(4)}"
                entry.path.rename(gone)
                remove_tree(gone)
                removed.append(entry)
    return removed


def _prune_downloads(folder: Path, older_than: timedelta | None) -> None:
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(folder.iterdir()):
            if path.suffix != ".lock" and is_older(time_of(path), older_than):
                with _free_lock(path.with_suffix(".lock")) as free:
                    if free:
                        path.unlink(missing_ok=True)


def _on_shelf(shelf: Path) -> list[CacheEntry]:
    uri = str((_read(shelf / "shelf.json") or {}).get("uri", shelf.name))
    kind = shelf.name.partition("-")[0]
    found: list[tuple[str, str | None, Path, datetime]] = [
        (kind, tree.name, tree, time_of(tree / _IN_USE)) for tree in _folders(shelf / "trees")
    ]
    found += [("leftover", None, folder, time_of(folder)) for folder in _folders(shelf) if folder.name.startswith(_TMP)]
    if (shelf / "mirror").is_dir():
        found.append(("mirror", None, shelf / "mirror", time_of(shelf / "mirror")))
    return [
        CacheEntry(kind, uri, version, path, size_on_disk(path), used, in_use=_is_used(path / _IN_USE))
        for kind, version, path, used in found
    ]


def _run_entry(folder: Path, *, in_use: bool | None = None) -> CacheEntry:
    output = folder / "output.log"
    used = max(time_of(folder), time_of(output))
    if in_use is None:
        in_use = _is_used(output)
    return CacheEntry("run", folder.name, None, folder, size_on_disk(folder), used, in_use=in_use)


def _shelves(root: Path | None) -> list[Path]:
    return [folder for folder in _folders(root or projects_folder()) if folder.name.startswith(("git-", "zip-"))]


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextlib.contextmanager
def _free_lock(path: Path) -> Iterator[bool]:
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=0):
            yield True
    except Timeout:
        yield False


def _is_used(mark: Path) -> bool:
    with unused(mark) as free:
        return not free


def is_older(used: datetime, older_than: timedelta | None) -> bool:
    """Whether something was last used before that time; None: always."""
    return older_than is None or used < datetime.now(UTC) - older_than


def time_of(path: Path) -> datetime:
    """When something was written to. Blocking."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return datetime.fromtimestamp(0, UTC)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None


def _write(path: Path, facts: dict[str, Any]) -> None:
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(json.dumps(facts), encoding="utf-8")
    unfinished.replace(path)
