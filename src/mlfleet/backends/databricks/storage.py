"""Storage for projects, the bootstrap script and output in a workspace: volumes, workspace files and DBFS."""

from __future__ import annotations

import base64
import hashlib
import io
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import FILES, PROJECTS
from mlfleet._gzip import Compressed, compress
from mlfleet._project.content import content_hash, pack, read_ignore
from mlfleet._project.git import ignored_by_git
from mlfleet._run_log import get_logger
from mlfleet.backends.databricks.client import Workspace, WorkspaceError, unless_missing
from mlfleet.backends.databricks.config import Upload, UploadKind
from mlfleet.errors import SubmitError

__all__ = ["HOME", "Archive", "Storage", "Uploads", "open_storage"]

_log = get_logger("mlfleet.databricks")

HOME = "/Workspace/Users/{user}/.mlfleet"
# DBFS takes and returns up to 1 MiB per request; base64 makes what is sent a third longer.
_READ_BLOCK, _WRITE_BLOCK = 2**20, 2**19
_LARGEST_WORKSPACE_FILE = 10 * 2**20
_LARGEST_VOLUME_FILE = 5 * 2**30


class Storage(ABC):
    """A folder in a workspace.

    Args:
        workspace: The client of the workspace.
        root: The folder's path for code that runs in Databricks.

    Attributes:
        root: The argument `root`, without a slash at its end.
    """

    def __init__(self, workspace: Workspace, root: str) -> None:
        self._workspace = workspace
        self.root = root.rstrip("/")

    def path(self, name: str) -> str:
        """Return a file's path for code that runs in Databricks."""
        return f"{self.root}/{name}"

    @abstractmethod
    async def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; -1 if it is unknown, None if the file does not exist."""

    @abstractmethod
    async def write(self, name: str, file: IO[bytes], size: int) -> None:
        """Write a file with its folders, replacing an existing one."""

    @abstractmethod
    async def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if it does not exist."""

    @abstractmethod
    async def remove_folder(self, name: str) -> None:
        """Remove a folder with the files in it, if it exists."""


class Volume(Storage):
    """A folder of a Unity Catalog volume, through the Files API."""

    async def size(self, name: str) -> int | None:
        return await self._workspace.file_size(self._url(name))

    async def write(self, name: str, file: IO[bytes], size: int) -> None:
        _check_size(size, _LARGEST_VOLUME_FILE, "a volume takes files of up to 5 GiB")

        async def send() -> None:
            try:
                await self._workspace.send_file("PUT", self._url(name) + "?overwrite=true", file, size)
            except WorkspaceError as error:
                if error.status != 409:  # 409: another process has just written the same content
                    raise

        folder = quote(posixpath.dirname(self.path(name)))
        await _send_into_folder(send, partial(self._workspace.call, "PUT", f"/api/2.0/fs/directories{folder}"))

    async def read(self, name: str) -> bytes | None:
        return await self._workspace.read_file(self._url(name))

    async def remove_folder(self, name: str) -> None:
        folder = f"/api/2.0/fs/directories{quote(self.path(name))}"
        # A volume removes empty folders only.
        for path in await unless_missing(self._list(folder)) or ():
            await unless_missing(self._workspace.call("DELETE", f"/api/2.0/fs/files{quote(path)}"))
        await unless_missing(self._workspace.call("DELETE", folder))

    async def _list(self, url: str) -> list[str]:
        pages = self._workspace.read_pages(url, {})
        return [str(each["path"]) async for page in pages for each in page.get("contents") or ()]

    def _url(self, name: str) -> str:
        return "/api/2.0/fs/files" + quote(self.path(name))


class WorkspaceFiles(Storage):
    """A folder of workspace files."""

    async def size(self, name: str) -> int | None:
        params = {"path": self.path(name)}
        found = await unless_missing(self._workspace.call("GET", "/api/2.0/workspace/get-status", params=params))
        return None if found is None else int(found.get("size") or -1)

    async def write(self, name: str, file: IO[bytes], size: int) -> None:
        _check_size(size, _LARGEST_WORKSPACE_FILE, "the workspace takes files of up to 10 MB")
        url = f"/api/2.0/workspace-files/import-file{quote(self.path(name))}?overwrite=true"
        folder = posixpath.dirname(self.path(name))
        await _send_into_folder(
            partial(self._workspace.send_file, "POST", url, file, size),
            partial(self._workspace.call, "POST", "/api/2.0/workspace/mkdirs", body={"path": folder}),
        )

    async def read(self, name: str) -> bytes | None:
        path = quote(self.path(name), safe="")
        return await self._workspace.read_file(
            f"/api/2.0/workspace/export?path={path}&direct_download=true&format=AUTO"
        )

    async def remove_folder(self, name: str) -> None:
        body = {"path": self.path(name), "recursive": True}
        await unless_missing(self._workspace.call("POST", "/api/2.0/workspace/delete", body=body))


class Dbfs(Storage):
    """A folder of DBFS, which new accounts do not have."""

    def _api(self, name: str) -> str:
        return self.path(name).removeprefix("/dbfs")

    async def size(self, name: str) -> int | None:
        found = await unless_missing(self._call("GET", "get-status", params={"path": self._api(name)}))
        return None if found is None else int(str(found.get("file_size", -1)))

    async def write(self, name: str, file: IO[bytes], size: int) -> None:
        async def attempt() -> None:
            # Each retry writes the whole file: a block whose answer was lost may have been appended or not.
            ask = partial(self._workspace.call_once, "POST")
            opened = await ask("/api/2.0/dbfs/create", body={"path": self._api(name), "overwrite": True})
            async for data in FILES.read(file, _WRITE_BLOCK):
                block = {"handle": opened["handle"], "data": base64.b64encode(data).decode("ascii")}
                await ask("/api/2.0/dbfs/add-block", body=block)
            await ask("/api/2.0/dbfs/close", body={"handle": opened["handle"]})

        with _explain_disabled_root():
            await self._workspace.retry(attempt)

    async def read(self, name: str) -> bytes | None:
        pieces: list[bytes] = []
        while True:
            params = {"path": self._api(name), "offset": str(sum(map(len, pieces))), "length": str(_READ_BLOCK)}
            found = await unless_missing(self._call("GET", "read", params=params))
            if found is None:
                return None
            pieces.append(base64.b64decode(str(found.get("data") or "")))
            if len(pieces[-1]) < _READ_BLOCK:
                return b"".join(pieces)

    async def remove_folder(self, name: str) -> None:
        await unless_missing(self._call("POST", "delete", body={"path": self._api(name), "recursive": True}))

    async def _call(
        self, method: str, what: str, *, body: Mapping[str, Any] | None = None, params: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        with _explain_disabled_root():
            return await self._workspace.call(method, f"/api/2.0/dbfs/{what}", body=body, params=params)


async def _send_into_folder(
    send: Callable[[], Awaitable[object]], make_folder: Callable[[], Awaitable[object]]
) -> None:
    """Send a file. If its folder does not exist, make that and send the file again."""
    try:
        await send()
    except WorkspaceError as error:
        if not error.missing:
            raise
        await make_folder()
        await send()


@contextmanager
def _explain_disabled_root() -> Iterator[None]:
    """Raise an error with advice if there is no DBFS root; the workspace's answer blames missing permissions."""
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


async def open_storage(workspace: Workspace, upload: Upload) -> Storage:
    """Return the storage that the configuration names."""
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
    """A packed project in a workspace.

    Attributes:
        path: The path of its tar.gz for code that runs in Databricks.
        sha256: The SHA-256 of that file, in hex.
    """

    path: str
    sha256: str


class Uploads:
    """The uploads of this process to one workspace, each made once."""

    def __init__(self) -> None:
        self._contents: SingleFlight[Path, tuple[frozenset[str], str]] = SingleFlight()
        self._archives: SingleFlight[tuple[str, str], Archive] = SingleFlight(keep=True)
        self._scripts: SingleFlight[str, str] = SingleFlight(keep=True)

    async def upload_project(
        self, storage: Storage, folder: Path, on_progress: Callable[[str], None], *, required: tuple[str, ...] = ()
    ) -> Archive:
        """Pack the project, upload it if the storage does not have it yet, and return the archive.

        Args:
            storage: The storage to upload to.
            folder: The project's folder on this machine.
            on_progress: Called with one line on the progress.
            required: The project's files that the run reads, relative to the folder.

        Raises:
            MlfleetError: A file cannot be read, a required file is ignored, or the workspace does not take the archive.
        """
        left_out, digest = await self._contents(folder, partial(_content, folder))
        if required:
            await PROJECTS.run(partial(_check_included, folder, left_out, required))
        upload = partial(self._project, storage, folder, left_out, on_progress)
        return await self._archives((storage.root, digest), upload)

    async def upload_script(self, storage: Storage) -> str:
        """Upload the bootstrap script if the storage does not have it yet, and return its path."""

        async def upload() -> str:
            content = await PROJECTS.run(_script)
            name = f"bootstrap-{hashlib.sha256(content).hexdigest()[:16]}.py"
            return await _upload_if_missing(storage, name, io.BytesIO(content), len(content))

        return await self._scripts(storage.root, upload)

    async def _project(
        self, storage: Storage, folder: Path, left_out: frozenset[str], on_progress: Callable[[str], None]
    ) -> Archive:
        packed = await pack(folder, left_out=left_out)
        with packed.file:
            made = await PROJECTS.run(partial(compress, packed.file), undo=Compressed.close)
        with made.file:
            on_progress(f"uploading the project ({made.size / 2**20:.1f} MiB) to {storage.root}")
            path = await _upload_if_missing(storage, f"projects/{made.sha256}.tar.gz", made.file, made.size)
        return Archive(path, made.sha256)


async def _content(folder: Path) -> tuple[frozenset[str], str]:
    """Return the files that Git ignores, and the hash of the others."""
    left_out = await ignored_by_git(folder)
    return left_out, await content_hash(folder, left_out=left_out)


def _check_included(folder: Path, left_out: frozenset[str], required: tuple[str, ...]) -> None:
    ignore = read_ignore(folder, left_out)
    for name in required:
        if ignore(name):
            text = (
                f"a path parameter names {name!r} of the project, which .gitignore or .dockerignore leaves out: take it"
                f" back with the line '!{name}' in the project's .dockerignore, or give a path such as /Volumes/…"
            )
            raise SubmitError(text, backend="databricks")


async def _upload_if_missing(storage: Storage, name: str, file: IO[bytes], size: int) -> str:
    existing = await storage.size(name)
    # A file of another size is left of an interrupted upload.
    if existing is None or existing not in (size, -1):
        await storage.write(name, file, size)
        _log.info("uploaded %s (%d bytes)", storage.path(name), size)
    return storage.path(name)


def _script() -> bytes:
    return Path(__file__).with_name("bootstrap.py").read_bytes()
