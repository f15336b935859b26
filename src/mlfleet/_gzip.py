"""Compression that gives the same bytes for the same content."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from typing import IO

__all__ = ["Compressed", "compress"]

_CHUNK = 2**18
_IN_MEMORY = 2**23  # bytes of a compressed file that are kept in memory


@dataclass(frozen=True, slots=True)
class Compressed:
    """A compressed file.

    Attributes:
        file: The file, at its beginning. The caller must close it.
        sha256: Its SHA-256, in hex.
        size: Its size in bytes.
    """

    file: IO[bytes]
    sha256: str
    size: int

    async def close(self) -> None:
        """Close the file."""
        self.file.close()


def compress(source: IO[bytes]) -> Compressed:
    """Compress the rest of a file, as gzip without a time. Blocking."""
    file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - the caller closes it
    try:
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as compressed:
            shutil.copyfileobj(source, compressed, _CHUNK)
        size = file.tell()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return Compressed(file, digest, size)
