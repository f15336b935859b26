"""Private copies of pristine trees."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from pathlib import Path
from typing import BinaryIO

from mlfleet._project.blocking import Stopped
from mlfleet.errors import FetchError

__all__ = ["copy_tree"]

_CHUNK = 64 * 2**20


def copy_tree(source: Path, target: Path, stop: threading.Event) -> None:
    """Copy a folder with its symbolic links, permissions and times. Blocking.

    File systems that can (btrfs, XFS) let the copies share their blocks until one of them is written to.

    Args:
        source: the folder.
        target: is made.
        stop: ends the work.

    Raises:
        FetchError: the copy cannot be written.
        Stopped: `stop` was set; part of the copy is there.
    """
    try:
        _Copying(stop).folder(str(source), str(target))
    except OSError as error:
        raise FetchError(f"the working copy of the project cannot be written: {error}") from error


class _Copying:
    """One copy under way."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._by_kernel = hasattr(os, "copy_file_range")

    def folder(self, source: str, target: str) -> None:
        os.mkdir(target)  # noqa: PTH102 - strings, since there may be many
        with os.scandir(source) as entries:
            for entry in entries:
                if self._stop.is_set():
                    raise Stopped
                other = f"{target}/{entry.name}"
                if entry.is_symlink():
                    os.symlink(os.readlink(entry.path), other)  # noqa: PTH115, PTH211
                elif entry.is_dir():
                    self.folder(entry.path, other)
                elif entry.is_file():
                    with open(entry.path, "rb") as old, open(other, "xb") as new:  # noqa: PTH123
                        self._content(old, new)
                        _keep_facts(old, new)
        facts = os.stat(source)  # noqa: PTH116
        os.chmod(target, stat.S_IMODE(facts.st_mode))  # noqa: PTH101
        os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    def _content(self, old: BinaryIO, new: BinaryIO) -> None:
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


def _keep_facts(old: BinaryIO, new: BinaryIO) -> None:
    new.flush()
    facts = os.fstat(old.fileno())
    os.fchmod(new.fileno(), stat.S_IMODE(facts.st_mode))
    os.utime(new.fileno(), ns=(facts.st_atime_ns, facts.st_mtime_ns))
