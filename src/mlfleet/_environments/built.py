"""What the managers that build environments share: one build for all who need it, and none that is half-made."""

from __future__ import annotations

import contextlib
import logging
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio import CapacityLimiter, to_thread

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._environments.base import EnvironmentManager, EnvironmentPlan, PreparedEnvironment
from mlfleet._environments.build import Build
from mlfleet._environments.store import open_store
from mlfleet._paths import size_on_disk
from mlfleet._project.spec import EnvironmentFileKind
from mlfleet._store.locks import file_lock
from mlfleet.errors import EnvironmentSetupError

__all__ = ["BuildingManager", "Built", "venv_environment"]

_log = logging.getLogger("mlfleet.environments")

_THREADS = 4
_CLEANUP = 60.0


@dataclass(frozen=True, slots=True)
class Built:
    """What a build tells of its result.

    Attributes:
        python: the version of the environment's Python; None if it has none.
        must_exist: paths inside it that are gone when its base interpreter is.
    """

    python: str | None
    must_exist: tuple[str, ...] = ()


class BuildingManager(EnvironmentManager):
    """A manager whose environments are built once, into the shared folder.

    The build happens at the environment's own path, since neither virtual environments nor conda's can be moved, and
    the environment exists from the moment that it is published (see `Store`). A build that fails, is cancelled or is
    killed is never used.

    Args:
        root: the shared folder; None is ``MLFLOW_ENV_ROOT`` or the user's cache.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._store = open_store(root)
        self._once: SingleFlight[str, Path] = SingleFlight()
        self._listeners: dict[str, list[Callable[[str], None]]] = {}
        self._threads = CapacityLimiter(_THREADS)

    @abstractmethod
    async def build(self, plan: EnvironmentPlan, build: Build) -> Built:
        """Build the environment at ``build.target``.

        Raises:
            EnvironmentSetupError: it cannot be built.
        """

    @abstractmethod
    async def enter(self, plan: EnvironmentPlan, root: Path) -> PreparedEnvironment:
        """What a command needs to run in the environment at `root`."""

    async def prepare(
        self, plan: EnvironmentPlan, *, on_progress: Callable[[str], None] | None = None
    ) -> PreparedEnvironment:
        """See `EnvironmentManager.prepare`."""
        name = f"{self.name}-{plan.key}"
        listeners = self._listeners.setdefault(name, [])
        if on_progress is not None:
            listeners.append(on_progress)
        try:
            root = await self._once(name, lambda: self._take_or_build(name, plan))
        except OSError as error:
            raise self._disk_failure(error) from error
        finally:
            if on_progress is not None:
                listeners.remove(on_progress)
            if not listeners:
                self._listeners.pop(name, None)
        return await self.enter(plan, root)

    async def _take_or_build(self, name: str, plan: EnvironmentPlan) -> Path:
        if (root := await self._take(name)) is not None:
            return root
        if await to_thread.run_sync((self._store.root / name).exists):
            self._tell(name, "another process may be building this environment: waiting for it")
        async with file_lock(self._store.lock_path(name)):
            # Another process may have built it while this one waited.
            return await self._take(name) or await self._build(name, plan)

    async def _take(self, name: str) -> Path | None:
        return await to_thread.run_sync(self._store.acquire, name, limiter=self._threads)

    async def _build(self, name: str, plan: EnvironmentPlan) -> Path:
        what = str(plan.source.path if plan.source else plan.project_dir)
        async with self._attempt(name) as target:
            build = Build(self.name, what, _folder(plan), target, lambda line: self._tell(name, line))
            built = await self.build(plan, build)
            await to_thread.run_sync(
                lambda: self._store.publish(name, target, _facts(built, what, target)),
                limiter=self._threads,
            )
        if (root := await self._take(name)) is None:
            raise EnvironmentSetupError(
                f"the {self.name} environment of {what} was built, but its interpreter does not stay in {target}",
                manager=self.name,
            )
        return root

    @contextlib.asynccontextmanager
    async def _attempt(self, name: str) -> AsyncIterator[Path]:
        """A path to build at; whatever is there is removed unless the block ends well."""
        target = await to_thread.run_sync(self._store.begin, name, limiter=self._threads)
        try:
            yield target
        except BaseException:
            with anyio.move_on_after(_CLEANUP, shield=True):
                await to_thread.run_sync(self._store.discard, name, target, limiter=self._threads)
            raise

    def _tell(self, name: str, line: str) -> None:
        for listener in tuple(self._listeners.get(name, ())):
            try:
                listener(line)
            except Exception:
                # One caller's mistake must not fail the build that others wait for.
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
    """Where pip runs, so that it finds what the files that it reads name (see `Reader`)."""
    if plan.source is not None and plan.source.kind is EnvironmentFileKind.CONDA:
        return plan.source.path.parent
    return plan.project_dir


def venv_environment(manager: str, root: Path) -> PreparedEnvironment:
    """What a command needs to run in a virtual environment."""
    return PreparedEnvironment(
        manager,
        root,
        path=(str(root / "bin"),),
        environ={"VIRTUAL_ENV": str(root), "PYTHONHOME": None},
    )
