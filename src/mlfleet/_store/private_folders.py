"""Folders and files that only this user and root can change: what is in them is run or believed.

A folder is refused if another user could put something there, or could replace the folder itself: by owning it or a
folder or link on the way to it, or by write permission. As for ssh, that of the group counts unless the group is the
user's own or root's. A folder on the way may be writable if it is sticky, as ``/tmp`` is: nobody can rename what others
own there. Access control lists do not count.

``MLFLEET_TRUSTED_FOLDERS`` lists folders that are shared on purpose.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from mlfleet._paths import cache_folder, environments_folder, runs_folder
from mlfleet.errors import UsageError

__all__ = [
    "check_file",
    "check_owner",
    "secure_cache",
    "secure_environments",
    "secure_state",
]

_TRUSTED = "MLFLEET_TRUSTED_FOLDERS"

_MOST_LINKS = 40  # as Linux
# The folders that were found safe, by the setting that counted then.
_safe: set[tuple[Path, str]] = set()


def secure_cache() -> None:
    """Make the cache folder, readable for its owner only, and check it. Blocking, and cheap but for the first time.

    Raises:
        UsageError: Others can write to it.
    """
    is_given = bool(os.environ.get("MLFLEET_CACHE_DIR"))
    _secure(cache_folder(), "the cache", "MLFLEET_CACHE_DIR", is_given=is_given)


def secure_state() -> None:
    """Make the state folder, readable for its owner only, and check it. Blocking, and cheap but for the first time.

    Raises:
        UsageError: Others can write to it.
    """
    is_given = bool(os.environ.get("MLFLEET_STATE_DIR"))
    _secure(runs_folder().parent, "the state of runs", "MLFLEET_STATE_DIR", is_given=is_given)


def secure_environments(root: Path) -> None:
    """Make the folder of environments, and check it. Blocking, and cheap but for the first time.

    Args:
        root: The folder.

    Raises:
        UsageError: Others can write to it.
    """
    is_given = root != environments_folder() or bool(os.environ.get("MLFLOW_ENV_ROOT"))
    if not is_given:
        secure_cache()
    _secure(root, "environments", "MLFLOW_ENV_ROOT", is_given=is_given, mode=0o755 if is_given else 0o700)


def _secure(folder: Path, what: str, variable: str, *, is_given: bool, mode: int = 0o700) -> None:
    """Make a folder if it is not there, and check that only this user and root can change what is in it. Blocking.

    If it cannot be made, nothing is raised: the caller's own attempt will say why.

    Args:
        folder: The folder.
        what: The description of its content, for the error.
        variable: The environment variable that names the folder.
        is_given: True if the user chose the folder. Otherwise it is made private if it was not.
        mode: The permissions of a new folder.

    Raises:
        UsageError: Others can write to it.
    """
    key = folder, os.environ.get(_TRUSTED, "")
    if key in _safe:
        return
    with suppress(OSError):
        _make(folder, mode)
    if not is_given:
        with suppress(OSError):
            _make_private(folder)
    with suppress(OSError):
        if not _is_trusted(folder):
            _check(folder, what, variable)
        _safe.add(key)


def check_owner(path: Path, what: str) -> None:
    """Check that a file or folder that is there belongs to this user or to root. Blocking.

    Args:
        path: The file or folder.
        what: The description of the folder that it was found in, for the error.

    Raises:
        UsageError: It belongs to another user, in a folder that is not trusted.
        OSError: It is not there.
    """
    owner = path.lstat().st_uid
    if owner not in _owners() and not _is_trusted(path):
        raise UsageError(
            f"{path} in the folder of {what} belongs to {_name_user(owner)}, and would be run: remove it"
            f"; if you share the folder on purpose, list it in {_TRUSTED}"
        )


def check_file(path: Path, what: str) -> None:
    """Check that only this user and root can change or replace a file that is there. Blocking.

    Args:
        path: The file.
        what: The description of its content, for the error.

    Raises:
        UsageError: Others can, and the file is not in a trusted folder.
        OSError: It is not there.
    """
    found = None if _is_trusted(path) else _find_problem(path)
    if found is not None:
        problem, remedy = found
        raise UsageError(
            f"{what} in {path} are refused, since what others write there would be run or believed: {problem}"
            f"{f'; {remedy}' if remedy else ''}. If you share it on purpose, list {path.parent} in {_TRUSTED}"
        )


def _make(folder: Path, mode: int) -> None:
    if folder.is_dir():
        return
    missing = [folder, *(parent for parent in folder.parents if not parent.exists())]
    for each in reversed(missing):
        with suppress(FileExistsError):
            # Whatever the umask, nobody else may write to a folder that is made here.
            each.mkdir(mode=mode if each == folder else 0o755)


def _make_private(folder: Path) -> None:
    status = folder.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        folder.chmod(stat.S_IMODE(status.st_mode) & 0o700)


def _check(folder: Path, what: str, variable: str) -> None:
    found = _find_problem(folder)
    if found is not None:
        problem, remedy = found
        raise UsageError(
            f"the folder of {what}, {folder}, is refused, since what others put there would be run or believed: "
            f"{problem}; {f'{remedy}, or ' if remedy else ''}choose another folder by {variable}. If you share it on "
            f"purpose, list {folder} in {_TRUSTED}"
        )


def _find_problem(path: Path) -> tuple[str, str] | None:
    """Return why others can change a file or folder, and what helps (may be empty); None if they cannot."""
    real = os.path.realpath(path)
    for step, status in _steps(path):
        is_last = str(step) == real
        owners = _owners() if is_last else _owners() | _owner_of_home()
        if status.st_uid not in owners:
            return f"{step} belongs to {_name_user(status.st_uid)}", ""
        if _others_can_write(status) and (is_last or not status.st_mode & stat.S_ISVTX):
            return f"other users can write to {step}", f"`chmod go-w {step}`"
    return None


def _steps(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield every folder and link on the way to a file or folder, and that itself."""
    here = Path("/")
    yield here, here.lstat()
    parts = list(path.parts[1:])
    links = 0
    while parts:
        part = parts.pop(0)
        if part in ("..", "."):
            here = here.parent if part == ".." else here
            continue
        status = (here / part).lstat()
        if not stat.S_ISLNK(status.st_mode):
            here /= part
            yield here, status
            continue
        if status.st_uid not in _owners() | _owner_of_home():
            yield here / part, status  # its own permissions mean nothing
        links += 1
        if links > _MOST_LINKS:
            raise OSError(f"too many links on the way to {path}")
        target = (here / part).readlink()
        here = Path("/") if target.is_absolute() else here
        parts = [*target.parts[1 if target.is_absolute() else 0 :], *parts]


def _is_trusted(path: Path) -> bool:
    listed = [Path(text).expanduser() for text in os.environ.get(_TRUSTED, "").split(os.pathsep) if text.strip()]
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(each)) for each in listed if each.is_absolute())


def _owners() -> frozenset[int]:
    """Return the users who may own what is run: this one and root, who owns ``/`` in a user namespace, too."""
    return frozenset({os.geteuid(), 0, _owner_of("/")})


def _owner_of_home() -> frozenset[int]:
    """Return the owner of the home folder: root in a container often has that of another user mounted."""
    with suppress(OSError, RuntimeError):
        return frozenset({_owner_of(str(Path.home()))})
    return frozenset()


@cache
def _owner_of(path: str) -> int:
    return Path(path).stat().st_uid


def _others_can_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_own_group(status.st_gid)


@cache
def _is_own_group(gid: int) -> bool:
    """Return True for the group of root, and for the group that many systems make for each user."""
    if gid == 0:
        return True
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _name_user(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the user {uid}"
