"""Git repositories in the cache: a mirror of each, and a pristine tree of each commit that was asked for.

The meaning of a version: a full hash is that commit. Anything else is asked of the remote: a name that begins with
``refs/`` is that ref; otherwise a tag comes before a branch of the same name (as in ``git checkout`` after a clone, and
so in the reference), ``refs/heads/<name>`` picks the branch; then a short hash of 4 or more digits. No version is the
remote's HEAD.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlfleet._concurrency.threads import PROJECTS
from mlfleet._project.cache import ProjectStore
from mlfleet._project.git import Git
from mlfleet._project.uri import ProjectUri
from mlfleet._store.content_store import remove_tree
from mlfleet._store.locks import file_lock
from mlfleet.errors import FetchError

__all__ = ["Repository", "Revision"]

_FULL = re.compile(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")
_SHORT = re.compile(r"[0-9a-fA-F]{4,63}")
_REFSPECS = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")


@dataclass(frozen=True, slots=True)
class Revision:
    """The present meaning of a version in a repository.

    Attributes:
        commit: The hash of the commit, which may be short, or that of a tag, until the mirror was asked.
        branch: The name of the branch, if the version is one.
        ref: The name under which the remote has it, if it was named so.
    """

    commit: str
    branch: str | None = None
    ref: str | None = None


class Repository:
    """One Git repository and what the cache has of it.

    Args:
        uri: The URI that the caller asked for.
        git: Calls git for the repository.
        store: What the cache has of the repository.
    """

    def __init__(self, uri: ProjectUri, git: Git, store: ProjectStore) -> None:
        self._uri = uri
        self._git = git
        self._store = store

    async def resolve(self, version: str | None) -> Revision:
        """Find out what `version` means, by one question to the remote, or none for a full hash.

        Raises:
            FetchError: The remote cannot be asked, or does not know the version.
        """
        if version is not None and _FULL.fullmatch(version):
            return Revision(version.lower())
        candidates = _candidates(version)
        # Outside of any repository, whose configuration would count.
        printed = await self._git.run(
            "ls-remote", "--", self._git.url, *candidates, cwd=Path("/"), what="read the Git repository", is_remote=True
        )
        refs = _parse_refs(printed)
        for ref in candidates:
            if ref in refs and not ref.endswith("^{}"):
                branch = ref.removeprefix("refs/heads/") if ref.startswith("refs/heads/") else None
                return Revision(refs.get(f"{ref}^{{}}", refs[ref]), branch, ref)
        if version is not None and _SHORT.fullmatch(version):
            return Revision(version.lower())
        raise await self._unknown(version)

    async def tree(self, revision: Revision) -> tuple[str, Path]:
        """Return the full commit and its pristine folder in the cache, which is made if it is not there.

        A call that is cancelled leaves the cache as it was, or with one more complete tree.

        Raises:
            FetchError: The commit cannot be fetched.
        """
        if (found := await PROJECTS.run(lambda: self._store.trees.acquire(revision.commit))) is not None:
            return revision.commit, found
        async with file_lock(self._store.lock_path):
            commit = await self._commit(revision)
            return commit, await self._store.make_tree(commit, self._shown, partial(self._check_out, commit))

    async def _commit(self, revision: Revision) -> str:
        """Return the full hash of a commit, which is in the mirror afterwards."""
        if await PROJECTS.run(self._store.mirror.is_dir):
            if found := await self._lookup(revision.commit):
                return found
            await self._update()
        else:
            await self._clone(_object_format(revision.commit))
        if found := await self._lookup(revision.commit):
            return found
        if revision.ref or _FULL.fullmatch(revision.commit):
            # Behind no branch or tag: a pull request, a commit that was pushed away. Most hosts give it all the same.
            wanted = revision.ref or revision.commit
            done = await self._git.attempt(
                "fetch", "--quiet", *self._filter(), "--", "origin", wanted, cwd=self._store.mirror
            )
            if not done.returncode and (found := await self._lookup(revision.commit)):
                return found
        raise await self._unknown(revision.commit)

    async def _lookup(self, commit: str) -> str | None:
        done = await self._git.attempt(
            "rev-parse", "--verify", f"{commit}^{{commit}}", cwd=self._store.mirror, offline=True
        )
        if b"ambiguous" in done.stderr:
            raise FetchError(
                f"the short hash {commit} names several objects in {self._uri.text}: give more digits of it",
                uri=self._uri.text,
            )
        return os.fsdecode(done.stdout).strip() or None if not done.returncode else None

    async def _clone(self, object_format: str) -> None:
        attempt = await PROJECTS.run(lambda: self._store.begin_mirror(self._shown))
        try:
            await self._init(attempt, object_format, "--bare")
            await self._git.run("config", "remote.origin.url", self._git.url, cwd=attempt, what="cache")
            await self._fetch(attempt)
            await PROJECTS.run(lambda: self._store.publish_mirror(attempt))
        except BaseException:
            await PROJECTS.finish(lambda: remove_tree(attempt))
            raise

    async def _init(self, folder: Path, object_format: str, *options: str) -> None:
        """Make an empty repository, without the hooks of the user's template."""
        await self._git.run(
            *("init", "--quiet", "--template=", f"--object-format={object_format}", *options, "--", str(folder)),
            cwd=folder.parent,
            what="cache",
        )

    async def _update(self) -> None:
        try:
            await self._fetch(self._store.mirror)
        except FetchError:
            # A process that was killed may have left the mirror broken or locked. If that is not it, this fails, too.
            done = await self._git.attempt("rev-parse", "--show-object-format", cwd=self._store.mirror, offline=True)
            await self._clone("sha256" if b"sha256" in done.stdout else "sha1")

    async def _fetch(self, mirror: Path) -> None:
        await self._git.run(
            *("fetch", "--quiet", "--prune", "--no-tags", "--force", *self._filter()),
            *("--", "origin", *_REFSPECS),
            cwd=mirror,
            what="fetch the Git repository",
            is_remote=True,
        )
        await self._git.run(
            "pack-refs", "--all", "--prune", cwd=mirror, what="cache"
        )  # one file for `_link_to_mirror` to read

    def _filter(self) -> tuple[str, ...]:
        # Without the files of old commits; a server that does not know filters sends everything.
        return () if self._git.is_local else ("--filter=blob:none",)

    async def _check_out(self, commit: str, attempt: Path) -> Path:
        tree = attempt / _folder_name(self._git.url)
        await self._init(tree, _object_format(commit))
        # A ref that keeps the commit from garbage collection when its branch moves on.
        mirror = self._store.mirror
        await self._git.run("update-ref", f"refs/mlfleet/{commit}", commit, cwd=mirror, what="cache")
        await PROJECTS.run(lambda: _link_to_mirror(tree, mirror, commit))
        # By the mirror, so that the files it fetches stay there for the next commit.
        files = {"GIT_DIR": str(mirror), "GIT_WORK_TREE": str(tree), "GIT_INDEX_FILE": str(tree / ".git" / "index")}
        await self._git.run(
            *("read-tree", "--reset", "-u", commit),
            cwd=tree,
            environ=files,
            what=f"check out commit {commit} of",
            is_remote=True,
        )
        if await PROJECTS.run((tree / ".gitmodules").is_file):
            await self._git.run(
                *("submodule", "--quiet", "update", "--init", "--recursive"),
                cwd=tree,
                what="fetch the submodules of",
                is_remote=True,
            )
            await PROJECTS.run(lambda: _move_module_objects(tree, attempt))
        return tree

    @property
    def _shown(self) -> str:
        """The URI of the repository without the sub-folder."""
        return self._uri.text.partition("#")[0]

    async def _unknown(self, version: str | None) -> FetchError:
        shown = self._uri.text
        done = await self._git.attempt("ls-remote", "--heads", "--tags", "--", self._git.url, cwd=Path("/"))
        refs = [ref for ref in _parse_refs(os.fsdecode(done.stdout)) if not ref.endswith("^{}")]
        names = sorted({ref.split("/", 2)[2] for ref in refs})
        if version is None:
            there = f"give a version; it has {_some(names)}" if names else "it is empty: push a commit first"
            return FetchError(f"the Git repository {shown} has no default branch: {there}", uri=shown)
        near = difflib.get_close_matches(version, names, 3) or names
        return FetchError(
            f"the Git repository {shown} has no commit, branch or tag {version!r}; it has {_some(near)}", uri=shown
        )


def _candidates(version: str | None) -> list[str]:
    if version is None or version == "HEAD":
        return ["HEAD"]
    names = [version] if version.startswith("refs/") else [f"refs/tags/{version}", f"refs/heads/{version}"]
    return [ref for name in names for ref in (name, f"{name}^{{}}")]


def _parse_refs(printed: str) -> dict[str, str]:
    pairs = (line.split("\t", 1) for line in printed.splitlines() if "\t" in line)
    return {ref: commit for commit, ref in pairs}


def _some(names: list[str]) -> str:
    return (", ".join(names[:8]) + (", …" if len(names) > 8 else "")) or "no branch or tag"


def _folder_name(url: str) -> str:
    last = re.split(r"[/:]", url.rstrip("/"))[-1] or "project"
    if last == ".git":
        last = url.rstrip("/").split("/")[-2]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last.removesuffix(".git")).strip(".-")
    return name[:100] or "project"


def _object_format(commit: str) -> str:
    return "sha256" if len(commit) == 64 else "sha1"


def _link_to_mirror(tree: Path, mirror: Path, commit: str) -> None:
    """Make the tree's own small ``.git`` find the commit, its history and its tags in the mirror. Blocking."""
    git = tree / ".git"
    for empty in ("objects/pack", "refs/heads", "refs/tags"):  # git makes them when it needs them
        (git / empty).rmdir()
    (git / "objects" / "info").mkdir(parents=True, exist_ok=True)
    (git / "objects" / "info" / "alternates").write_bytes(os.fsencode(mirror / "objects") + b"\n")
    (git / "HEAD").write_text(f"{commit}\n", encoding="ascii")
    config = (mirror / "config").read_text(encoding="utf-8", errors="surrogateescape")
    (git / "config").write_text(
        re.sub(r"bare = true", "bare = false", config, count=1), encoding="utf-8", errors="surrogateescape"
    )
    if (mirror / "packed-refs").is_file():
        lines = (mirror / "packed-refs").read_bytes().splitlines(keepends=True)
        (git / "packed-refs").write_bytes(b"".join(_tags(lines)))


def _tags(lines: list[bytes]) -> list[bytes]:
    kept: list[bytes] = []
    tag = False
    for line in lines:
        if not line.startswith(b"^"):
            tag = line.startswith(b"#") or b" refs/tags/" in line
        if tag:
            kept.append(line)
    return kept


def _move_module_objects(tree: Path, attempt: Path) -> None:
    """Move the histories of submodules out of the tree, so that a working copy does not copy them. Blocking."""
    heads = [head.parent for head in (tree / ".git" / "modules").rglob("HEAD") if (head.parent / "objects").is_dir()]
    for number, module in enumerate(sorted(heads)):
        place = attempt / "modules" / str(number)
        place.parent.mkdir(exist_ok=True)
        shutil.move(module / "objects", place)
        (module / "objects" / "info").mkdir(parents=True)
        (module / "objects" / "info" / "alternates").write_bytes(os.fsencode(place) + b"\n")
