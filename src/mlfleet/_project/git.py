"""The ``git`` program: how to call it so that it never asks nor runs what a repository brings; what it says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from mlfleet._process.process import Completed, run_process
from mlfleet._project.uri import ProjectUri
from mlfleet._text.masking import mask
from mlfleet.errors import FetchError

__all__ = ["Git", "clean_environ"]

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
_FOREIGN = re.compile(r"dubious ownership", re.I)
_UNKNOWN_HOST = re.compile(r"Host key verification failed", re.I)
_NO_KEY = re.compile(r"Permission denied \(|Too many authentication failures", re.I)
_NO_CREDENTIALS = re.compile(r"could not read (Username|Password)|terminal prompts disabled", re.I)
_REFUSED = re.compile(r"Authentication failed|HTTP Basic: Access denied|returned error: 40[13]|Invalid username", re.I)
_NOT_THERE = re.compile(
    r"repository '.*' not found|returned error: 404|does not appear to be a git repository|not a git repository", re.I
)


def clean_environ() -> dict[str, str]:
    """This process's variables, changed so that git is tied to no repository, does not ask and does not translate."""
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
    """Calls git for one repository, which is far away or a bare one on this machine."""

    def __init__(self, uri: ProjectUri, url: str) -> None:
        """Prepare the calls; nothing runs yet.

        Args:
            uri: what the caller asked for; its credentials are handed to git in variables.
            url: the repository as git takes it, without credentials: a URL, host:path or an absolute path.
        """
        self._uri = uri
        self.url = url
        self.is_local = url.startswith("/")
        self._environ: dict[str, str] | None = None

    async def run(
        self, *args: str, cwd: Path, environ: Mapping[str, str] | None = None, what: str, offline: bool = False
    ) -> str:
        """Run a git command and give what it printed.

        Args:
            args: of git.
            cwd: its working directory.
            environ: more variables, such as GIT_DIR.
            what: for the error: "cannot <what>".
            offline: it must not fetch missing objects from the remote.

        Raises:
            FetchError: it failed.
        """
        done = await self.attempt(*args, cwd=cwd, environ=environ, offline=offline)
        if done.returncode:
            raise self.failure(done, what)
        return os.fsdecode(done.stdout)

    async def attempt(
        self, *args: str, cwd: Path, environ: Mapping[str, str] | None = None, offline: bool = False
    ) -> Completed:
        """Like `run`, for commands that may fail: nothing is raised but for a missing git."""
        if self._environ is None:
            self._environ = await self._make_environ(cwd)
        variables = self._environ | dict(environ or {})
        if offline:
            variables |= {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1"}
        return await self._start(args, cwd, variables)

    def failure(self, done: Completed, what: str) -> FetchError:
        """The error that tells why git failed, and what to do."""
        # A host may say anything, and what it says ends on a terminal.
        said = re.sub(r"[^\S\n]|[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", os.fsdecode(done.stderr or done.stdout))
        said = mask(said, self._uri.secrets)
        shown = self._uri.text
        if advice := self._advice(said):
            return FetchError(f"cannot {what} {shown}: {advice}", uri=shown)
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        telling = [line for line in lines if re.match(r"(fatal|error|ssh|remote):", line, re.I)] or lines
        text = "; ".join(telling[-4:])[-1000:] or f"git ended with exit code {done.returncode}"
        return FetchError(f"cannot {what} {shown}: {text}", uri=shown)

    def _advice(self, said: str) -> str | None:
        if _FOREIGN.search(said):
            return (
                "it belongs to another user, and git does not trust that: if you do, "
                "git config --global --add safe.directory <its path>"
            )
        if _UNKNOWN_HOST.search(said):
            return (
                "the key of the ssh host is not known or has changed: connect once with ssh in a terminal and check "
                "it, or add it to ~/.ssh/known_hosts"
            )
        if _NO_KEY.search(said):
            return (
                "the ssh host accepts none of your keys: load the right one into ssh-agent, or name it in "
                "~/.ssh/config or GIT_SSH_COMMAND"
            )
        if _NO_CREDENTIALS.search(said):
            return (
                "it asks for credentials (as some hosts do for what does not exist), and git has none: configure a "
                "credential helper (git config --global credential.helper store, cache, …) and log in once with git in "
                "a terminal, or use the ssh URL and a key"
            )
        if _REFUSED.search(said):
            return (
                "the host refused the credentials: renew those in Git's credential helper (git credential reject), "
                "or those in the URI"
            )
        if _NOT_THERE.search(said):
            return "there is no such Git repository, or you may not see it"
        return None

    async def _make_environ(self, cwd: Path) -> dict[str, str]:
        environ = clean_environ()
        # Submodules obey it as well: those of a repository from elsewhere cannot reach into this machine's folders.
        allowed = f"{_NETWORK}:file" if self.is_local else _NETWORK
        if (own_choice := environ.get("GIT_ALLOW_PROTOCOL")) is not None:
            allowed = ":".join(name for name in allowed.split(":") if name in own_choice.split(":"))
        environ["GIT_ALLOW_PROTOCOL"] = allowed
        if "GIT_SSH_COMMAND" not in environ and "GIT_SSH" not in environ:
            own = await self._start(("config", "--get", "core.sshCommand"), cwd, environ)
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

    async def _start(self, args: Sequence[str], cwd: Path, environ: Mapping[str, str]) -> Completed:
        settings = [word for setting in _SETTINGS for word in ("-c", setting)]
        try:
            return await run_process(["git", *settings, *args], cwd=cwd, env=environ)
        except FileNotFoundError as error:
            raise FetchError(
                f"git is not installed, or not on the PATH, and the project {self._uri.text} is in a Git repository: "
                "install git (https://git-scm.com)",
                uri=self._uri.text,
            ) from error
        except OSError as error:
            raise FetchError(f"git cannot be started: {error.strerror or error}", uri=self._uri.text) from error
