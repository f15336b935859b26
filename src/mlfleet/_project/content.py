"""A project's files as a whole: which of them count, their hash, and a tar that is the same for the same files.

Names, contents, permissions and the targets of symlinks count; times, owners and the order on disk do not.

``.dockerignore`` leaves files out, as the matching code of the docker command reads it
(https://docs.docker.com/build/concepts/context/#dockerignore-files, https://github.com/moby/patternmatcher).
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import re
import stat
import tarfile
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mlfleet._project.blocking import Stopped, stoppable
from mlfleet._run_log import get_logger
from mlfleet.errors import FetchError, SpecError

__all__ = ["Ignore", "Packed", "content_hash", "pack", "read_ignore"]

_log = get_logger("mlfleet.project")
# A time that every tool takes (zip knows none before 1980): 2000-01-01.
_TIME = 946684800
_CHUNK = 2**18
_IN_MEMORY = 2**23

_FILE_NAME = ".dockerignore"
_DEFAULTS = (
    ".git",
    "**/__pycache__",
    # Where MLflow keeps runs by default: the content would differ after every run.
    "mlruns",
    "mlartifacts",
    "mlflow.db",
    "mlflow.db-journal",
    "mlflow.db-shm",
    "mlflow.db-wal",
)
_LARGEST = 2**20


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed project.

    Attributes:
        file: The tar, at its beginning; small ones are in memory only. The caller must close it.
        digest: The SHA-256 of the content, in hexadecimal.
        size: The size of the tar in bytes.
    """

    file: IO[bytes]
    digest: str
    size: int


async def content_hash(folder: Path, *, left_out: Collection[str] = frozenset()) -> str:
    """Return the SHA-256 of the content of a project, in hexadecimal. Reads every file, in a thread.

    Args:
        folder: The folder of the project.
        left_out: The files and folders in it that do not count, unless ``.dockerignore`` takes them back.

    Raises:
        FetchError: A file cannot be read, or changes meanwhile.
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
        folder: The folder of the project.
        prefix: The folder inside the tar for its files; empty is the root.
        extra: The name and content of further files at the root. They do not count for the hash.
        left_out: See `content_hash`.

    Raises:
        FetchError: A file cannot be read, or changes meanwhile.
        SpecError: ``.dockerignore`` is wrong.
    """
    made: list[Packed] = []
    try:
        await stoppable(lambda stop: made.append(_pack(folder, left_out, prefix, extra, stop)))
    except BaseException:
        for packed in made:  # The caller was cancelled when it was packed already.
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
    left_out: Collection[str],
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
            for path, name in _files(folder, read_ignore(folder, left_out)):
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
    """Yield every file, link and folder that counts, sorted by name at each level."""

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
    """Hash one entry and, if there is a tar, add it."""
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
    """A file that hashes what is read from it."""

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


@dataclass(frozen=True, slots=True)
class _Pattern:
    expression: re.Pattern[str]
    exception: bool


class Ignore:
    """The patterns of a ``.dockerignore``. The last one that matches a path, or a folder above it, decides.

    Args:
        patterns: The patterns, in their order.
        left_out: The files and folders that are left out unless an exception takes them back.
    """

    def __init__(self, patterns: Sequence[_Pattern], left_out: Collection[str] = frozenset()) -> None:
        self._left_out = left_out
        self._patterns = patterns
        self._has_exceptions = any(pattern.exception for pattern in self._patterns)

    def __call__(self, path: str) -> bool:
        """Return True if the file or folder `path` (relative, with ``/``) is left out."""
        parts = path.split("/")
        prefixes = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        ignored = any(prefix in self._left_out for prefix in prefixes)
        for pattern in self._patterns:
            if pattern.exception == ignored and any(pattern.expression.fullmatch(prefix) for prefix in prefixes):
                ignored = not pattern.exception
        return ignored

    def prunes(self, folder: str) -> bool:
        """Return True if everything below `folder` is left out."""
        return not self._has_exceptions and self(folder)


def read_ignore(folder: Path, left_out: Collection[str] = frozenset()) -> Ignore:
    """Read the patterns for a project: the defaults, then its ``.dockerignore``, which may take them back. Blocking.

    Args:
        folder: The folder of the project.
        left_out: See `Ignore`.

    Raises:
        SpecError: The file cannot be read, or a line is not a pattern.
    """
    path = folder / _FILE_NAME
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST).decode("utf-8-sig")
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SpecError(f"it cannot be read: {reason}", path=path) from error
    patterns = [_pattern(line) for line in _DEFAULTS]
    for number, line in enumerate(text.splitlines(), 1):
        try:
            patterns.append(_pattern(line))
        except re.error as error:
            if path.is_symlink():  # It may lead to a file that is not a list of patterns: quote nothing of it.
                raise SpecError("this line is not a pattern", path=path, line=number) from None
            raise SpecError(f"{line!r} is not a pattern: {error}", path=path, line=number) from error
    return Ignore([pattern for pattern in patterns if pattern is not None], left_out)


def _pattern(line: str) -> _Pattern | None:
    if line.startswith("#"):
        return None
    text = line.strip()
    exception = text.startswith("!")
    text = text[1:].strip() if exception else text
    if not text:
        return None
    text = posixpath.normpath(text).lstrip("/")
    if text in ("", "."):
        return None
    return _Pattern(re.compile(_expression(text), re.S), exception)


def _expression(text: str) -> str:
    made: list[str] = []
    at = 0
    while at < len(text):
        if text.startswith("**/", at):
            made.append("(?:.*/)?")
            at += 3
        elif text.startswith("**", at):
            made.append(".*")
            at += 2
        elif text[at] == "*":
            made.append("[^/]*")
            at += 1
        elif text[at] == "?":
            made.append("[^/]")
            at += 1
        elif text[at] == "[":
            end = text.find("]", at + 2)
            if end < 0:
                raise re.error("a bracket is not closed")
            inside = text[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            made.append(f"[{inside}]")
            at = end + 1
        elif text[at] == "\\" and at + 1 < len(text):
            made.append(re.escape(text[at + 1]))
            at += 2
        else:
            made.append(re.escape(text[at]))
            at += 1
    return "".join(made)
