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

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import PROJECTS
from mlfleet._project.content import content_hash, pack, read_ignore
from mlfleet._project.git import ignored_by_git
from mlfleet.backends.databricks.storage import Storage
from mlfleet.errors import SubmitError

__all__ = ["Archive", "Uploads"]

_log = logging.getLogger("mlfleet.databricks")
_IN_MEMORY = 2**23


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
        self._contents: SingleFlight[Path, tuple[frozenset[str], str]] = SingleFlight()
        self._archives: SingleFlight[tuple[str, str], Archive] = SingleFlight(keep=True)
        self._scripts: SingleFlight[str, str] = SingleFlight(keep=True)

    async def project(
        self, storage: Storage, folder: Path, on_progress: Callable[[str], None], *, needs: tuple[str, ...] = ()
    ) -> Archive:
        """The packed project, which is uploaded if it is not there.

        Args:
            storage: where to.
            folder: of the project.
            on_progress: takes a line for people.
            needs: files in it that the run reads.

        Raises:
            MlfleetError: a file cannot be read, or is left out though it is needed, or the workspace does not take it.
        """
        left_out, digest = await self._contents(folder, partial(_content, folder))
        if needs:
            await PROJECTS.run(partial(_check_needs, folder, left_out, needs))
        bring = partial(self._project, storage, folder, left_out, on_progress)
        return await self._archives((storage.root, digest), bring)

    async def script(self, storage: Storage) -> str:
        """The path of the bootstrap script, which is uploaded if it is not there."""

        async def bring() -> str:
            content = await PROJECTS.run(_script)
            name = f"bootstrap-{hashlib.sha256(content).hexdigest()[:16]}.py"
            return await _bring(storage, name, io.BytesIO(content), len(content))

        return await self._scripts(storage.root, bring)

    async def _project(
        self, storage: Storage, folder: Path, left_out: frozenset[str], on_progress: Callable[[str], None]
    ) -> Archive:
        packed = await pack(folder, left_out=left_out)
        with packed.file:
            file, digest, size = await PROJECTS.run(partial(_compress, packed.file))
        with file:
            on_progress(f"the project ({size / 2**20:.1f} MiB) goes to {storage.root}")
            return Archive(await _bring(storage, f"projects/{digest}.tar.gz", file, size), digest)


async def _content(folder: Path) -> tuple[frozenset[str], str]:
    """What Git would not take along either, and the hash of the rest."""
    left_out = await ignored_by_git(folder)
    return left_out, await content_hash(folder, left_out=left_out)


def _check_needs(folder: Path, left_out: frozenset[str], needs: tuple[str, ...]) -> None:
    ignore = read_ignore(folder, left_out)
    for name in needs:
        if ignore(name):
            text = (
                f"a path parameter names {name!r} of the project, which .gitignore or .dockerignore leaves out: take it"
                f" back with the line '!{name}' in the project's .dockerignore, or give a path such as /Volumes/…"
            )
            raise SubmitError(text, backend="databricks")


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
