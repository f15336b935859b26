"""The folder of built environments, shared by all runs and processes of a machine.

    <root>/<manager>-<key>/
        <attempt>/           one attempt to build it, at the path where it stays: scripts in it hold that path
        environment.json     names the attempt that succeeded; appears at once and whole, when all is done
        in-use               locked (shared) by every process that uses the environment; its time is the last use
    <root>/.locks/<manager>-<key>.lock    held while it is built or removed

A folder without ``environment.json`` is no environment, whatever killed its build; it is built again, in another
attempt, since processes of the killed build may still be writing into theirs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mlfleet._paths import environments_folder, size_on_disk
from mlfleet._store.lease import Marks, unused

__all__ = ["Published", "Store", "StoredEnvironment", "list_environments", "prune"]

_log = logging.getLogger("mlfleet.environments")

_FACTS = "environment.json"
_IN_USE = "in-use"
# The folder may be shared with environments of the reference, which are not ours to list and remove.
_NAME = re.compile(r"(?P<manager>virtualenv|uv|conda)-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Published:
    """What ``environment.json`` tells of a complete environment.

    Attributes:
        attempt: the folder beside it that holds the environment.
        python: the version of its Python; None if it has none.
        source: the file or project that it was first built for.
        created: seconds since the epoch.
        size: bytes on disk.
        must_exist: paths inside it that are gone when its base interpreter is.
    """

    attempt: str
    python: str | None
    source: str
    created: float
    size: int
    must_exist: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredEnvironment:
    """An environment on disk, for people to look at.

    Attributes:
        name: of its folder.
        manager: that built it.
        folder: all that belongs to it.
        complete: False for what is being built, or was left by a build that was killed.
        python: the version of its Python.
        source: the file or project that it was first built for.
        size: bytes on disk.
        created: when its build ended.
        last_used: when a run last asked for it.
        in_use: whether a process uses it, or builds it, now.
    """

    name: str
    manager: str
    folder: Path
    complete: bool
    python: str | None
    source: str | None
    size: int
    created: datetime | None
    last_used: datetime | None
    in_use: bool


class Store:
    """The environments in one folder, as one user of them sees it. Every method blocks; call it in a thread.

    What `take` gave is marked as in use until this object is gone (or its process is).
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or environments_folder()
        self._marks = Marks(idle=None)

    def lock_path(self, name: str) -> Path:
        """The lock file to hold while building; its folder is made."""
        folder = self.root / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.lock"

    def take(self, name: str) -> tuple[Path, Published] | None:
        """The complete environment of that name, marked as in use from now on; None if there is none to use."""
        folder = self.root / name
        if not self._marks.take(folder / _IN_USE):
            return None
        published = _read(folder)
        if published is None or not all((folder / published.attempt / each).exists() for each in published.must_exist):
            self._marks.drop(folder / _IN_USE)
            return None
        return folder / published.attempt, published

    def begin(self, name: str) -> Path:
        """A path for a new attempt, after leftovers were removed. The lock must be held."""
        folder = self.root / name
        self._marks.drop(folder / _IN_USE)
        if (folder / _FACTS).exists():
            _log.info("the environment %s lost its interpreter and is built again", folder)
            (folder / _FACTS).unlink()
        _remove_unused(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / secrets.token_hex(3)

    def publish(
        self, name: str, attempt: Path, *, python: str | None, source: str, must_exist: tuple[str, ...]
    ) -> None:
        """Make a finished attempt the environment of that name. The lock must be held."""
        folder = self.root / name
        facts = Published(attempt.name, python, source, time.time(), size_on_disk(attempt), must_exist)
        (folder / _IN_USE).touch()
        unfinished = folder / f"{attempt.name}.json"
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(asdict(facts), file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / _FACTS)

    def abandon(self, name: str, attempt: Path) -> None:
        """Remove a failed attempt. The lock must be held."""
        _remove(attempt)
        if not (self.root / name / _FACTS).exists():
            _remove_unused(self.root / name)


def list_environments(root: Path | None = None) -> list[StoredEnvironment]:
    """All environments in the shared folder, the last used first. Blocking.

    Args:
        root: the folder; None is ``MLFLOW_ENV_ROOT`` or the user's cache.
    """
    root = root or environments_folder()
    found = [_describe(folder) for folder in _folders(root)]
    return sorted(found, key=lambda each: each.last_used or datetime.min.replace(tzinfo=UTC), reverse=True)


def prune(older_than: timedelta | None = None, *, root: Path | None = None) -> list[StoredEnvironment]:
    """Remove the environments that no process uses, and what killed builds left. Blocking.

    Args:
        older_than: only those that no run asked for in this time; None: all. Leftovers go in any case.
        root: the folder; None is ``MLFLOW_ENV_ROOT`` or the user's cache.

    Returns:
        What was removed.
    """
    from filelock import FileLock, Timeout

    root = root or environments_folder()
    removed: list[StoredEnvironment] = []
    for folder in _folders(root):
        lock = FileLock(Store(root).lock_path(folder.name), timeout=0)
        with contextlib.suppress(Timeout), lock:
            found = _describe(folder)
            expired = older_than is None or found.last_used is None or found.last_used < datetime.now(UTC) - older_than
            if (expired or not found.complete) and _remove_unused(folder):
                removed.append(found)
    return removed


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    except FileNotFoundError:
        return []


def _describe(folder: Path) -> StoredEnvironment:
    match = _NAME.fullmatch(folder.name)
    published = _read(folder)
    try:
        used: datetime | None = datetime.fromtimestamp((folder / _IN_USE).stat().st_mtime, UTC)
    except OSError:
        used = None
    with unused(folder / _IN_USE) as free:
        in_use = not free
    return StoredEnvironment(
        name=folder.name,
        manager=match["manager"] if match else "",
        folder=folder,
        complete=published is not None,
        python=published.python if published else None,
        source=published.source if published else None,
        size=published.size if published else size_on_disk(folder),
        created=datetime.fromtimestamp(published.created, UTC) if published else None,
        last_used=used,
        in_use=in_use,
    )


def _read(folder: Path) -> Published | None:
    try:
        raw = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        return Published(**{**raw, "must_exist": tuple(raw["must_exist"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _remove_unused(folder: Path) -> bool:
    """Remove a whole environment, unless a process uses it."""
    with unused(folder / _IN_USE) as free:
        if not free:
            return False
        # First what makes it an environment: from here on nobody takes it.
        (folder / _FACTS).unlink(missing_ok=True)
        _remove(folder)
        return True


def _remove(folder: Path) -> None:
    """Remove a folder. Processes of a killed build may be writing into it: what they add now is left to `prune`."""
    shutil.rmtree(folder, ignore_errors=True)
