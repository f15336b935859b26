"""Leases on what is in use on disk: shared file locks, which end with their process at the latest."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Leases", "unleased"]


class Leases:
    """The leases that one part of this process holds, each on a file of its own. Every method blocks for a moment.

    The latest leases stay held after their last user has released them, since what was just fetched is about to be
    used. All end when this object is garbage.

    Args:
        idle: How many leases to hold beyond the pinned ones; the longest unused is given up first. None: all.
    """

    def __init__(self, idle: int | None = 64) -> None:
        self._idle = idle
        self._held: dict[Path, int] = {}
        self._pins: dict[Path, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._held)

    def acquire(self, path: Path, *, pin: bool = False) -> bool:
        """Hold a lease on a file, and set the file's time to now.

        Args:
            path: The lease file beside what is in use.
            pin: True to hold the lease until `release`.

        Returns:
            False if the file does not exist or is being removed.
        """
        with self._lock:
            descriptor = self._held.pop(path, None)
            if descriptor is not None and not _is_same(descriptor, path):
                os.close(descriptor)
                descriptor = None
            if descriptor is None and (descriptor := _lock_shared(path)) is None:
                return False
            self._held[path] = descriptor
            if pin:
                self._pins[path] = self._pins.get(path, 0) + 1
            with contextlib.suppress(OSError):
                os.utime(descriptor)
            self._trim(self._idle)
            return True

    def release(self, path: Path) -> None:
        """Undo one `acquire` with `pin`."""
        with self._lock:
            self._pins[path] -= 1
            if not self._pins[path]:
                del self._pins[path]
            self._trim(self._idle)

    def drop(self, path: Path) -> None:
        """Give up the lease on a file at once, if there is one and nobody pinned it."""
        with self._lock:
            if path not in self._pins and (descriptor := self._held.pop(path, None)) is not None:
                os.close(descriptor)

    def close(self) -> None:
        """Give up all leases that nobody pinned. They may be acquired again."""
        with self._lock:
            self._trim(0)

    def _trim(self, limit: int | None) -> None:
        if limit is None:
            return
        idle = [path for path in self._held if path not in self._pins]
        for path in idle[: max(0, len(idle) - limit)]:
            os.close(self._held.pop(path))


@contextlib.contextmanager
def unleased(path: Path) -> Iterator[bool]:
    """Yield True if nobody holds a lease on a file; nobody gets one inside of the block. Blocks for a moment."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _lock_shared(path: Path) -> int | None:
    try:
        # For reading only: the folder may be one that an administrator filled.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Waits for `unleased` in another thread or process.
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError:
        # A file system without locks: the content can be used, but is not protected.
        return descriptor
    if _is_same(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _is_same(descriptor: int, path: Path) -> bool:
    """Return True if an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _close_all(held: dict[Path, int]) -> None:
    for descriptor in held.values():
        os.close(descriptor)
    held.clear()
