"""Brings projects and the bootstrap script into a workspace: each content once, whoever needs it."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from mlfleet.backends.databricks.storage import Storage
from mlfleet.concurrency.once import Once
from mlfleet.concurrency.threads import Threads
from mlfleet.project.content import content_hash, pack

__all__ = ["Archive", "Uploads"]

_log = logging.getLogger("mlfleet.databricks")
_IN_MEMORY = 2**23
_packing = Threads("databricks packing", 2)


@dataclass(frozen=True, slots=True)
class Archive:
    """A project in a workspace.

    Attributes:
        path: of its tar.gz, as code that runs there sees it.
        sha256: of that file, in hex.
    """

    path: str
    sha256: str


class Uploads:
    """What this process has brought into one workspace."""

    def __init__(self) -> None:
        self._hashes: Once[Path, str] = Once()
        self._archives: Once[tuple[str, str], Archive] = Once(keep=True)
        self._scripts: Once[str, str] = Once(keep=True)

    async def project(self, storage: Storage, folder: Path, on_progress: Callable[[str], None]) -> Archive:
        """The packed project, which is uploaded if it is not there.

        Raises:
            MlfleetError: a file cannot be read, or the workspace does not take it.
        """
        digest = await self._hashes(folder, partial(content_hash, folder))
        return await self._archives((storage.root, digest), partial(self._project, storage, folder, on_progress))

    async def script(self, storage: Storage) -> str:
        """The path of the bootstrap script, which is uploaded if it is not there."""

        async def bring() -> str:
            content = await _packing(_script)
            name = f"bootstrap-{hashlib.sha256(content).hexdigest()[:16]}.py"
            return await _bring(storage, name, io.BytesIO(content), len(content))

        return await self._scripts(storage.root, bring)

    async def _project(self, storage: Storage, folder: Path, on_progress: Callable[[str], None]) -> Archive:
        packed = await pack(folder)
        with packed.file:
            file, digest, size = await _packing(partial(_compress, packed.file))
        with file:
            on_progress(f"the project ({size / 2**20:.1f} MiB) goes to {storage.root}")
            return Archive(await _bring(storage, f"projects/{digest}.tar.gz", file, size), digest)


async def _bring(storage: Storage, name: str, file: IO[bytes], size: int) -> str:
    there = await storage.size(name)
    # Another size is what somebody's torn upload has left.
    if there is None or there not in (size, -1):
        await storage.write(name, file, size)
        _log.info("uploaded %s (%d bytes)", storage.path(name), size)
    return storage.path(name)


def _script() -> bytes:
    return Path(__file__).with_name("bootstrap.py").read_bytes()


def _compress(tar: IO[bytes]) -> tuple[IO[bytes], str, int]:
    """The tar as gzip without a time in it, its hash and its size. Blocking."""
    file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - the caller closes it
    try:
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as archive:
            shutil.copyfileobj(tar, archive)
        size = file.tell()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file, digest, size
