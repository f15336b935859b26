"""Runs the commands of a build, shows their output as it comes, and makes one error of a failure."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio
from anyio import to_thread

from mlfleet._environments.requirements import PipInput
from mlfleet._process.process import Completed, run_process
from mlfleet._text.masking import is_secret_name, mask
from mlfleet.errors import EnvironmentSetupError

__all__ = ["Build", "clean_environ", "pip_install"]

TAIL = 30

# What would send packages elsewhere, or let pip and uv see packages that are not in the environment.
_MISLEADING = (
    *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP", "__PYVENV_LAUNCHER__"),
    *("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_DRY_RUN", "PIP_REPORT"),
    *("UV_SYSTEM_PYTHON", "UV_PYTHON", "UV_PROJECT", "UV_PROJECT_ENVIRONMENT", "UV_BREAK_SYSTEM_PACKAGES", "UV_TARGET"),
)
_HINTS = (
    (r"No matching distribution|No solution found|not found in the package registry|Packages?NotFound|No candidates", (
        "check the package's name and version, whether it is made for this Python, and which index or channel is used"
    )),
    (r"Temporary failure in name resolution|dns error|Connection refused|NewConnectionError|CondaHTTPError|timed out", (
        "the package index or channel cannot be reached: check the network, proxies and index settings"
    )),
    (r"CERTIFICATE_VERIFY_FAILED|invalid peer certificate|UnknownIssuer", (
        "the index's certificate is not trusted: set SSL_CERT_FILE or PIP_CERT"
    )),
    (r"No space left on device|Disk quota exceeded", "the disk is full: `mlfleet envs prune` removes old environments"),
    (r"401 |403 |Unauthorized|Forbidden", "the index refuses access: check the credentials"),
    (r"ensurepip is not available|No module named ensurepip", (
        "this Python lacks ensurepip (Debian: apt install python3-venv): or `pip install virtualenv`"
    )),
)  # fmt: skip


@dataclass(slots=True)
class Build:
    """One build of an environment.

    Attributes:
        manager: which builds.
        what: that is built for: the project's file or folder.
        folder: of the project; commands run in it.
        target: the folder to build the environment in; it is not there yet.
        emit: takes lines for those who wait.
    """

    manager: str
    what: str
    folder: Path
    target: Path
    emit: Callable[[str], None]
    _tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    _secrets: tuple[str, ...] = field(default_factory=lambda: _secrets_of(os.environ), repr=False)

    def say(self, line: str) -> None:
        """A line for those who wait, without secrets."""
        self.emit(mask(line, self._secrets))

    def _take(self, line: str) -> None:
        """A line of a command's output."""
        line = mask(line, self._secrets)
        self._tail.append(line)
        self.emit(line)

    async def run(self, argv: Sequence[str], environ: Mapping[str, str], *, check: bool = True) -> Completed:
        """Run a command of the build in the project's folder.

        Args:
            argv: the program and its arguments; no secrets.
            environ: all its variables.
            check: raise if it fails.

        Raises:
            EnvironmentSetupError: it cannot be started, or failed.
        """
        shown = shlex.join(argv)
        self.say(f"$ {shown}")
        self._tail.clear()
        try:
            completed = await run_process(argv, cwd=self.folder, env=environ, merge=True, on_line=self._take)
        except OSError as error:
            raise self.failure(f"`{shown}` cannot be started: {error.strerror or error}") from error
        if check and completed.returncode != 0:
            raise self.failure(f"`{shown}` ended with {_ending(completed.returncode)}")
        return completed

    async def install(self, command: Sequence[str], packages: PipInput, environ: Mapping[str, str]) -> None:
        """Run ``pip install`` or ``uv pip install`` with what a project lists.

        Args:
            command: up to where the packages come.
            packages: nothing is run if there are none.
            environ: all variables of the command.
        """
        if not packages:
            return
        if not packages.lines:
            await self.run([*command, *packages.arguments], environ)
            return
        async with self.listing(".txt", "".join(f"{line}\n" for line in packages.lines)) as path:
            await self.run([*command, *packages.arguments, "-r", str(path)], environ)

    @contextlib.asynccontextmanager
    async def listing(self, suffix: str, text: str) -> AsyncIterator[Path]:
        """A file for a command to read, as long as the block lasts.

        It is beside the environment, not in the project's folder, which is the user's own; and only its owner may
        read it, since what projects list may hold the passwords of indexes.
        """
        path = self.target.with_suffix(suffix)
        try:
            await to_thread.run_sync(_write_private, path, text)
            yield path
        finally:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(partial(path.unlink, missing_ok=True))

    def failure(self, problem: str, *, hint: str | None = None) -> EnvironmentSetupError:
        """The error that tells what went wrong, with the last lines of output."""
        output = tuple(line for line in self._tail if line.strip())
        text = "\n".join(output)
        hint = hint or next((hint for pattern, hint in _HINTS if re.search(pattern, text)), None)
        message = f"the {self.manager} environment of {self.what} cannot be built: {mask(problem, self._secrets)}"
        if hint:
            message += f"\n  ({hint})"
        if output:
            message += "\n" + "\n".join(f"  {line}" for line in output)
        return EnvironmentSetupError(message, manager=self.manager, output=output)


def pip_install(root: Path) -> tuple[str, ...]:
    """The command up to where the packages come; isolated, since files of the project may be named like modules."""
    return (str(root / "bin" / "python"), "-I", "-u", "-m", "pip", "install")


def clean_environ(*, own: bool = False) -> dict[str, str]:
    """The caller's variables for a build: with the settings of pip, uv, proxies and certificates, never asking.

    Args:
        own: for this process's own Python, which must find what this process finds.
    """
    kept = ("PYTHONPATH", "PYTHONHOME") if own else ()
    environ = {name: value for name, value in os.environ.items() if name in kept or name not in _MISLEADING}
    environ |= {
        "PIP_NO_INPUT": "1",
        "PIP_USER": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_PROGRESS_BAR": "off",
        "UV_NO_PROGRESS": "1",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
        "GIT_TERMINAL_PROMPT": "0",
    }
    return environ


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _ending(returncode: int) -> str:
    return f"exit code {returncode}" if returncode >= 0 else f"signal {-returncode}"


def _secrets_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    # Shorter ones would blot out text that means something else.
    return tuple(value for name, value in environ.items() if is_secret_name(name) and len(value) >= 6)
