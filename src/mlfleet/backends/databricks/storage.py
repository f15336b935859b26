"""Where projects, the bootstrap script and output are kept in a workspace: volumes, workspace files, DBFS."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import logging
import posixpath
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO
from urllib.parse import quote

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import FILES, PROJECTS
from mlfleet._project.content import content_hash, pack, read_ignore
from mlfleet._project.git import ignored_by_git
from mlfleet.backends.databricks.client import Workspace, WorkspaceError
from mlfleet.backends.databricks.config import Upload, UploadKind
from mlfleet.errors import SubmitError

__all__ = ["HOME", "Archive", "Storage", "Uploads", "storage_of"]

_log = logging.getLogger("mlfleet.databricks")
_IN_MEMORY = 2**23  # bytes of a packed project

HOME = "/Workspace/Users/{user}/.mlfleet"
# DBFS takes and gives 1 MiB in one request; what is sent grows by a third on its way.
_READ_BLOCK, _WRITE_BLOCK = 2**20, 2**19
_LARGEST_WORKSPACE_FILE = 10 * 2**20
_LARGEST_VOLUME_FILE = 5 * 2**30


class Storage(ABC):
    """A folder in a workspace.

    Args:
        workspace: where it is.
        root: the folder as code that runs there sees it.

    Attributes:
        root: likewise.
    """

    def __init__(self, workspace: Workspace, root: str) -> None:
        self._workspace = workspace
        self.root = root.rstrip("/")

    def path(self, name: str) -> str:
        """A file of it, as code that runs there sees it."""
        return f"{self.root}/{name}"

    @abstractmethod
    async def size(self, name: str) -> int | None:
        """The size of a file in bytes, -1 if that is not told; None if there is none."""

    @abstractmethod
    async def write(self, name: str, file: IO[bytes], size: int) -> None:
        """Write a file, over what is there; its folders are made."""

    @abstractmethod
    async def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""


class Volume(Storage):
    """A folder of a Unity Catalog volume, by the Files API."""

    async def size(self, name: str) -> int | None:
        return await self._workspace.file_size(self._url(name))

    async def write(self, name: str, file: IO[bytes], size: int) -> None:
        _check_size(size, _LARGEST_VOLUME_FILE, "a volume takes files of up to 5 GiB")

        async def send() -> None:
            try:
                await self._workspace.send_file("PUT", self._url(name) + "?overwrite=true", file, size)
            except WorkspaceError as error:
                if error.status != 409:  # somebody else was faster with the same content
                    raise

        try:
            await send()
        except WorkspaceError as error:
            if not error.missing:
                raise
            folder = quote(posixpath.dirname(self.path(name)))
            await self._workspace.call("PUT", f"/api/2.0/fs/directories{folder}")
            await send()

    async def read(self, name: str) -> bytes | None:
        return await self._workspace.read_file(self._url(name))

    def _url(self, name: str) -> str:
        return "/api/2.0/fs/files" + quote(self.path(name))


class WorkspaceFiles(Storage):
    """A folder of the workspace's own files."""

    async def size(self, name: str) -> int | None:
        try:
            found = await self._workspace.call("GET", "/api/2.0/workspace/get-status", params={"path": self.path(name)})
        except WorkspaceError as error:
            if error.missing:
                return None
            raise
        return int(found.get("size") or -1)

    async def write(self, name: str, file: IO[bytes], size: int) -> None:
        _check_size(size, _LARGEST_WORKSPACE_FILE, "the workspace takes files of up to 10 MB")
        url = f"/api/2.0/workspace-files/import-file{quote(self.path(name))}?overwrite=true"
        send = partial(self._workspace.send_file, "POST", url, file, size)
        try:
            await send()
        except WorkspaceError as error:
            if not error.missing:
                raise
            folder = posixpath.dirname(self.path(name))
            await self._workspace.call("POST", "/api/2.0/workspace/mkdirs", body={"path": folder})
            await send()

    async def read(self, name: str) -> bytes | None:
        path = quote(self.path(name), safe="")
        return await self._workspace.read_file(
            f"/api/2.0/workspace/export?path={path}&direct_download=true&format=AUTO"
        )


class Dbfs(Storage):
    """A folder of DBFS. New accounts have none."""

    def _api(self, name: str) -> str:
        return self.path(name).removeprefix("/dbfs")

    async def size(self, name: str) -> int | None:
        try:
            found = await self._call("GET", "get-status", params={"path": self._api(name)})
        except WorkspaceError as error:
            if error.missing:
                return None
            raise
        return int(str(found.get("file_size", -1)))

    async def write(self, name: str, file: IO[bytes], size: int) -> None:
        async def attempt() -> None:
            # All of it anew at each try: a block whose answer was lost may be there or not.
            ask = partial(self._workspace.attempt, "POST")
            opened = await ask("/api/2.0/dbfs/create", body={"path": self._api(name), "overwrite": True})
            await FILES.run(partial(file.seek, 0))
            while data := await FILES.run(partial(file.read, _WRITE_BLOCK)):
                block = {"handle": opened["handle"], "data": base64.b64encode(data).decode("ascii")}
                await ask("/api/2.0/dbfs/add-block", body=block)
            await ask("/api/2.0/dbfs/close", body={"handle": opened["handle"]})

        with _told_of_disabled_root():
            await self._workspace.again(attempt)

    async def read(self, name: str) -> bytes | None:
        pieces: list[bytes] = []
        while True:
            params = {"path": self._api(name), "offset": str(sum(map(len, pieces))), "length": str(_READ_BLOCK)}
            try:
                found = await self._call("GET", "read", params=params)
            except WorkspaceError as error:
                if error.missing:
                    return None
                raise
            pieces.append(base64.b64decode(str(found.get("data") or "")))
            if len(pieces[-1]) < _READ_BLOCK:
                return b"".join(pieces)

    async def _call(self, method: str, what: str, *, params: dict[str, str]) -> dict[str, object]:
        with _told_of_disabled_root():
            return await self._workspace.call(method, f"/api/2.0/dbfs/{what}", params=params)


@contextmanager
def _told_of_disabled_root() -> Iterator[None]:
    """Say what to do where there is no DBFS; it looks like missing permissions, and is none."""
    try:
        yield
    except WorkspaceError as error:
        if "DBFS root is disabled" not in str(error):
            raise
        text = (
            "the DBFS root is disabled in this workspace, as in all new ones: keep the project in a volume instead,"
            " with backend_config {'upload_path': '/Volumes/<catalog>/<schema>/<volume>'}, or leave upload_path out"
        )
        raise SubmitError(text, backend="databricks") from error


async def storage_of(workspace: Workspace, upload: Upload) -> Storage:
    """The folder that the configuration asks for."""
    if upload.kind is UploadKind.VOLUME:
        return Volume(workspace, upload.path)
    if upload.kind is UploadKind.DBFS:
        return Dbfs(workspace, upload.path)
    return WorkspaceFiles(workspace, upload.path or HOME.format(user=await workspace.user()))


def _check_size(size: int, largest: int, rule: str) -> None:
    if size > largest:
        text = (
            f"the packed project has {size / 2**20:.1f} MiB, and {rule}: leave out what it does not need with a"
            " .dockerignore, or keep it in a volume with backend_config"
            " {'upload_path': '/Volumes/<catalog>/<schema>/<volume>'}"
        )
        raise SubmitError(text, backend="databricks")


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
