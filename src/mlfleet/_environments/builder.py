"""Builds environments: one build for all who need it, by commands whose output is shown and explained."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import time
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import PROJECTS
from mlfleet._environments.manager import EnvironmentManager, EnvironmentPlan, PreparedEnvironment
from mlfleet._environments.pip_requirements import PipInput
from mlfleet._environments.store import open_store
from mlfleet._paths import size_on_disk
from mlfleet._process.inherit import inherited
from mlfleet._process.process import Completed, run_process
from mlfleet._project.spec import EnvironmentFileKind
from mlfleet._run_log import get_logger
from mlfleet._store.locks import file_lock
from mlfleet._text.masking import is_secret_name, mask
from mlfleet.errors import EnvironmentSetupError

__all__ = ["Build", "BuildingManager", "Built", "pip_install", "venv_environment"]

_log = get_logger("mlfleet.environments")

TAIL = 30

# What would send packages elsewhere, or let pip and uv see packages that are not in the environment.
_MISLEADING = (
    *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP", "__PYVENV_LAUNCHER__"),
    *("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_DRY_RUN", "PIP_REPORT"),
    *("UV_SYSTEM_PYTHON", "UV_PYTHON", "UV_PROJECT", "UV_PROJECT_ENVIRONMENT", "UV_BREAK_SYSTEM_PACKAGES", "UV_TARGET"),
)
# What builds get even if they do not inherit all: the code of a project runs in a build, but indexes must be reached.
_SETTINGS = (
    *("PIP_*", "UV_*", "VIRTUALENV_*", "PYENV_*", "CONDA_*", "MAMBA_*", "RATTLER_*", "XDG_*", "NETRC", "SSH_AUTH_SOCK"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("GIT_*", "CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "MAKEFLAGS", "PKG_CONFIG_PATH"),
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
        manager: The name of the manager.
        what: The project's file or folder that the environment is built for.
        folder: The folder of the project; commands run in it.
        target: The folder to build the environment in, which does not exist yet.
        emit: A function that shows lines to those who wait for the build.
        inherit_env: The variables of this process that its commands inherit, besides the settings of the tools.
    """

    manager: str
    what: str
    folder: Path
    target: Path
    emit: Callable[[str], None]
    inherit_env: bool | tuple[str, ...] = True
    _tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    _secrets: tuple[str, ...] = field(default_factory=lambda: _secrets_of(os.environ), repr=False)

    def environ(self, *, own: bool = False) -> dict[str, str]:
        """Return the variables for a command: those that it inherits and the settings of the tools, without prompts.

        Args:
            own: True for this process's own Python, which must find what this process finds.
        """
        kept = ("PYTHONPATH", "PYTHONHOME") if own else ()
        given = inherited(self.inherit_env, *_SETTINGS, *kept)
        environ = {name: value for name, value in given.items() if name in kept or name not in _MISLEADING}
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

    def _add_output(self, line: str) -> None:
        """Show and keep a line of a command's output."""
        line = mask(line, self._secrets)
        self._tail.append(line)
        self.emit(line)

    async def run(self, argv: Sequence[str], environ: Mapping[str, str], *, check: bool = True) -> Completed:
        """Run a command of the build in the project's folder.

        Args:
            argv: The program and its arguments, without secrets.
            environ: All its variables.
            check: True to raise if the command fails.

        Raises:
            EnvironmentSetupError: The command cannot be started, or failed.
        """
        shown = shlex.join(argv)
        self.emit(mask(f"$ {shown}", self._secrets))
        self._tail.clear()
        try:
            completed = await run_process(argv, cwd=self.folder, env=environ, merge=True, on_line=self._add_output)
        except OSError as error:
            raise self.failure(f"`{shown}` cannot be started: {error.strerror or error}") from error
        if check and completed.returncode != 0:
            raise self.failure(f"`{shown}` ended with {_ending(completed.returncode)}")
        return completed

    async def install(self, command: Sequence[str], packages: PipInput, environ: Mapping[str, str]) -> None:
        """Run ``pip install`` or ``uv pip install`` with the packages that a project lists.

        Args:
            command: The command up to the packages.
            packages: The packages; nothing runs if there are none.
            environ: All variables of the command.
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
        """Make a file for a command to read, which exists as long as the block lasts.

        It is beside the environment, not in the project's folder, which is the user's own; and only its owner may
        read it, since what projects list may hold the passwords of indexes.
        """
        path = self.target.with_suffix(suffix)
        try:
            await PROJECTS.run(lambda: _write_private(path, text))
            yield path
        finally:
            await PROJECTS.finish(partial(path.unlink, missing_ok=True))

    def failure(self, problem: str, *, hint: str | None = None) -> EnvironmentSetupError:
        """Return the error that says what went wrong, with the last lines of output."""
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
    """Return the command up to the packages; isolated, since files of the project may be named like modules."""
    return (str(root / "bin" / "python"), "-I", "-u", "-m", "pip", "install")


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _ending(returncode: int) -> str:
    return f"exit code {returncode}" if returncode >= 0 else f"signal {-returncode}"


def _secrets_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    # Shorter ones would blot out text that means something else.
    return tuple(value for name, value in environ.items() if is_secret_name(name) and len(value) >= 6)


@dataclass(frozen=True, slots=True)
class Built:
    """The result of a build.

    Attributes:
        python: The version of the environment's Python; None if it has none.
        must_exist: The paths inside of it that are gone when its base interpreter is.
    """

    python: str | None
    must_exist: tuple[str, ...] = ()


class BuildingManager(EnvironmentManager):
    """A manager whose environments are built once, into the shared folder.

    The build happens at the environment's own path, since neither virtual environments nor conda's can be moved, and
    the environment exists from the moment that it is published (see `ContentStore`). A build that fails, is
    cancelled or is killed is never used.

    Args:
        root: The shared folder; None is ``MLFLOW_ENV_ROOT`` or the user's cache.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._store = open_store(root)
        self._once: SingleFlight[str, Path] = SingleFlight()
        self._listeners: dict[str, list[Callable[[str], None]]] = {}

    @abstractmethod
    async def build(self, plan: EnvironmentPlan, build: Build) -> Built:
        """Build the environment at ``build.target``.

        Raises:
            EnvironmentSetupError: The environment cannot be built.
        """

    async def enter(self, plan: EnvironmentPlan, root: Path) -> PreparedEnvironment:
        """Return what a command needs to run in the environment at `root`. Default: a virtual environment."""
        return venv_environment(self.name, root)

    async def prepare(
        self, plan: EnvironmentPlan, *, on_progress: Callable[[str], None] | None = None
    ) -> PreparedEnvironment:
        """See `EnvironmentManager.prepare`."""
        name = f"{self.name}-{plan.key}"
        listeners = self._listeners.setdefault(name, [])
        if on_progress is not None:
            if plan.source is not None and not plan.source.kind.is_declared:
                on_progress(f"the environment is made of {plan.source.path}")
            listeners.append(on_progress)
        try:
            root = await self._once(name, lambda: self._acquire_or_build(name, plan))
        except OSError as error:
            raise self._disk_failure(error) from error
        finally:
            if on_progress is not None:
                listeners.remove(on_progress)
            if not listeners:
                self._listeners.pop(name, None)
        return await self.enter(plan, root)

    async def _acquire_or_build(self, name: str, plan: EnvironmentPlan) -> Path:
        if (root := await PROJECTS.run(lambda: self._store.acquire(name))) is not None:
            return root
        if await PROJECTS.run((self._store.root / name).exists):
            self._show(name, "another process may be building this environment: waiting for it")
        what = str(plan.source.path if plan.source else plan.project_dir)

        async def make(target: Path) -> tuple[Path, Mapping[str, object]]:
            emit = partial(self._show, name)
            build = Build(self.name, what, _folder(plan), target, emit, inherit_env=plan.inherit_env)
            built = await self.build(plan, build)
            return target, await PROJECTS.run(lambda: _facts(built, what, target))

        async with file_lock(self._store.lock_path(name)):
            root = await self._store.make(name, make)
        if root is None:
            raise EnvironmentSetupError(
                f"the {self.name} environment of {what} was built, but its interpreter does not stay in"
                f" {self._store.root / name}",
                manager=self.name,
            )
        return root

    def _show(self, name: str, line: str) -> None:
        for listener in tuple(self._listeners.get(name, ())):
            try:
                listener(line)
            except Exception:
                # The mistake of one caller must not fail the build that others wait for.
                _log.exception("on_progress failed")

    def _disk_failure(self, error: OSError) -> EnvironmentSetupError:
        return EnvironmentSetupError(
            f"environments cannot be kept in {self._store.root}: {error.strerror or error}"
            f"{f' ({error.filename})' if error.filename else ''}; "
            "set MLFLOW_ENV_ROOT to a folder that can be written",
            manager=self.name,
        )


def _facts(built: Built, what: str, target: Path) -> dict[str, object]:
    return {
        "python": built.python,
        "source": what,
        "created": time.time(),
        "size": size_on_disk(target),
        "must_exist": list(built.must_exist),
    }


def _folder(plan: EnvironmentPlan) -> Path:
    """Return the folder where pip runs, so that it finds what the files that it reads name (see `Reader`)."""
    if plan.source is not None and plan.source.kind is EnvironmentFileKind.CONDA:
        return plan.source.path.parent
    return plan.project_dir


def venv_environment(manager: str, root: Path) -> PreparedEnvironment:
    """Return what a command needs to run in a virtual environment."""
    return PreparedEnvironment(
        manager,
        root,
        path=(str(root / "bin"),),
        environ={"VIRTUAL_ENV": str(root), "PYTHONHOME": None},
    )
