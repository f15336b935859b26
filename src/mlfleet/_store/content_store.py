"""A store of content on disk by key: made once, shared by all processes of a machine, and removed when unused.

One entry:

    <root>/<name>/
        <attempt>/…        one attempt to make the content, at the path where it stays: scripts in it may hold that path
        <facts file>       names the attempt that succeeded; appears at once and whole, when all is done
        in-use             the lease file: every process that uses the content holds a shared lock on it, and its time
                           is the last use

A folder without its facts file is not an entry, whatever killed the process that made it. It is made again in another
attempt, since processes of the killed one may still be writing into theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlfleet._concurrency.threads import PROJECTS
from mlfleet._paths import size_on_disk
from mlfleet._run_log import get_logger
from mlfleet._store.lease import Leases, unleased
from mlfleet._store.private_folders import check_owner

__all__ = [
    "ContentStore",
    "StoredEntry",
    "claim",
    "is_unleased",
    "modified_at",
    "prune_entry",
    "read_facts",
    "remove_tree",
    "subfolders",
    "write_facts",
]

_log = get_logger("mlfleet.store")

_IN_USE = "in-use"


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """Something on disk that a prune may remove.

    Attributes:
        kind: ``git``, ``zip``, ``mirror`` (the history of a Git repository), ``copy`` (the working copy of a run),
            ``leftover``, ``run``, or the manager of an environment.
        uri: The project's URI without credentials, the file that an environment was built for, the run's id, or the
            path of a copy.
        version: The commit, the hash of a zip's content, or the version of an environment's Python; None without one.
        path: The folder.
        size: Bytes on disk.
        last_used: The time of the last use.
        in_use: True while a process uses it; it is not removed then.
        complete: False for what is being made, or was left by a process that was killed.
        facts: The content of the facts file.
    """

    kind: str
    uri: str
    version: str | None
    path: Path
    size: int
    last_used: datetime
    in_use: bool
    complete: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)

    def is_expired(self, older_than: timedelta | None) -> bool:
        """Return True if the last use is longer ago than that; None is always. Incomplete entries are expired."""
        return not self.complete or older_than is None or self.last_used < datetime.now(UTC) - older_than


class ContentStore:
    """The entries in one folder. Every method but `make` blocks; call it in a thread.

    Args:
        root: The folder.
        facts_file: The name of the facts file.
        content_key: The key in the facts of the path of the content, relative to the entry's folder.
        lock: Returns the path of the lock file for an entry, to hold while it is made.
        leases: The leases that keep `prune` from removing what `acquire` returned.
        what: The description of the entries, for errors.
    """

    def __init__(
        self, root: Path, leases: Leases, *, facts_file: str, content_key: str, lock: Callable[[str], Path], what: str
    ) -> None:
        self.root = root
        self.lock_path = lock
        self._leases = leases
        self._facts_file = facts_file
        self._content_key = content_key
        self._what = what

    def lease_path(self, name: str) -> Path:
        """Return the lease file of an entry."""
        return self.root / name / _IN_USE

    def acquire(self, name: str, *, pin: bool = False) -> Path | None:
        """Return the content of a complete entry, and hold a lease on it; None if there is none to use.

        Args:
            name: The name of the entry.
            pin: True to hold the lease until ``leases.release(store.lease_path(name))``.

        Raises:
            UsageError: The entry belongs to another user.
        """
        lease = self.lease_path(name)
        if not self._leases.acquire(lease, pin=pin):
            return None
        content = None
        try:
            content = self._content(self.root / name, self._facts(name))
        finally:
            if content is None:
                if pin:
                    self._leases.release(lease)
                self._leases.drop(lease)
        return content

    async def make(self, name: str, work: Callable[[Path], Awaitable[tuple[Path, Mapping[str, Any]]]]) -> Path | None:
        """Return the content of an entry as `acquire` does, and make it before if there is none. Hold its lock.

        Args:
            name: The name of the entry.
            work: Makes the content at a path, which does not exist yet. It returns the content, which is at that path
                or inside, and the facts to keep about it. When it fails or is cancelled, what it made is removed.

        Returns:
            The content; None if there is none to use although it was made.
        """
        # Another task or process may have made it while this one waited for the lock.
        if (found := await PROJECTS.run(lambda: self.acquire(name))) is not None:
            return found
        attempt = await PROJECTS.run(lambda: self.begin(name))
        try:
            content, facts = await work(attempt)
            await PROJECTS.run(lambda: self.publish(name, content, facts))
        except BaseException:
            await PROJECTS.finish(lambda: self._discard(name, attempt))
            raise
        return await PROJECTS.run(lambda: self.acquire(name))

    def begin(self, name: str) -> Path:
        """Return a path for a new attempt, which does not exist yet, after leftovers were removed."""
        folder = self.root / name
        self._leases.drop(folder / _IN_USE)
        if (folder / self._facts_file).exists():
            _log.info("%s is damaged and is made again", folder)
            (folder / self._facts_file).unlink()
        self._remove_unused(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / secrets.token_hex(3)

    def publish(self, name: str, content: Path, facts: Mapping[str, Any]) -> None:
        """Make the content of a finished attempt that of the entry.

        Args:
            name: The name of the entry.
            content: The attempt, or a folder inside of it.
            facts: What else to keep about the content, as JSON.
        """
        folder = self.root / name
        (folder / _IN_USE).touch()
        write_facts(folder / self._facts_file, {self._content_key: str(content.relative_to(folder)), **facts})

    def _discard(self, name: str, attempt: Path) -> None:
        remove_tree(attempt)
        if not (self.root / name / self._facts_file).exists():
            self._remove_unused(self.root / name)

    def describe(self, name: str, *, in_use: bool | None = None) -> StoredEntry:
        """Return what is known about an entry, complete or not.

        Args:
            name: The name of the entry.
            in_use: None to look whether a process uses it.
        """
        folder = self.root / name
        facts = self._facts(name)
        size = (facts or {}).get("size")
        return StoredEntry(
            kind="entry",
            uri=name,
            version=None,
            path=folder,
            size=size if isinstance(size, int) else size_on_disk(folder),
            last_used=modified_at(folder / _IN_USE),
            in_use=not is_unleased(folder / _IN_USE) if in_use is None else in_use,
            complete=facts is not None,
            facts=facts or {},
        )

    def prune(self, name: str, older_than: timedelta | None) -> StoredEntry | None:
        """Remove an entry that no process uses or makes, and return what was removed.

        Args:
            name: The name of the entry.
            older_than: Only if the last use is longer ago than this; None: in any case. Incomplete entries always go.
        """
        folder = self.root / name
        with claim(self.lock_path(name)) as is_mine:
            if not is_mine:
                return None
            return prune_entry(
                lambda: self.describe(name, in_use=False), folder / _IN_USE, older_than, first=folder / self._facts_file
            )

    def _facts(self, name: str) -> dict[str, Any] | None:
        facts = read_facts(self.root / name / self._facts_file)
        return facts if facts is not None and isinstance(facts.get(self._content_key), str) else None

    def _content(self, folder: Path, facts: Mapping[str, Any] | None) -> Path | None:
        if facts is None:
            return None
        content = folder / str(facts[self._content_key])
        with contextlib.suppress(FileNotFoundError):
            for path in (folder, folder / self._facts_file, content):
                check_owner(path, self._what)
        required = facts.get("must_exist", ())
        if not isinstance(required, list | tuple):
            return None
        return content if all((content / str(each)).exists() for each in required) else None

    def _remove_unused(self, folder: Path) -> None:
        with unleased(folder / _IN_USE) as is_mine:
            if is_mine:
                (folder / self._facts_file).unlink(missing_ok=True)
                remove_tree(folder)


def prune_entry(
    describe: Callable[[], StoredEntry | None], lease: Path, older_than: timedelta | None, *, first: Path | None = None
) -> StoredEntry | None:
    """Remove something that nobody holds a lease on, and return what was removed. Blocking.

    Args:
        describe: Returns what there is to remove, or None. It is called when nobody can acquire a lease any more.
        lease: The lease file.
        older_than: Only if the last use is longer ago than this; None: in any case. Incomplete entries always go.
        first: The file to remove first: without it, nobody takes a half removed entry for a whole one.
    """
    with unleased(lease) as is_mine:
        if not is_mine:
            return None
        entry = describe()
        if entry is None or entry.in_use or not entry.is_expired(older_than):
            return None
        if first is not None:
            first.unlink(missing_ok=True)
        remove_tree(entry.path)
        return entry


@contextlib.contextmanager
def claim(lock: Path) -> Iterator[bool]:
    """Hold a lock file without waiting for it; yield False if another process or task holds it. Blocking."""
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock, timeout=0))
        except (Timeout, PermissionError):
            yield False
            return
        yield True


def is_unleased(lease: Path) -> bool:
    """Return True if nobody holds a lease on a file now. Blocking."""
    with unleased(lease) as is_free:
        return is_free


def modified_at(path: Path) -> datetime:
    """Return the time of the last change of a file; the epoch if it does not exist. Blocking."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return datetime.fromtimestamp(0, UTC)


def subfolders(parent: Path) -> list[Path]:
    """Return the real folders in a folder, sorted; empty if it does not exist. Blocking."""
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_facts(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file does not exist or is damaged. Blocking."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None


def write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a JSON object to a file, which appears at once and whole. Blocking."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(facts, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_tree(folder: Path) -> None:
    """Remove a folder, even where a program took away its own permissions. What cannot be removed stays. Blocking."""

    def add_permissions_and_retry(function: Callable[[str], object], path: str, _: object) -> None:
        with contextlib.suppress(OSError):
            parent = Path(path).parent
            parent.chmod(stat.S_IMODE(parent.stat().st_mode) | stat.S_IRWXU)
            if function in (os.open, os.scandir, os.lstat):
                Path(path).chmod(stat.S_IRWXU)
                shutil.rmtree(path, ignore_errors=True)
            else:
                function(path)

    shutil.rmtree(folder, onerror=add_permissions_and_retry)
