"""The working copies of runs: folders that go when their run ends, also that of a process that was killed.

One is ``mlfleet-<random>`` in the folder for temporary files. A note of that name in ``projects/copies`` of the cache
folder tells where it is, and is locked (shared) by the process that made it.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from mlfleet._paths import size_on_disk
from mlfleet._project.cache import CacheEntry, is_older, projects_folder, remove_tree, time_of
from mlfleet._store.lease import Marks, unused

__all__ = ["WorkingCopies", "list_copies", "prune_copies"]


class WorkingCopies:
    """Makes the folders for working copies, and removes those that killed processes left. Every method blocks.

    Args:
        root: the folder of fetched projects.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._marks = Marks(idle=0)
        self._tidied = False

    def begin(self) -> Path:
        """A new empty folder.

        Raises:
            OSError: it cannot be made.
        """
        if not self._tidied:
            self._tidied = True
            prune_copies(root=self._root)
        notes = _notes(self._root)
        notes.mkdir(parents=True, exist_ok=True)
        while True:
            # Noted before it is made: whenever this process is killed, it can be found.
            folder = Path(tempfile.gettempdir()).resolve() / f"mlfleet-{secrets.token_hex(8)}"
            note = notes / folder.name
            note.write_text(f"{folder}\n")
            if self._marks.take(note, pin=True):  # else somebody has just tidied it away
                break
        try:
            folder.mkdir(mode=0o700)
        except OSError:
            self.end(folder)
            raise
        return folder

    def end(self, folder: Path) -> None:
        """Remove a folder that `begin` gave."""
        remove_tree(folder)
        note = _notes(self._root) / folder.name
        if not folder.exists():
            note.unlink(missing_ok=True)
        self._marks.unpin(note)


def list_copies(root: Path | None = None) -> list[CacheEntry]:
    """The working copies there are. Blocking.

    Args:
        root: the folder of fetched projects; None is the one in the user's cache.
    """
    inhabited = _inhabited()
    found = []
    for note in _all_notes(root):
        with unused(note) as free:
            found += _entry(note, inhabited, free=free)
    return found


def prune_copies(older_than: timedelta | None = None, root: Path | None = None) -> list[CacheEntry]:
    """Remove working copies that no process uses any more. Blocking.

    Args:
        older_than: only what was made before this time; None: all.
        root: the folder of fetched projects; None is the one in the user's cache.

    Returns:
        What was removed.
    """
    removed = []
    notes = _all_notes(root)
    inhabited = _inhabited() if notes else ()
    for note in notes:
        with unused(note) as free:
            for entry in _entry(note, inhabited, free=free):
                if not entry.in_use and is_older(entry.last_used, older_than):
                    remove_tree(entry.path)
                    removed.append(entry)
            if free and not _entry(note, inhabited, free=free):
                note.unlink(missing_ok=True)
    return removed


def _entry(note: Path, inhabited: Sequence[str], *, free: bool) -> list[CacheEntry]:
    """The copy that a note tells of, if it is there."""
    with suppress(OSError):
        folder = Path(note.read_text().rstrip("\n"))
        if folder.name == note.name and folder.is_dir() and not folder.is_symlink():
            # A run of a named sweep outlives the process that made its copy.
            in_use = not free or any(place == str(folder) or place.startswith(f"{folder}/") for place in inhabited)
            return [CacheEntry("copy", str(folder), None, folder, size_on_disk(folder), time_of(note), in_use)]
    return []


def _inhabited() -> list[str]:
    """The folders that processes of this user are in, where the system tells (Linux)."""
    found = []
    with suppress(OSError):
        for entry in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - a name is all that is needed
            with suppress(OSError):
                found.append(os.readlink(f"/proc/{entry}/cwd"))  # noqa: PTH115
    return found


def _all_notes(root: Path | None) -> list[Path]:
    try:
        return sorted(_notes(root or projects_folder()).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _notes(root: Path) -> Path:
    return root / "copies"
