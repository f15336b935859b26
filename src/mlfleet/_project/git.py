"""The ``git`` program: calls that never ask nor run what a repository brings, and what Git knows of a user's folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import PROJECTS
from mlfleet._process.process import Completed, run_process
from mlfleet._project.boundary import git_root
from mlfleet._project.uri import ProjectUri, without_credentials
from mlfleet._retry import RetryPolicy
from mlfleet._run_log import get_logger
from mlfleet._text.masking import mask
from mlfleet.errors import FetchError

__all__ = ["Checkout", "Checkouts", "Git", "ignored_by_git", "run_git"]

_log = get_logger("mlfleet.project")

_RETRIES = RetryPolicy(seconds=60, attempts=3)
_REMEMBERED = 256

_Signature = tuple[tuple[int, int, int] | None, ...]

# What ties a git command to one repository; a service may have been started by a hook, where they are set.
_LOCAL_VARIABLES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
    "GIT_GRAFT_FILE",
    "GIT_SHALLOW_FILE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_INTERNAL_SUPER_PREFIX",
    "GIT_CONFIG",
    "GIT_CEILING_DIRECTORIES",
)
_SETTINGS = (
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.askPass=",
    "credential.interactive=false",
    "fetch.recurseSubmodules=false",
    "submodule.recurse=false",
    # Neither a collection of garbage in the background, after the lock was given back, nor a fetch that hangs for ever.
    "gc.autoDetach=false",
    "maintenance.autoDetach=false",
    "http.lowSpeedLimit=1",
    "http.lowSpeedTime=60",
)
_NETWORK = "http:https:ssh:git"
# Reads its words from variables: neither a command line nor a file ever holds them.
_HELPER = (
    '!f() { if test "$1" = get; then printf "username=%s\\npassword=%s\\n" '
    '"$MLFLEET_GIT_USERNAME" "$MLFLEET_GIT_PASSWORD"; fi; }; f'
)
# What to do, by the words of git and ssh.
_ADVICE = (
    (r"dubious ownership", (
        "it belongs to another user, and git does not trust that: if you do, "
        "git config --global --add safe.directory <its path>"
    )),
    (r"Host key verification failed", (
        "the key of the ssh host is not known or has changed: connect once with ssh in a terminal and check "
        "it, or add it to ~/.ssh/known_hosts"
    )),
    (r"Permission denied \(|Too many authentication failures", (
        "the ssh host accepts none of your keys: load the right one into ssh-agent, or name it in "
        "~/.ssh/config or GIT_SSH_COMMAND"
    )),
    (r"could not read (Username|Password)|terminal prompts disabled", (
        "it asks for credentials (as some hosts do for what does not exist), and git has none: configure a "
        "credential helper (git config --global credential.helper store, cache, …) and log in once with git in "
        "a terminal, or use the ssh URL and a key"
    )),
    (r"Authentication failed|HTTP Basic: Access denied|returned error: 40[13]|Invalid username", (
        "the host refused the credentials: renew those in Git's credential helper (git credential reject), "
        "or those in the URI"
    )),
    (r"repository '.*' not found|returned error: 404|does not appear to be a git repository|not a git repository", (
        "there is no such Git repository, or you may not see it"
    )),
)  # fmt: skip
# What may be gone at the next attempt, in the words of git, curl and ssh.
_TRANSIENT = re.compile(
    r"returned error: (429|5\d\d)|Could not resolve host|Temporary failure in name resolution|timed? ?out"
    r"|Connection (refused|reset|closed)|early EOF|hung up unexpectedly|RPC failed|Empty reply from server"
    r"|Network is unreachable|No route to host|Operation too slow",
    re.I,
)


def _clean_environ() -> dict[str, str]:
    """Return this process's variables, changed so that git uses no repository of theirs, does not ask or translate."""
    environ = {name: value for name, value in os.environ.items() if name not in _LOCAL_VARIABLES}
    environ |= {
        "LC_ALL": "C",
        "GIT_TERMINAL_PROMPT": "0",
        # Set but empty: neither core.askPass nor SSH_ASKPASS is tried then (git's prompt.c).
        "GIT_ASKPASS": "",
        "SSH_ASKPASS_REQUIRE": "never",
        "GCM_INTERACTIVE": "never",
        "GIT_OPTIONAL_LOCKS": "0",
    }
    environ.pop("LANGUAGE", None)
    return environ


class Git:
    """Calls git for one repository, which is remote or a bare one on this machine.

    Args:
        uri: The URI that the caller asked for; its credentials are handed to git in variables.
        url: The repository as git takes it, without credentials: a URL, host:path or an absolute path.
    """

    def __init__(self, uri: ProjectUri, url: str) -> None:
        self._uri = uri
        self.url = url
        self.is_local = url.startswith("/")
        self._environ: dict[str, str] | None = None

    async def run(
        self, *args: str, cwd: Path, environ: Mapping[str, str] | None = None, what: str, is_remote: bool = False
    ) -> str:
        """Run a git command and return what it printed.

        Args:
            args: The arguments of git.
            cwd: The working directory.
            environ: More variables, such as GIT_DIR.
            what: The words for the error: "cannot <what>".
            is_remote: True to repeat the command when the remote fails for a moment.

        Raises:
            FetchError: The command failed.
        """

        async def attempt() -> Completed:
            done = await self.attempt(*args, cwd=cwd, environ=environ)
            if done.returncode:
                raise _GitFailed(done)
            return done

        try:
            done = await (_RETRIES.call(attempt, retry_if=_may_succeed_later) if is_remote else attempt())
        except _GitFailed as error:
            raise self.failure(error.done, what) from None
        return os.fsdecode(done.stdout)

    async def attempt(
        self, *args: str, cwd: Path, environ: Mapping[str, str] | None = None, offline: bool = False
    ) -> Completed:
        """Run a git command that may fail, and return how it ended.

        Args:
            args: The arguments of git.
            cwd: The working directory.
            environ: More variables.
            offline: True if it must not fetch missing objects from the remote.

        Raises:
            FetchError: Git cannot be started.
        """
        if self._environ is None:
            self._environ = await self._make_environ(cwd)
        variables = self._environ | dict(environ or {})
        if offline:
            variables |= {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1"}
        return await self._start(cwd, *args, environ=variables)

    def failure(self, done: Completed, what: str) -> FetchError:
        """Return the error that says why git failed, and what to do."""
        # A host may say anything, and what it says ends on a terminal.
        said = re.sub(r"[^\S\n]|[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", os.fsdecode(done.stderr or done.stdout))
        said = mask(said, self._uri.secrets)
        shown = self._uri.text
        if advice := next((advice for pattern, advice in _ADVICE if re.search(pattern, said, re.I)), None):
            return FetchError(f"cannot {what} {shown}: {advice}", uri=shown)
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        telling = [line for line in lines if re.match(r"(fatal|error|ssh|remote):", line, re.I)] or lines
        text = "; ".join(telling[-4:])[-1000:] or f"git ended with exit code {done.returncode}"
        return FetchError(f"cannot {what} {shown}: {text}", uri=shown)

    async def _make_environ(self, cwd: Path) -> dict[str, str]:
        environ = _clean_environ()
        # Submodules obey it as well: those of a repository from elsewhere cannot reach into this machine's folders.
        allowed = f"{_NETWORK}:file" if self.is_local else _NETWORK
        if (own_choice := environ.get("GIT_ALLOW_PROTOCOL")) is not None:
            allowed = ":".join(name for name in allowed.split(":") if name in own_choice.split(":"))
        environ["GIT_ALLOW_PROTOCOL"] = allowed
        if "GIT_SSH_COMMAND" not in environ and "GIT_SSH" not in environ:
            own = await self._start(cwd, "config", "--get", "core.sshCommand", environ=environ)
            if not own.stdout.strip():
                environ["GIT_SSH_COMMAND"] = "ssh -o BatchMode=yes"
        return environ | self._credential_variables(environ)

    def _credential_variables(self, environ: Mapping[str, str]) -> dict[str, str]:
        given = self._uri.credentials
        if given is None:
            return {}
        parts = urlsplit(self.url)
        section = f"credential.{parts.scheme}://{parts.netloc}"  # this host only: a redirection gets nothing
        settings = [(f"{section}.helper", _HELPER)]
        if given.password is None:
            # The user's own helpers may know the password; a token in place of the name needs none.
            settings.insert(0, (f"{section}.username", given.username))
        else:
            settings.insert(0, (f"{section}.helper", ""))
        count = int(number) if (number := environ.get("GIT_CONFIG_COUNT", "")).isdigit() else 0
        variables = {
            "MLFLEET_GIT_USERNAME": given.username,
            "MLFLEET_GIT_PASSWORD": given.password or "",
            "GIT_CONFIG_COUNT": str(count + len(settings)),
        }
        for index, (key, value) in enumerate(settings, count):
            variables |= {f"GIT_CONFIG_KEY_{index}": key, f"GIT_CONFIG_VALUE_{index}": value}
        return variables

    async def _start(self, cwd: Path, *args: str, environ: Mapping[str, str]) -> Completed:
        try:
            return await run_git(cwd, *args, environ=environ)
        except FileNotFoundError as error:
            raise FetchError(
                f"git is not installed, or not on the PATH, and the project {self._uri.text} is in a Git repository: "
                "install git (https://git-scm.com)",
                uri=self._uri.text,
            ) from error
        except OSError as error:
            raise FetchError(f"git cannot be started: {error.strerror or error}", uri=self._uri.text) from error


class _GitFailed(Exception):
    """A command of git that failed. It never leaves this module."""

    def __init__(self, done: Completed) -> None:
        self.done = done
        super().__init__(done.returncode)


def _may_succeed_later(error: BaseException) -> bool:
    return isinstance(error, _GitFailed) and _TRANSIENT.search(os.fsdecode(error.done.stderr)) is not None


@dataclass(frozen=True, slots=True)
class Checkout:
    """The Git working tree that a folder is in.

    Attributes:
        top: The topmost folder of the working tree.
        inside: The path of the folder in it; ``.`` for the top.
        commit: The commit of its HEAD; None if Git ignores the folder.
        repo_url: The URL of the remote ``origin``, else of the first one, without credentials.
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
    """Finds the working trees and commits of folders.

    Git is started only if HEAD, its branch or the configuration changed since the last time: hundreds of runs of one
    folder cost a few calls of ``stat`` each.
    """

    def __init__(self) -> None:
        self._known: dict[Path, _Known] = {}
        self._once: SingleFlight[Path, Checkout | None] = SingleFlight()

    def recall(self, folder: Path) -> Checkout | None:
        """Return the working tree that a folder is in if it is known without asking git; else None. Blocking."""
        known = self._known.get(folder)
        return known.checkout if known is not None and _signature(known.files) == known.signature else None

    async def find(self, folder: Path) -> Checkout | None:
        """Return the working tree that `folder` is in; None if there is none, or git is not installed."""
        return await self._once(folder, lambda: self._ask(folder))

    async def _ask(self, folder: Path) -> Checkout | None:
        try:
            asked = await run_git(
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
            files = _ref_files(git_dir, common, lines[4] if has_commit else "HEAD")
            # Before the answers: what changes while git is asked is asked again.
            signature = await PROJECTS.run(lambda: _signature(files))
            ignored = (await run_git(folder, "check-ignore", "--quiet", ".")).returncode == 0
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
    """Return what Git leaves out of a folder: by ``.gitignore`` and the user's own excludes, but nothing tracked.

    Returns:
        Files and whole folders, relative with ``/``. Empty if the folder is in no Git working tree, or if Git ignores
        the folder itself, so that it has nothing to say about what is in it.
    """
    if await PROJECTS.run(lambda: git_root(folder)) is None:
        return frozenset()
    wanted = ("ls-files", "--others", "--ignored", "--exclude-standard", "--directory", "-z")
    try:
        listed = await run_git(folder, *wanted)
        if listed.returncode == 0 and (await run_git(folder, "check-ignore", "--quiet", ".")).returncode == 0:
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
    printed = (await run_git(folder, "config", "--get-regexp", r"^remote\..*\.url$")).stdout
    remotes: dict[str, str] = {}
    for line in os.fsdecode(printed).splitlines():
        key, _, url = line.partition(" ")
        remotes.setdefault(key, url)
    first = remotes.get("remote.origin.url") or next(iter(remotes.values()), None)
    return without_credentials(first) if first else None


async def run_git(folder: Path, *args: str, environ: Mapping[str, str] | None = None) -> Completed:
    """Run a git command in a folder, without the programs that its repository names.

    Args:
        folder: The working directory.
        args: The arguments of git.
        environ: All variables; None: those of this process that tie git to no repository.

    Raises:
        OSError: Git cannot be started.
    """
    settings = [word for setting in _SETTINGS for word in ("-c", setting)]
    return await run_process(["git", *settings, *args], cwd=folder, env=environ or _clean_environ())


def _ref_files(git_dir: Path, common: Path, ref: str) -> tuple[Path, ...]:
    """Return the files that change when HEAD moves or the remotes change, in either format of refs."""
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
