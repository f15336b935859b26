"""Fleet: the owner of many runs, of their limits and of what they share."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

import anyio

from mlfleet.backends.base import Backend
from mlfleet.backends.registry import find
from mlfleet.concurrency.once import Once
from mlfleet.concurrency.services import ServiceOwner
from mlfleet.concurrency.tasks import TaskOwner
from mlfleet.environments import EnvironmentManager, manager
from mlfleet.errors import UsageError
from mlfleet.planning import Plan, Planner
from mlfleet.project.fetch import ProjectFetcher
from mlfleet.request import RunOptions, RunRequest
from mlfleet.runs import RunEvent, Stage, Timeouts
from mlfleet.supervision import FleetRun
from mlfleet.tracking import Tracking, open_tracking

__all__ = ["Fleet"]

logger = logging.getLogger("mlfleet.fleet")


class Fleet:
    """Runs any number of projects: one pool of connections, one fetch and one build for all that need the same.

    Leaving ``async with Fleet()`` waits for all its runs; leaving it by an exception or a cancellation cancels them
    first. Either way nothing of them runs afterwards, and each has its terminal status.

    Args:
        tracking_uri: None is ``MLFLOW_TRACKING_URI``, else MLflow's own default.
        tracking: a `Tracking` of your own, instead of the URI; the Fleet opens and closes it.
        max_concurrent: how many runs may be past the queue at once; None is the number of CPUs for runs on this
            machine, and no limit for runs elsewhere.
        timeouts: of the stages of every run that is submitted without its own.
        tracking_patience: seconds for which writing a run's terminal status is tried again when tracking cannot be
            reached.
        on_event: is called on the event loop with every `RunEvent`; it must not block.
    """

    def __init__(
        self,
        *,
        tracking_uri: str | None = None,
        tracking: Tracking | None = None,
        max_concurrent: int | None = None,
        timeouts: Timeouts | None = None,
        tracking_patience: float = 60.0,
        on_event: Callable[[RunEvent], None] | None = None,
    ) -> None:
        if tracking is not None and tracking_uri is not None:
            raise UsageError("both tracking and tracking_uri are given: give one of them")
        if max_concurrent is not None and max_concurrent < 1:
            raise UsageError(f"max_concurrent is {max_concurrent}: give 1 or more, or None")
        self.tracking = tracking if tracking is not None else open_tracking(tracking_uri)
        self.timeouts = timeouts or Timeouts()
        self.tracking_patience = tracking_patience
        self._slots = None if max_concurrent is None else anyio.CapacityLimiter(max_concurrent)
        self._local_slots = self._slots or anyio.CapacityLimiter(os.cpu_count() or 1)
        self._on_event = on_event
        self._fetcher = ProjectFetcher()
        self._planner = Planner(self._fetcher, self._backend_instance)
        self._backends: dict[str, Backend] = {}
        self._managers: dict[str, EnvironmentManager] = {}
        self._experiments: Once[str, str] = Once(keep=True)
        self._services = ServiceOwner()
        self._tasks = TaskOwner()
        self._runs: set[FleetRun] = set()
        self._state = "new"

    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise UsageError("a Fleet is used once: make a new one")
        self._state = "open"
        await self._services.open(self.tracking)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state = "closing"
        try:
            if error is None:
                await self._tasks.join()
        finally:
            # Reached with runs under way by an error in the block, or by a cancellation while waiting for them.
            with anyio.CancelScope(shield=True):
                await self.cancel()
                await self._tasks.join()
                await self._services.close()
            self._fetcher.close()
            self._state = "closed"

    async def submit(
        self,
        uri: str | os.PathLike[str],
        entry_point: str = "main",
        version: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        **options: Unpack[RunOptions],
    ) -> FleetRun:
        """Submit a run and return its handle as soon as its MLflow run exists.

        Waiting for a free slot, building the environment and the command itself go on behind the handle; what fails
        there is the run's failure. A cancelled call cancels the run.

        Args:
            uri: of the project: a folder, a Git URI or a zip, with ``#sub/folder``.
            entry_point: a name from MLproject, or a script of the project.
            version: commit, branch or tag of a Git project.
            parameters: of the entry point.
            options: the other arguments of `mlfleet.run_async`.

        Raises:
            MlfleetError: the request, the project or the parameters are wrong, or there is no tracking server; then
                nothing was made.
        """
        request = RunRequest.of(uri, entry_point, version, parameters, **options)
        return await self.start(request)

    async def start(self, request: RunRequest) -> FleetRun:
        """Like `submit`, for a request that was made before."""
        run = FleetRun(self, await self.plan(request))
        if self._state != "open":
            raise UsageError("this Fleet is not open: submit inside of 'async with Fleet() as fleet:'")
        self._runs.add(run)
        self._tasks.start(self._supervise(run), name=f"mlfleet run of {run.plan.project_name}")
        try:
            await run.created()
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await run.cancel()
            raise
        return run

    async def plan(self, request: RunRequest) -> Plan:
        """All that `start` would do first: fetch the project and check everything. Makes no run.

        Raises:
            MlfleetError: the mistake.
        """
        if self._state != "open":
            raise UsageError("this Fleet is not open: use it inside of 'async with Fleet() as fleet:'")
        self.tell(RunEvent(Stage.FETCHING, request.uri))
        return await self._planner.plan(
            request, on_progress=lambda line: self.tell(RunEvent(Stage.FETCHING, request.uri, detail=line))
        )

    async def cancel(self) -> None:
        """Cancel every run that has not ended; returns once nothing of them runs any more."""
        async with anyio.create_task_group() as group:
            for run in tuple(self._runs):
                group.start_soon(run.cancel)

    async def join(self) -> None:
        """Wait until every run has ended."""
        await self._tasks.join()

    @property
    def runs(self) -> tuple[FleetRun, ...]:
        """The runs that have not ended."""
        return tuple(self._runs)

    async def _supervise(self, run: FleetRun) -> None:
        try:
            await run.supervise()
        finally:
            self._runs.discard(run)

    # ---- what its runs share ----------------------------------------------------------------------------------------

    @property
    def fetcher(self) -> ProjectFetcher:
        """What fetches projects for all runs of this Fleet."""
        return self._fetcher

    async def backend(self, name: str) -> Backend:
        """The backend of that name, opened at its first use and closed with the Fleet."""
        backend = self._backend_instance(find(name))
        await self._services.open(backend)
        return backend

    def _backend_instance(self, kind: type[Backend]) -> Backend:
        return self._backends.setdefault(kind.name, kind())

    def environment_manager(self, name: str) -> EnvironmentManager:
        """The manager of that name; one for all runs, so that one build serves them all."""
        if name not in self._managers:
            self._managers[name] = manager(name)
        return self._managers[name]

    async def experiment_id(self, plan: Plan) -> str:
        """The experiment of a run: as asked for, else by the environment, else the default one."""
        request = plan.request
        if request.experiment_id:
            return str(request.experiment_id)
        name = request.experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if not name:
            return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
        return await self._experiments(name, lambda: self.tracking.experiment_id(name))

    def slot(self, plan: Plan) -> anyio.CapacityLimiter | None:
        """What limits how many such runs go on at once; None is no limit."""
        return self._local_slots if plan.backend == "local" else self._slots

    def tell(self, event: RunEvent) -> None:
        """Pass an event on to ``on_event``."""
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:
            logger.exception("on_event failed for %r", event)
