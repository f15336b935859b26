"""Marks what is in use on disk, so that nobody removes it: shared locks that end with their process at the latest."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Marks", "unused"]


class Marks:
    """The marks that one part of this process holds, each on a file of its own. Every method blocks, if only shortly.

    The last ones stay held although nobody pinned them, since what was just fetched is about to be used. They end when
    this object is gone.
    """

    def __init__(self, idle: int | None = 64) -> None:
        """Make an empty set of marks.

        Args:
            idle: how many marks to hold beyond the pinned ones; the longest unused is given up first. None: all.
        """
        self._idle = idle
        self._held: dict[Path, int] = {}
        self._pins: dict[Path, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._held)

    def take(self, path: Path, *, pin: bool = False) -> bool:
        """Mark `path` as in use, and as used now. False: it is not there, or is being removed.

        Args:
            path: a file beside what is in use.
            pin: keep the mark until `unpin`.
        """
        with self._lock:
            mark = self._held.pop(path, None)
            if mark is not None and not _is_same(mark, path):
                os.close(mark)
                mark = None
            if mark is None and (mark := _hold(path)) is None:
                return False
            self._held[path] = mark
            if pin:
                self._pins[path] = self._pins.get(path, 0) + 1
            with contextlib.suppress(OSError):
                os.utime(mark)
            self._trim(self._idle)
            return True

    def unpin(self, path: Path) -> None:
        """Take back one `pin`."""
        with self._lock:
            self._pins[path] -= 1
            if not self._pins[path]:
                del self._pins[path]
            self._trim(self._idle)

    def drop(self, path: Path) -> None:
        """Give up the mark on `path`, if there is one and nobody pinned it."""
        with self._lock:
            if path not in self._pins and (mark := self._held.pop(path, None)) is not None:
                os.close(mark)

    def close(self) -> None:
        """Give up all marks that nobody pinned. They may be taken again."""
        with self._lock:
            self._trim(0)

    def _trim(self, limit: int | None) -> None:
        if limit is None:
            return
        idle = [path for path in self._held if path not in self._pins]
        for path in idle[: max(0, len(idle) - limit)]:
            os.close(self._held.pop(path))


@contextlib.contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Whether nobody holds a mark on `path`; nobody gets one while this is held. Blocking, if only shortly."""
    try:
        mark = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(mark)


def _hold(path: Path) -> int | None:
    try:
        # For reading only: the folder may be one that an administrator filled.
        mark = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Waits for one who removes it, or looks whether it is used.
        fcntl.flock(mark, fcntl.LOCK_SH)
    except OSError:
        # A file system without locks: what is used is not protected, but can be used.
        return mark
    if _is_same(mark, path):
        return mark
    os.close(mark)
    return None


def _is_same(mark: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(mark), path.stat())
    except OSError:
        return False


def _close_all(held: dict[Path, int]) -> None:
    for mark in held.values():
        os.close(mark)
    held.clear()
