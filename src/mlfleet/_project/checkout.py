"""What Git knows of a folder of the user's own. Only reads."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import PROJECTS
from mlfleet._process.process import Completed, run_process
from mlfleet._project.git import clean_environ
from mlfleet._project.uri import without_credentials

__all__ = ["Checkout", "Checkouts", "ignored_by_git"]

_log = logging.getLogger("mlfleet.project")

_REMEMBERED = 256
_Signature = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class Checkout:
    """The Git working tree that a folder is in.

    Attributes:
        top: the topmost folder of the working tree.
        inside: where the folder is in it; ``.`` for the top.
        commit: of its HEAD; None if Git ignores the folder.
        repo_url: of the remote ``origin``, else of the first one, without credentials.
    """

    top: Path
    inside: str
    commit: str | None
    repo_url: str | None


@dataclass(frozen=True, slots=True)
class _Known:
    checkout: Checkout
    files: tuple[Path, ...]
    signature: _Signature


class Checkouts:
    """Tells of folders which commit they are at.

    Git is started only if HEAD, its branch or the configuration changed since the last time: hundreds of runs of one
    folder cost a few calls of ``stat`` each.
    """

    def __init__(self) -> None:
        self._known: dict[Path, _Known] = {}
        self._once: SingleFlight[Path, Checkout | None] = SingleFlight()

    def recall(self, folder: Path) -> tuple[bool, Checkout | None]:
        """Whether it is known without asking git what `folder` is in, and that. Blocking."""
        known = self._known.get(folder)
        if known is not None and _signature(known.files) == known.signature:
            return True, known.checkout
        return not _may_be_inside(folder), None

    async def find(self, folder: Path) -> Checkout | None:
        """The working tree that `folder` is in; None if there is none, or git is not installed."""
        return await self._once(folder, lambda: self._ask(folder))

    async def _ask(self, folder: Path) -> Checkout | None:
        try:
            asked = await _git(
                folder,
                *("rev-parse", "--show-toplevel", "--absolute-git-dir", "--git-common-dir"),
                *("HEAD", "--symbolic-full-name", "HEAD"),
            )
            lines = os.fsdecode(asked.stdout).splitlines()
            if len(lines) < 3:
                _log.debug("%s is in no Git working tree that can be read: %s", folder, asked.stderr[-500:])
                return None
            top, git_dir, common = Path(lines[0]), Path(lines[1]), folder / lines[2]
            has_commit = asked.returncode == 0 and len(lines) >= 5
            files = _files(git_dir, common, lines[4] if has_commit else "HEAD")
            # Before the answers: what changes while git is asked is asked again.
            signature = await PROJECTS.run(lambda: _signature(files))
            ignored = (await _git(folder, "check-ignore", "--quiet", ".")).returncode == 0
            commit = lines[3] if has_commit and not ignored else None
            inside = await PROJECTS.run(lambda: os.path.relpath(folder.resolve(), top.resolve()))
            checkout = Checkout(top, inside, commit, await _remote(folder))
        except OSError as error:
            _log.debug("git cannot be started, so the commit of %s is not known: %s", folder, error)
            return None
        self._known.pop(folder, None)
        if has_commit:
            self._known[folder] = _Known(checkout, files, signature)
            while len(self._known) > _REMEMBERED:
                self._known.pop(next(iter(self._known)))
        return checkout


async def ignored_by_git(folder: Path) -> frozenset[str]:
    """What Git leaves out of a folder: ``.gitignore`` files and the user's own excludes, but nothing that is tracked.

    Returns:
        Files and whole folders, relative with ``/``. Empty if the folder is in no Git working tree, or if Git ignores
        the folder itself, so that it has nothing to say about what is in it.
    """
    if not await PROJECTS.run(lambda: _may_be_inside(folder)):
        return frozenset()
    wanted = ("ls-files", "--others", "--ignored", "--exclude-standard", "--directory", "-z")
    try:
        listed = await _git(folder, *wanted)
        if listed.returncode == 0 and (await _git(folder, "check-ignore", "--quiet", ".")).returncode == 0:
            return frozenset()
    except OSError as error:
        _log.warning("git cannot be started, so that .gitignore in %s does not count: %s", folder, error)
        return frozenset()
    if listed.returncode:
        reason = os.fsdecode(listed.stderr).strip()[-500:]
        _log.warning("git does not tell what it ignores in %s, so that .gitignore does not count: %s", folder, reason)
        return frozenset()
    return frozenset(name.rstrip("/") for name in os.fsdecode(listed.stdout).split("\0") if name)


async def _remote(folder: Path) -> str | None:
    printed = (await _git(folder, "config", "--get-regexp", r"^remote\..*\.url$")).stdout
    remotes: dict[str, str] = {}
    for line in os.fsdecode(printed).splitlines():
        key, _, url = line.partition(" ")
        remotes.setdefault(key, url)
    first = remotes.get("remote.origin.url") or next(iter(remotes.values()), None)
    return without_credentials(first) if first else None


async def _git(folder: Path, *args: str) -> Completed:
    environ = clean_environ()
    return await run_process(
        ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", *args], cwd=folder, env=environ
    )


def _files(git_dir: Path, common: Path, ref: str) -> tuple[Path, ...]:
    """What changes when HEAD moves or the remotes change, in either format of refs."""
    return (
        git_dir / "HEAD",
        common / ref,
        common / "packed-refs",
        common / "reftable" / "tables.list",
        git_dir / "reftable" / "tables.list",
        common / "config",
        git_dir / "config.worktree",
    )


def _signature(files: tuple[Path, ...]) -> _Signature:
    return tuple(_stamp(file) for file in files)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _may_be_inside(folder: Path) -> bool:
    real = folder.resolve()
    return any((parent / ".git").exists() for parent in (real, *real.parents))
