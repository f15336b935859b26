"""Hashes zip files, and unpacks those that nobody vetted."""

from __future__ import annotations

import contextlib
import hashlib
import io
import lzma
import os
import re
import stat
import struct
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mlfleet._project.blocking import Stopped
from mlfleet.errors import FetchError

__all__ = ["ArchiveLimits", "FileHashes", "unpack"]

_CHUNK = 1 << 20
_LONGEST_TARGET = 4096  # PATH_MAX
_REMEMBERED = 256
# A small archive may well unpack to a thousand times its size (an empty table, a log); a bomb is large, too.
_RATIO_COUNTS_FROM = 100 * 2**20
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, lzma.LZMAError, EOFError, ValueError, OverflowError)


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """The limits of an archive, so that it fills neither the disk nor the memory.

    Attributes:
        size: The largest size of a download, and of all that is unpacked from it, in bytes.
        files: The largest number of members, including folders.
        ratio: The largest ratio of the unpacked to the packed size, checked beyond the first 100 MiB.
    """

    size: int = 2 * 2**30
    files: int = 100_000
    ratio: int = 200

    @classmethod
    def from_environ(cls) -> ArchiveLimits:
        """Return the limits that ``MLFLEET_MAX_ARCHIVE_BYTES``, ``…_FILES`` and ``…_RATIO`` set.

        Raises:
            FetchError: One of them is not a positive whole number.
        """
        default = cls()
        return cls(
            size=_setting("MLFLEET_MAX_ARCHIVE_BYTES", default.size),
            files=_setting("MLFLEET_MAX_ARCHIVE_FILES", default.files),
            ratio=_setting("MLFLEET_MAX_ARCHIVE_RATIO", default.ratio),
        )


def _setting(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise FetchError(f"{name} is {text!r}: give a positive whole number")
    return int(text)


class FileHashes:
    """The SHA-256 of files, remembered by path, size, time and inode."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int, int, int], str] = {}

    def compute(self, path: Path, stop: threading.Event) -> str:
        """Return the hash of a file's content, in hexadecimal. Blocking.

        Raises:
            OSError: The file cannot be read.
            Stopped: `stop` was set.
        """
        status = path.stat()
        key = (path, status.st_size, status.st_mtime_ns, status.st_ino)
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


def unpack(archive: Path, folder: Path, *, shown: str, limits: ArchiveLimits, stop: threading.Event) -> None:
    """Unpack a zip file into a new folder. Blocking.

    What is unpacked is counted while it is written: the sizes that an archive claims do not count. Symbolic links and
    permissions are kept; set-uid bits are not.

    Args:
        archive: The zip file.
        folder: The folder, which does not exist yet; after an error it holds part of the archive.
        shown: The name of the archive in errors.
        limits: The limits; a larger archive is refused.
        stop: An event that ends the work when it is set.

    Raises:
        FetchError: The archive is broken, encrypted, too large, or would write outside of `folder`.
        Stopped: `stop` was set.
    """
    try:
        folder.mkdir()
        with _Bounded(archive, limits) as file, zipfile.ZipFile(file) as opened:
            _Unpacking(opened, folder, shown, limits, stop).run(archive.stat().st_size)
    except _BROKEN as error:
        raise FetchError(f"{shown} is not a zip file, or is broken: {error}", uri=shown) from error
    except NotImplementedError as error:
        raise FetchError(f"{shown} is packed in a way that cannot be read here: {error}", uri=shown) from error
    except OSError as error:
        raise FetchError(f"{shown} cannot be unpacked: {error.strerror or error}", uri=shown) from error


class _Bounded(io.FileIO):
    """A file that refuses large reads: zipfile reads the whole directory into memory before members can be counted."""

    def __init__(self, path: Path, limits: ArchiveLimits) -> None:
        super().__init__(path)
        self._bound = max(_CHUNK, 256 * limits.files)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self._bound:
            raise zipfile.BadZipFile("its directory is larger than MLFLEET_MAX_ARCHIVE_FILES allows for")
        return super().read(-1 if size is None else size) or b""


class _Unpacking:
    """The unpacking of one archive into one folder."""

    def __init__(
        self, opened: zipfile.ZipFile, folder: Path, shown: str, limits: ArchiveLimits, stop: threading.Event
    ) -> None:
        self._opened = opened
        self._folder = folder
        self._shown = shown
        self._limits = limits
        self._stop = stop
        self._written = 0
        self._links: dict[PurePosixPath, str] = {}

    def run(self, packed: int) -> None:
        members = self._opened.infolist()
        if len(members) > self._limits.files:
            raise self._refusal(
                f"has {len(members)} members, and {self._limits.files} are allowed (MLFLEET_MAX_ARCHIVE_FILES)"
            )
        self._allowed = min(self._limits.size, max(_RATIO_COUNTS_FROM, packed * self._limits.ratio))
        for member in members:
            if self._stop.is_set():
                raise Stopped
            self._extract(member)
        self._make_links()

    def _extract(self, member: zipfile.ZipInfo) -> None:
        path = self._path(member)
        if member.flag_bits & 0x1:
            raise self._refusal("is encrypted: unpack it yourself and give the folder")
        mode = member.external_attr >> 16 if member.create_system == 3 else 0
        if stat.S_ISLNK(mode):
            self._links[path] = self._target(member, path)
        elif member.is_dir():
            (self._folder / path).mkdir(parents=True, exist_ok=True)
        elif stat.S_IFMT(mode) in (0, stat.S_IFREG):
            self._write(member, path, (mode & 0o777 or 0o644) | 0o600)
        else:
            raise self._refusal(f"holds {member.filename!r}, which is neither a file, a folder nor a symbolic link")

    def _path(self, member: zipfile.ZipInfo) -> PurePosixPath:
        name = member.orig_filename
        segments = name.split("/")
        if name.startswith("/") or ".." in segments or "\\" in name or re.match(r"[A-Za-z]:", name):
            raise self._refusal(f"holds {name!r}, which would be written outside of the project")
        path = PurePosixPath(name)
        if (path == PurePosixPath() and not member.is_dir()) or re.search(r"[\x00-\x1f\x7f]", name):
            raise self._refusal(f"holds a member of the impossible name {name!r}")
        return path

    def _write(self, member: zipfile.ZipInfo, path: PurePosixPath, mode: int) -> None:
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # O_EXCL: a name that comes twice must not write through what the first one made.
        with contextlib.ExitStack() as stack:
            try:
                descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
            except FileExistsError:
                raise self._refusal(f"holds {member.filename!r} twice") from None
            out = stack.enter_context(os.fdopen(descriptor, "wb"))
            source = stack.enter_context(self._opened.open(member))
            while data := source.read(_CHUNK):
                self._count(len(data))
                out.write(data)

    def _target(self, member: zipfile.ZipInfo, path: PurePosixPath) -> str:
        with self._opened.open(member) as source:
            target = os.fsdecode(source.read(_LONGEST_TARGET + 1))
        self._count(len(target))
        inside = os.path.normpath(path.parent / target)
        if not target or len(target) > _LONGEST_TARGET or "\0" in target:
            raise self._refusal(f"holds the symbolic link {member.filename!r}, which points nowhere")
        if target.startswith("/") or inside == ".." or inside.startswith("../"):
            raise self._link_refusal(path)
        return target

    def _make_links(self) -> None:
        # Links come last, so that nothing is written through one; then each must end inside, through whatever others.
        for path in self._links:
            if not self._links.keys().isdisjoint(path.parents):
                raise self._refusal(f"holds {str(path)!r} below a symbolic link")
        for path, target in self._links.items():
            link = self._folder / path
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.symlink_to(target)
            except FileExistsError:
                raise self._refusal(f"holds {str(path)!r} twice") from None
        root = self._folder.resolve()
        for path in self._links:
            if not Path(os.path.realpath(self._folder / path)).is_relative_to(root):
                raise self._link_refusal(path)

    def _count(self, size: int) -> None:
        if self._stop.is_set():
            raise Stopped
        self._written += size
        if self._written <= self._allowed:
            return
        if self._allowed == self._limits.size:
            raise self._refusal(f"unpacks to more than {self._limits.size} bytes (MLFLEET_MAX_ARCHIVE_BYTES)")
        raise self._refusal(f"unpacks to more than {self._limits.ratio} times its own size (MLFLEET_MAX_ARCHIVE_RATIO)")

    def _refusal(self, why: str) -> FetchError:
        return FetchError(f"the zip {self._shown} {why}", uri=self._shown)

    def _link_refusal(self, path: PurePosixPath) -> FetchError:
        return self._refusal(f"holds the symbolic link {str(path)!r}, which leads out of the project")
