"""The working copies of runs: private folders that are removed when their run ends, even if its process was killed.

A copy is ``mlfleet-<random>`` in the folder for temporary files. A note of that name in ``projects/copies`` of the
cache folder says where it is, and is the lease file of the process that made it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO

from mlfleet._paths import size_on_disk
from mlfleet._project.blocking import Stopped
from mlfleet._project.cache import projects_folder
from mlfleet._store.content_store import StoredEntry, is_unleased, modified_at, prune_entry, remove_tree
from mlfleet._store.lease import Leases, unleased
from mlfleet.errors import FetchError

__all__ = ["WorkingCopies", "copy_tree", "list_copies", "prune_copies"]

_CHUNK = 64 * 2**20


class WorkingCopies:
    """Makes the folders for working copies, and removes those that killed processes left. Every method blocks.

    Args:
        root: The folder of fetched projects.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._leases = Leases(idle=0)
        self._has_pruned = False

    def make_folder(self) -> Path:
        """Make a new empty folder.

        Raises:
            OSError: The folder cannot be made.
        """
        if not self._has_pruned:
            self._has_pruned = True
            prune_copies(root=self._root)
        notes = _notes_folder(self._root)
        notes.mkdir(parents=True, exist_ok=True)
        while True:
            # The note comes before the folder: whenever this process is killed, the folder can be found.
            folder = Path(tempfile.gettempdir()).resolve() / f"mlfleet-{secrets.token_hex(8)}"
            note = notes / folder.name
            note.write_text(f"{folder}\n")
            if self._leases.acquire(note, pin=True):  # Otherwise another process has just pruned the note.
                break
        try:
            folder.mkdir(mode=0o700)
        except OSError:
            self.remove_folder(folder)
            raise
        return folder

    def remove_folder(self, folder: Path) -> None:
        """Remove a folder that `make_folder` made."""
        remove_tree(folder)
        note = _notes_folder(self._root) / folder.name
        if not folder.exists():
            note.unlink(missing_ok=True)
        self._leases.release(note)


def list_copies() -> list[StoredEntry]:
    """Return the working copies on this machine. Blocking."""
    occupied = _working_directories()
    entries = (_entry(note, occupied, is_leased=not is_unleased(note)) for note in _notes())
    return [entry for entry in entries if entry is not None]


def prune_copies(older_than: timedelta | None = None, root: Path | None = None) -> list[StoredEntry]:
    """Remove working copies that no process uses any more, and return what was removed. Blocking.

    Args:
        older_than: Only copies that were made longer ago than this; None: all.
        root: The folder of fetched projects; None is the one in the user's cache.
    """
    notes = _notes(root)
    occupied = _working_directories() if notes else ()
    removed = []
    for note in notes:
        describe = partial(_entry, note, occupied, is_leased=False)
        if (entry := prune_entry(describe, note, older_than)) is not None:
            removed.append(entry)
        with unleased(note) as is_free:
            if is_free and describe() is None:
                note.unlink(missing_ok=True)
    return removed


def copy_tree(source: Path, target: Path, stop: threading.Event) -> None:
    """Copy a folder with its symbolic links, permissions and times. Blocking.

    File systems that support it (btrfs, XFS) let the copies share their blocks until one of them is written to.

    Args:
        source: The folder to copy.
        target: The folder to make.
        stop: An event that ends the work when it is set.

    Raises:
        FetchError: The copy cannot be written.
        Stopped: `stop` was set; part of the copy is there.
    """
    try:
        _Copytree(stop).copy_folder(str(source), str(target))
    except OSError as error:
        raise FetchError(f"the working copy of the project cannot be written: {error}") from error


class _Copytree:
    """One copy in progress. `shutil.copytree` can neither be stopped nor share blocks."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._by_kernel = hasattr(os, "copy_file_range")

    def copy_folder(self, source: str, target: str) -> None:
        os.mkdir(target)  # noqa: PTH102 - strings, since there may be many
        with os.scandir(source) as entries:
            for entry in entries:
                if self._stop.is_set():
                    raise Stopped
                other = f"{target}/{entry.name}"
                if entry.is_symlink():
                    os.symlink(os.readlink(entry.path), other)  # noqa: PTH115, PTH211
                elif entry.is_dir():
                    self.copy_folder(entry.path, other)
                elif entry.is_file():
                    with open(entry.path, "rb") as old, open(other, "xb") as new:  # noqa: PTH123
                        self._copy_content(old, new)
                        _copy_attributes(old, new)
        attributes = os.stat(source)  # noqa: PTH116
        os.chmod(target, stat.S_IMODE(attributes.st_mode))  # noqa: PTH101
        os.utime(target, ns=(attributes.st_atime_ns, attributes.st_mtime_ns))

    def _copy_content(self, old: BinaryIO, new: BinaryIO) -> None:
        if self._by_kernel:
            try:
                while os.copy_file_range(old.fileno(), new.fileno(), _CHUNK):
                    if self._stop.is_set():
                        raise Stopped
            except OSError:
                # Not on this file system, or not between these two; it fails before it has copied anything.
                self._by_kernel = False
                old.seek(0)
            else:
                return
        shutil.copyfileobj(old, new)


def _copy_attributes(old: BinaryIO, new: BinaryIO) -> None:
    new.flush()
    attributes = os.fstat(old.fileno())
    os.fchmod(new.fileno(), stat.S_IMODE(attributes.st_mode))
    os.utime(new.fileno(), ns=(attributes.st_atime_ns, attributes.st_mtime_ns))


def _entry(note: Path, occupied: Sequence[str], *, is_leased: bool) -> StoredEntry | None:
    """Return the copy that a note names, if it exists."""
    with suppress(OSError, ValueError):
        folder = Path(note.read_text().rstrip("\n"))
        if folder.name == note.name and folder.is_dir() and not folder.is_symlink():
            # A run of a named sweep outlives the process that made its copy.
            in_use = is_leased or any(place == str(folder) or place.startswith(f"{folder}/") for place in occupied)
            return StoredEntry("copy", str(folder), None, folder, size_on_disk(folder), modified_at(note), in_use)
    return None


def _working_directories() -> list[str]:
    """Return the working directories of the processes that this user may look at."""
    import psutil  # late: most programs never ask

    return [process.info["cwd"] for process in psutil.process_iter(["cwd"]) if process.info["cwd"]]


def _notes(root: Path | None = None) -> list[Path]:
    try:
        return sorted(_notes_folder(root or projects_folder()).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _notes_folder(root: Path) -> Path:
    return root / "copies"
