"""Hashes of files, computed again only when the file changed."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from mlfleet._project.blocking import Stopped

__all__ = ["FileHashes"]

_CHUNK = 1 << 20
_REMEMBERED = 256


class FileHashes:
    """The SHA-256 of files, remembered by path, size, time and inode."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int, int, int], str] = {}

    def of(self, path: Path, stop: threading.Event) -> str:
        """The hash of a file's content, in hexadecimal. Blocking.

        Raises:
            OSError: it cannot be read.
            Stopped: `stop` was set.
        """
        found = path.stat()
        key = (path, found.st_size, found.st_mtime_ns, found.st_ino)
        if (known := self._known.get(key)) is not None:
            return known
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                if stop.is_set():
                    raise Stopped
                digest.update(data)
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[key] = digest.hexdigest()
        return digest.hexdigest()
