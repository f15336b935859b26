"""Private copies of pristine trees."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import threading
from pathlib import Path

from mlfleet.errors import FetchError
from mlfleet.project.blocking import Stopped

__all__ = ["copy_tree"]

_FICLONE = 0x40049409  # <linux/fs.h>: share the blocks of another file until one of them is written to


def copy_tree(source: Path, target: Path, stop: threading.Event) -> None:
    """Copy a folder with its symbolic links, permissions and times. Blocking.

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
        self._clones = sys.platform == "linux"

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
                    self._file(entry.path, other)
        shutil.copystat(source, target)

    def _file(self, source: str, target: str) -> None:
        # Once it did not work, it does not on this file system, or not between these two.
        self._clones = self._clones and _clone(source, target)
        if not self._clones:
            shutil.copyfile(source, target)
        shutil.copystat(source, target)


def _clone(source: str, target: str) -> bool:
    with open(source, "rb") as old, open(target, "wb") as new:  # noqa: PTH123
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            return False
    return True
