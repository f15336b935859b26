"""Fetches projects: from a URI to a folder on this machine."""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlsplit

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import PROJECTS
from mlfleet._project.archive import ArchiveLimits, FileHashes, unpack
from mlfleet._project.blocking import stoppable
from mlfleet._project.boundary import git_root
from mlfleet._project.cache import ProjectStore, projects_folder
from mlfleet._project.git import Checkout, Checkouts, Git
from mlfleet._project.http_downloads import HttpArchive
from mlfleet._project.repository import Repository
from mlfleet._project.uri import ProjectUri, UriKind, check_version, parse_uri
from mlfleet._project.working_copies import WorkingCopies, copy_tree
from mlfleet._store.lease import Leases
from mlfleet._store.locks import file_lock
from mlfleet._store.private_folders import secure_cache
from mlfleet.errors import FetchError

__all__ = ["Project", "ProjectFetcher"]

_FRESH = 2.0  # seconds
_REMEMBERED = 256
_ADDED_BY_MACOS = ("__MACOSX", ".DS_Store")
# Files that are at the top of a project or repository.
_TOP_FILE = re.compile(
    r"MLproject|python_env\.yaml|conda\.yaml|requirements\.txt|pyproject\.toml|uv\.lock|setup\.(py|cfg)"
    r"|README(\..*)?|LICENSE(\..*)?|\.gitignore",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Project:
    """A project that was fetched.

    Attributes:
        uri: The URI that the caller gave, without quotes and credentials.
        folder: The folder of the project (the ``#subdir`` if one was given): the user's own, or a pristine one in the
            cache.
        cached: True if `folder` is in the cache, so that a run needs a `working_copy`.
        source_name: The value of the tag ``mlflow.source.name``: the URI, or ``file://<top of the checkout>#<path>``
            for a folder inside a Git checkout.
        commit: The full hash, if the project is (in) a Git repository.
        repo_url: The URL of its repository, without credentials, if there is one.
        branch: The branch, if `version` named one.
        root: The folder that all files of the project must be in: its repository, or all that was fetched.
    """

    uri: str
    folder: Path
    cached: bool
    source_name: str
    commit: str | None = None
    repo_url: str | None = None
    branch: str | None = None
    root: Path | None = None


class _Kind(StrEnum):
    """What the path of a local URI can be."""

    FOLDER = "folder"
    ZIP = "zip"
    BARE = "bare repository"


# The path, too: a relative one means another folder when this process changes its own.
_Key = tuple[str, Path, str | None]


class ProjectFetcher:
    """Fetches projects into the cache; one instance serves any number of callers of one event loop.

    It holds leases on what it fetched for a while, so that ``mlfleet cache prune`` leaves it to runs that wait.

    Args:
        fresh: The time in seconds for which the answer of a Git remote or HTTP server counts as new, so that hundreds
            of runs in a row do not ask it hundreds of times. Default 2.
    """

    def __init__(self, *, fresh: float = _FRESH) -> None:
        self._root = projects_folder()
        self._fresh = fresh
        self._leases = Leases()
        self._once: SingleFlight[_Key, Project] = SingleFlight()
        self._answers: dict[_Key, tuple[float, Project]] = {}
        self._checkouts = Checkouts()
        self._hashes = FileHashes()
        self._copies = WorkingCopies(self._root)

    async def fetch(
        self, uri: str, version: str | None = None, *, on_progress: Callable[[str], None] | None = None
    ) -> Project:
        """Fetch the project that `uri` and `version` name, once for all callers that ask for it at the same time.

        Nothing is ever written into a folder of the user's own. A cancelled call leaves the work to other callers; when
        the last is gone, the work ends and leaves no part in the cache.

        Args:
            uri: A folder, a Git repository or a zip; ``#sub/dir`` picks a folder inside.
            version: A version of a Git repository: a full commit, a tag, a branch or a short commit, looked for in this
                order.
            on_progress: A function to call with a line when something is fetched that takes long.

        Raises:
            FetchError: The project cannot be fetched, or is refused; the text says why and what to do.
            UsageError: Others can write to the cache.
        """
        parsed = parse_uri(uri)
        if version is not None:
            check_version(version)
        report = on_progress or (lambda _: None)
        kind, path = None, Path()
        if parsed.kind is UriKind.LOCAL:
            kind, path, found = await PROJECTS.run(lambda: self._look(parsed, version))
            if found is not None:
                return found
            if kind is _Kind.FOLDER:
                checkout = await self._checkouts.find(path / parsed.subdir)
                folder = path / parsed.subdir
                return await PROJECTS.run(lambda: _own_project(parsed, path, git_root(folder), checkout))
        elif version is not None and parsed.kind is UriKind.ARCHIVE:
            raise _no_versions(parsed, path)
        key = uri, path, version
        if self._root == projects_folder():
            await PROJECTS.run(secure_cache)
        if kind is _Kind.ZIP:
            return await self._once(key, lambda: self._local_zip(parsed, path))
        if parsed.kind is UriKind.ARCHIVE:
            return await self._fetched(key, lambda: self._remote_zip(parsed, report))
        url = str(path) if kind is _Kind.BARE else parsed.location
        return await self._fetched(key, lambda: self._git(parsed, url, version, report))

    def look(self, uri: str, version: str | None = None) -> Project | None:
        """Return what `fetch` returns for a folder of the user's own, where git need not be asked; else None. Blocking.

        Raises:
            FetchError: See `fetch`.
        """
        parsed = parse_uri(uri)
        if version is not None:
            check_version(version)
        return self._look(parsed, version)[2] if parsed.kind is UriKind.LOCAL else None

    @asynccontextmanager
    async def working_copy(self, project: Project) -> AsyncIterator[Path]:
        """Yield the folder for one run to work in, a private one if the project is cached; it is removed at the end.

        A private one is a copy, in the folder for temporary files (``TMPDIR``), of all that the repository or zip
        holds. That of a Git project has a small ``.git``, at the commit, which finds the history in the cache. If this
        process is killed, a later one that makes copies removes it, once nothing runs in it any more.

        Args:
            project: A project that this fetcher fetched.

        Raises:
            FetchError: The copy cannot be made.
        """
        if not project.cached:
            yield project.folder
            return
        # <root>/<repository or zip>/trees/<version>/<attempt>/<name>[/<sub-folder>]
        place, _, version = project.folder.relative_to(self._root).parts[:3]
        store = ProjectStore(self._root / place, self._leases).trees
        source = await PROJECTS.run(lambda: store.acquire(version, pin=True))
        if source is None:
            raise _removed_meanwhile(project)
        try:
            if not project.folder.is_relative_to(source):  # It was removed and fetched again.
                raise _removed_meanwhile(project)
            async with self._temporary_folder() as folder:
                await stoppable(lambda stop: copy_tree(source, folder / source.name, stop))
                yield folder / source.name / project.folder.relative_to(source)
        finally:
            self._leases.release(store.lease_path(version))

    @asynccontextmanager
    async def _temporary_folder(self) -> AsyncIterator[Path]:
        """Yield an empty folder, which is removed afterwards, however the block ends."""

        async def remove(folder: Path) -> None:
            await PROJECTS.finish(lambda: self._copies.remove_folder(folder))

        try:
            folder = await PROJECTS.run(self._copies.make_folder, undo=remove)
        except OSError as error:
            raise FetchError(f"the folder for a working copy cannot be made: {error}") from error
        try:
            yield folder
        finally:
            await remove(folder)

    def close(self) -> None:
        """Give up the leases, so that ``mlfleet cache prune`` may remove what was fetched here."""
        self._leases.close()
        self._answers.clear()

    async def _fetched(self, key: _Key, work: Callable[[], Awaitable[Project]]) -> Project:
        """Return the project of that key: a fresh answer, or the result of one piece of work for all who ask now."""
        fetched_at, project = self._answers.get(key, (-math.inf, None))
        if project is not None and time.monotonic() - fetched_at < self._fresh:
            return project
        project = await self._once(key, work)
        self._answers.pop(key, None)
        self._answers[key] = time.monotonic(), project
        while len(self._answers) > _REMEMBERED:
            self._answers.pop(next(iter(self._answers)))
        return project

    def _look(self, uri: ProjectUri, version: str | None) -> tuple[_Kind, Path, Project | None]:
        """Return the kind and path of a local URI, and the project itself if git need not be asked. Blocking."""
        kind, path = _classify(uri)
        if version is not None and kind is not _Kind.BARE:
            raise _no_versions(uri, path)
        if kind is not _Kind.FOLDER:
            return kind, path, None
        folder = _subfolder(uri, path, stay_inside=False)
        tree = git_root(folder)
        checkout = None if tree is None else self._checkouts.recall(folder)
        is_known = tree is None or checkout is not None
        return kind, path, _own_project(uri, path, tree, checkout) if is_known else None

    async def _git(self, uri: ProjectUri, url: str, version: str | None, report: Callable[[str], None]) -> Project:
        key = hashlib.sha256(os.fsencode(url)).hexdigest()[:32]
        report(f"fetching {uri.text}")
        repository = Repository(uri, Git(uri, url), ProjectStore(self._root / f"git-{key}", self._leases))
        try:
            revision = await repository.resolve(version)
            commit, tree = await repository.tree(revision)
        except OSError as error:
            raise _cache_failure(uri, error) from error
        folder = await PROJECTS.run(lambda: _subfolder(uri, tree))
        shown = f"file://{quote(url)}" if url.startswith("/") else url
        return Project(
            uri.text,
            folder,
            cached=True,
            source_name=uri.text,
            commit=commit,
            repo_url=shown,
            branch=revision.branch,
            root=tree,
        )

    async def _local_zip(self, uri: ProjectUri, path: Path) -> Project:
        try:
            digest = await stoppable(lambda stop: self._hashes.compute(path, stop))
        except OSError as error:
            raise FetchError(f"the zip {uri.text} cannot be read: {error.strerror or error}", uri=uri.text) from error
        tree = await self._unpacked(uri, digest, path)
        return await self._zip_project(uri, tree, _local_name(uri, path))

    async def _remote_zip(self, uri: ProjectUri, report: Callable[[str], None]) -> Project:
        report(f"downloading {uri.text}")
        download = HttpArchive(uri, self._root / "downloads", ArchiveLimits.from_environ())
        try:
            async with file_lock(download.lock_path):
                last = await download.read_last()
                if "sha256" not in last or await self._unpacked_before(last["sha256"]) is None:
                    last = {}
                async with download.changed(last) as (digest, path):
                    tree = await self._unpacked(uri, digest, path)
        except OSError as error:
            raise _cache_failure(uri, error) from error
        return await self._zip_project(uri, tree, uri.text)

    async def _zip_project(self, uri: ProjectUri, tree: Path, source_name: str) -> Project:
        folder = await PROJECTS.run(lambda: _subfolder(uri, _project_root(uri, tree)))
        return Project(uri.text, folder, cached=True, source_name=source_name, root=tree)

    async def _unpacked_before(self, digest: str) -> Path | None:
        return await PROJECTS.run(lambda: self._zip_store(digest).trees.acquire(digest))

    def _zip_store(self, digest: str) -> ProjectStore:
        return ProjectStore(self._root / f"zip-{digest[:32]}", self._leases)

    async def _unpacked(self, uri: ProjectUri, digest: str, path: Path | None) -> Path:
        """Return the tree of the zip with that hash, which is unpacked from `path` if it is not in the cache."""
        if (found := await self._unpacked_before(digest)) is not None:
            return found
        if path is None:
            raise FetchError(f"{uri.text} was removed from the cache in the meantime: try again", uri=uri.text)
        store = self._zip_store(digest)
        try:
            async with file_lock(store.lock_path):
                return await store.make_tree(digest, uri.text.partition("#")[0], partial(_unpack_into, uri, path))
        except OSError as error:
            raise _cache_failure(uri, error) from error


def _local_name(uri: ProjectUri, path: Path) -> str:
    return f"{path}#{uri.subdir}" if uri.subdir else str(path)


def _own_project(uri: ProjectUri, path: Path, tree: Path | None, checkout: Checkout | None) -> Project:
    """Return a project in a folder of the user's own. Blocking.

    Args:
        uri: The URI of the project.
        path: The folder that the URI names, without the sub-folder.
        tree: The Git working tree that the project is in; None: it is in none.
        checkout: What git says of that; None if it says nothing.
    """
    folder = path / uri.subdir
    root = tree or Path(os.path.realpath(path))
    if checkout is None:
        return Project(uri.text, folder, cached=False, source_name=_local_name(uri, path), root=root)
    name = f"file://{checkout.top}" + ("" if checkout.inside == "." else f"#{checkout.inside}")
    return Project(
        uri.text,
        folder,
        cached=False,
        source_name=name,
        commit=checkout.commit,
        repo_url=checkout.repo_url,
        root=root,
    )


def _classify(uri: ProjectUri) -> tuple[_Kind, Path]:
    """Find out what the path of a local URI is. Blocking."""
    try:
        path = Path(os.path.abspath(uri.location))  # noqa: PTH100 - unlike resolve(), it keeps symbolic links
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FetchError(f"there is no folder, zip or Git repository {uri.text}", uri=uri.text) from None
    except (OSError, ValueError) as error:
        raise FetchError(f"{uri.text} cannot be looked at: {error}", uri=uri.text) from error
    if stat.S_ISDIR(mode):
        if not os.access(path, os.R_OK | os.X_OK):
            raise FetchError(f"the folder {uri.text} may not be read by this user", uri=uri.text)
        return (_Kind.BARE if _is_bare(path) else _Kind.FOLDER), path
    if stat.S_ISREG(mode) and path.suffix.lower() == ".zip":
        return _Kind.ZIP, path
    raise FetchError(
        f"{uri.text} is a file: a project is a folder, a Git repository or a .zip (for a script, give its folder "
        "as the project and its name as the entry point)",
        uri=uri.text,
    )


def _is_bare(path: Path) -> bool:
    return (path / "HEAD").is_file() and (path / "objects").is_dir() and (path / "refs").is_dir()


def _no_versions(uri: ProjectUri, path: Path) -> FetchError:
    """Return the error for a version of something without versions. Blocking."""
    git = path / ".git"
    if uri.kind is UriKind.LOCAL and git.is_dir():
        hint = f": the folder is run as it is; for a version of its repository give file://{quote(str(git))}"
    else:
        hint = ", and this is a folder or a zip"
    return FetchError(f"a version can be given only for a Git repository{hint} ({uri.text})", uri=uri.text)


def _subfolder(uri: ProjectUri, top: Path, *, stay_inside: bool = True) -> Path:
    """Return the sub-folder that the URI picks. Blocking."""
    folder = top / uri.subdir
    if not folder.is_dir():
        there = sorted(path.name for path in top.iterdir() if path.is_dir() and path.name != ".git")
        names = ", ".join(there[:20]) + (", …" if len(there) > 20 else "")
        raise FetchError(
            f"there is no sub-folder {uri.subdir!r} in {uri.text.partition('#')[0]}; it has {names or 'no folders'}",
            uri=uri.text,
        )
    if stay_inside and not folder.resolve().is_relative_to(top.resolve()):
        raise FetchError(
            f"the sub-folder {uri.subdir!r} is a symbolic link that leads out of the project", uri=uri.text
        )
    return folder


def _project_root(uri: ProjectUri, tree: Path) -> Path:
    """Return the folder in an unpacked zip that is the project. Blocking.

    Zips of code hosts ("Download ZIP") and of file managers hold one folder with everything in it. It is the project if
    it looks like one; a zip with, for example, only a folder of scripts is itself the project.
    """
    if uri.subdir and (tree / uri.subdir).is_dir():
        return tree
    entries = [entry for entry in tree.iterdir() if entry.name not in _ADDED_BY_MACOS]
    if len(entries) != 1 or entries[0].is_symlink() or not entries[0].is_dir():
        return tree
    is_project = any(_TOP_FILE.fullmatch(entry.name) for entry in entries[0].iterdir())
    return entries[0] if is_project else tree


async def _unpack_into(uri: ProjectUri, path: Path, attempt: Path) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(urlsplit(uri.location).path).stem).strip(".-")[:100] or "project"
    limits = ArchiveLimits.from_environ()
    await stoppable(lambda stop: unpack(path, attempt / name, shown=uri.text, limits=limits, stop=stop))
    return attempt / name


def _removed_meanwhile(project: Project) -> FetchError:
    return FetchError(f"{project.uri} was removed from the cache in the meantime: submit again", uri=project.uri)


def _cache_failure(uri: ProjectUri, error: OSError) -> FetchError:
    return FetchError(f"{uri.text} cannot be put into the cache: {error}", uri=uri.text)
