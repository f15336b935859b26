"""A project's files as one thing: a tar that is the same for the same files, and the hash of it.

Names, contents, permissions and the targets of symlinks count; times, owners and the order on disk do not.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import stat
import tarfile
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from mlfleet._project.blocking import Stopped, stoppable
from mlfleet._project.ignoring import Ignore, read_ignore
from mlfleet.errors import FetchError

__all__ = ["Packed", "content_hash", "pack"]

_log = logging.getLogger("mlfleet.project")
# A time that every tool takes (zip knows none before 1980): 2000-01-01.
_TIME = 946684800
_CHUNK = 2**18
_IN_MEMORY = 2**23


class _Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed project.

    Attributes:
        file: the tar, at its beginning; small ones are in memory only. To be closed.
        digest: SHA-256 of the content, in hex.
        size: of the tar in bytes.
    """

    file: IO[bytes]
    digest: str
    size: int


async def content_hash(folder: Path, *, left_out: Collection[str] = frozenset()) -> str:
    """SHA-256 of the content of a project, in hex. Reads every file, in a thread.

    Args:
        folder: of the project.
        left_out: files and folders in it that do not count, unless ``.dockerignore`` takes them back.

    Raises:
        FetchError: a file cannot be read, or changes meanwhile.
        SpecError: ``.dockerignore`` is wrong.
    """
    return await stoppable(lambda stop: _hash(folder, left_out, stop))


async def pack(
    folder: Path,
    *,
    prefix: str = "",
    extra: tuple[tuple[str, bytes], ...] = (),
    left_out: Collection[str] = frozenset(),
) -> Packed:
    """Pack a project, in a thread.

    Args:
        folder: of the project.
        prefix: the folder inside the tar for its files; empty is the root.
        extra: name and content of further files at the root. They do not count for the hash.
        left_out: see `content_hash`.

    Raises:
        FetchError: a file cannot be read, or changes meanwhile.
        SpecError: ``.dockerignore`` is wrong.
    """
    made: list[Packed] = []
    read = partial(read_ignore, folder, left_out)
    try:
        await stoppable(lambda stop: made.append(_pack(folder, read, prefix, extra, stop)))
    except BaseException:
        for packed in made:  # for a caller that does not want it any more
            packed.file.close()
        raise
    return made[0]


def _hash(folder: Path, left_out: Collection[str], stop: threading.Event) -> str:
    digest = hashlib.sha256()
    for path, name in _files(folder, read_ignore(folder, left_out)):
        _check(stop)
        _add(path, name, digest, None)
    return digest.hexdigest()


def _pack(
    folder: Path,
    read: Callable[[], Ignore],
    prefix: str,
    extra: tuple[tuple[str, bytes], ...],
    stop: threading.Event,
) -> Packed:
    digest = hashlib.sha256()
    file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - the caller closes it
    try:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, content in extra:
                archive.addfile(_info(name, 0o644, len(content)), io.BytesIO(content))
            if prefix:
                info = _info(prefix.rstrip("/"), 0o755)
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            for path, name in _files(folder, read()):
                _check(stop)
                _add(path, name, digest, (archive, prefix))
        size = file.tell()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return Packed(file, digest.hexdigest(), size)


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped


def _files(folder: Path, ignore: Ignore) -> Iterator[tuple[Path, str]]:
    """Every wanted file, link and folder, sorted by name at each level."""

    def walk(at: Path, prefix: str) -> Iterator[tuple[Path, str]]:
        try:
            entries = sorted(os.scandir(at), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise _unreadable(at, error) from error
        for entry in entries:
            name = prefix + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if is_folder and ignore.prunes(name):
                continue
            if not ignore(name):
                yield Path(entry.path), name
            if is_folder:
                yield from walk(Path(entry.path), f"{name}/")

    yield from walk(folder, "")


def _add(path: Path, name: str, digest: hashlib._Hash, into: tuple[tarfile.TarFile, str] | None) -> None:
    """Hash one entry and, if there is a tar, put it in."""
    try:
        status = path.lstat()
        mode = stat.S_IMODE(status.st_mode) & 0o777
        if stat.S_ISLNK(status.st_mode):
            target = str(path.readlink())
            _feed(digest, "l", name, os.fsencode(target))
            _put(into, name, 0o777, tarfile.SYMTYPE, target)
        elif stat.S_ISDIR(status.st_mode):
            _feed(digest, "d", name, b"%o" % mode)
            _put(into, name, mode, tarfile.DIRTYPE)
        elif stat.S_ISREG(status.st_mode):
            _feed(digest, "f", name, b"%o %d" % (mode, status.st_size))
            _add_file(path, name, mode, status.st_size, digest, into)
        else:
            _log.warning("%s is neither a file nor a folder nor a link: it is left out", path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _add_file(
    path: Path, name: str, mode: int, size: int, digest: hashlib._Hash, into: tuple[tarfile.TarFile, str] | None
) -> None:
    with path.open("rb") as file:
        reader = _HashingReader(file, digest)
        if into is None:
            while reader.read(_CHUNK):
                pass
        else:
            archive, prefix = into
            archive.addfile(_info(prefix + name, mode, size), reader)  # type: ignore[arg-type]
    if reader.count != size:
        raise FetchError(f"the file {path} changed while it was packed: try again when nobody writes to it")


class _HashingReader:
    """Hashes what is read through it."""

    def __init__(self, file: IO[bytes], digest: hashlib._Hash) -> None:
        self._file = file
        self._digest = digest
        self.count = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self.count += len(data)
        return data


def _feed(digest: hashlib._Hash, kind: str, name: str, facts: bytes) -> None:
    text = os.fsencode(name)
    digest.update(b"%s %d %s %d %s\n" % (kind.encode(), len(text), text, len(facts), facts))


def _put(into: tuple[tarfile.TarFile, str] | None, name: str, mode: int, kind: bytes, target: str = "") -> None:
    if into is None:
        return
    archive, prefix = into
    info = _info(prefix + name, mode)
    info.type, info.linkname = kind, target
    archive.addfile(info)


def _info(name: str, mode: int, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode, info.size, info.mtime = mode, size, _TIME
    return info


def _unreadable(path: Path, error: OSError) -> FetchError:
    return FetchError(
        f"the project's file {path} cannot be read: {error.strerror or error}; .dockerignore can leave it out"
    )
