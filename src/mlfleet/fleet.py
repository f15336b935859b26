"""Fleet: the owner of many runs, of their limits and of what they share."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

import anyio

from mlfleet._concurrency.broadcast import Broadcast, Subscription
from mlfleet._concurrency.services import ServiceOwner
from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.tasks import TaskOwner
from mlfleet._concurrency.throttle import Throttle
from mlfleet._engine.admission import MachineSlots, Slot
from mlfleet._engine.attach import AttachedRun, find_again, read_reference
from mlfleet._engine.plan import Plan, Planner
from mlfleet._engine.request import RunOptions, RunRequest, choose_experiment
from mlfleet._engine.run import FleetRun
from mlfleet._environments.manager import EnvironmentManager, create_manager
from mlfleet._paths import runs_folder
from mlfleet._project.fetch import ProjectFetcher
from mlfleet._sweeps import GIVE_UP_AFTER, OnFailure, Resume, Retry, Sweep, SweepSettings
from mlfleet.backends.base import Backend
from mlfleet.backends.registry import find
from mlfleet.errors import UsageError
from mlfleet.resources import Machine, Resources, this_machine
from mlfleet.runs import RunEvent, Stage, Timeouts
from mlfleet.spaces import Points
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
        resources: what runs on this machine may use of it together; None: all that this process may use.
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
        resources: Resources | None = None,
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
        self.runs_folder = runs_folder()
        self._max_concurrent = max_concurrent
        # Not anyio's limiter: it costs each run ten times as much.
        self._count = asyncio.Semaphore(sys.maxsize if max_concurrent is None else max_concurrent)
        self._resources = resources
        self._machine = MachineSlots(Machine(cpus=0))
        self._events: Broadcast[RunEvent] = Broadcast(_with_lost)
        self._on_event = on_event
        self._fetcher = ProjectFetcher()
        self._planner = Planner(self._fetcher, self._backend_instance)
        self._backends: dict[str, Backend] = {}
        self._managers: dict[str, EnvironmentManager] = {}
        self._experiments: SingleFlight[str, str] = SingleFlight(keep=True)
        self._throttle = Throttle()
        self._tasks = TaskOwner()
        self._services = ServiceOwner(self._tasks)
        self._runs: set[FleetRun] = set()
        self._state = "new"

    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise UsageError("a Fleet is used once: make a new one")
        self._machine = MachineSlots(await anyio.to_thread.run_sync(this_machine, self._resources))
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
            self._events.close()
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
        # First of all: hundreds of calls at the same time shall not stop everything else that the event loop does.
        await self._throttle.wait()
        request = RunRequest.of(uri, entry_point, version, parameters, **options)
        return await self.start(request)

    def sweep(
        self,
        uri: str | os.PathLike[str],
        space: Points,
        *,
        entry_point: str = "main",
        version: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        name: str | None = None,
        resume: Resume = False,
        retry_failed: bool = True,
        max_concurrent: int | None = None,
        on_failure: OnFailure = "continue",
        max_failures: int | None = None,
        give_up_after: int | None = GIVE_UP_AFTER,
        retry: Retry | None = None,
        timeout: float | None = None,
        **options: Unpack[RunOptions],
    ) -> Sweep:
        """Run a project at every point of a space.

        Use it as ``async with fleet.sweep(…) as sweep: async for result in sweep: …``. The results come as the points
        end; failed points are results, not exceptions. Leaving the block early cancels the rest. In MLflow the sweep is
        a run of its own, the parent of all others.

        Args:
            uri: of the project. All runs are of the same commit.
            space: `mlfleet.grid`, `mlfleet.sample`, `mlfleet.zip_`, `mlfleet.rows`, or any iterable or asynchronous
                iterable of mappings. A point is pulled only when there is a place for it; from an asynchronous iterable
                only when, besides, every result so far was worked through, so that it can decide by them.
            entry_point: a name from MLproject, or a script of the project.
            version: commit, branch or tag of a Git project.
            parameters: that all runs have; a point may override them.
            name: of the sweep, unique in its experiment. A sweep with a name can be resumed; its runs on this machine
                outlive this process if it is killed.
            resume: go on with the sweep of that name, if there is one: skip what finished, take back what still runs,
                run what failed or was lost. ``"changed"``: also if the project's files have changed since.
            retry_failed: when resuming, whether to run again what had failed.
            max_concurrent: how many points may be on their way at once; None: as many as the Fleet lets run, and 100 if
                it has no limit.
            on_failure: ``stop`` ends the sweep at the first failed point, and cancels what runs.
            max_failures: ends it at so many failed points.
            give_up_after: ends it if the first so many runs all fail in their setup or within seconds; None: never.
            retry: which failures are tried again, and how often.
            timeout: seconds for the command of each run; short for ``timeouts=Timeouts(run=…)``.
            options: the other arguments of `mlfleet.run_async`, for all runs. ``run_name`` is that of the parent.

        Raises:
            UsageError: arguments that contradict each other. What is wrong with the project or the first point shows
                when the block is entered.
        """
        if timeout is not None:
            if options.get("timeouts") is not None:
                raise UsageError("both timeout and timeouts are given: give Timeouts(run=…) with the others")
            options["timeouts"] = replace(self.timeouts, run=timeout)
        if on_failure not in ("continue", "stop"):
            raise UsageError(f"on_failure is {on_failure!r}: give 'continue' or 'stop'")
        settings = SweepSettings(
            request=RunRequest.of(uri, entry_point, version, parameters, **options),
            name=name,
            resume=resume,
            retry_failed=retry_failed,
            max_concurrent=max_concurrent,
            max_failures=1 if on_failure == "stop" and max_failures is None else max_failures,
            give_up_after=give_up_after,
            retry=retry or Retry(),
        )
        return Sweep(self, space, settings)

    async def start(self, request: RunRequest) -> FleetRun:
        """Like `submit`, for a request that was made before."""
        return await self.launch(await self.plan(request))

    async def launch(self, plan: Plan) -> FleetRun:
        """Like `start`, for what `plan` gave."""
        run = FleetRun(self, plan)
        if self._state != "open":
            raise UsageError("this Fleet is not open: submit inside of 'async with Fleet() as fleet:'")
        self._runs.add(run)
        self._supervise(run)
        try:
            await run.created()
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await run.cancel()
            raise
        return run

    async def attach(self, run_id: str, *, timeouts: Timeouts | None = None) -> FleetRun:
        """Find a run again that an earlier process submitted, and supervise it to its end as if it were this Fleet's.

        If that process still lives, both see the same run, and both write the same terminal status. A cancelled call
        leaves the run as it is.

        Args:
            run_id: of the MLflow run.
            timeouts: ``run`` and ``cancel_grace`` count, from now on; None: those of the Fleet.

        Returns:
            The handle. A run that is not where it was has failed: `FleetRun.check` says so.

        Raises:
            UsageError: the run has ended already, or ends with the process that started it.
            MlfleetError: tracking or the backend cannot be reached.
        """
        if self._state != "open":
            raise UsageError("this Fleet is not open: use it inside of 'async with Fleet() as fleet:'")
        info = await self.tracking.get_run(run_id)
        reference = read_reference(info)
        # The class may be imported only now, which blocks.
        await anyio.to_thread.run_sync(find, reference.backend)
        found = await find_again(await self.backend(reference.backend), info, reference)
        run = AttachedRun(self, info, found, reference, timeouts)
        self._runs.add(run)
        self._supervise(run)
        await run.created()
        return run

    async def plan(self, request: RunRequest, *, like: Plan | None = None) -> Plan:
        """All that `start` would do first: fetch the project and check everything. Makes no run.

        Args:
            request: what is asked for.
            like: of a request that differs in nothing but parameters, tags and its place: so that many runs are of one
                commit, and are planned at no cost.

        Raises:
            MlfleetError: the mistake.
        """
        if self._state != "open":
            raise UsageError("this Fleet is not open: use it inside of 'async with Fleet() as fleet:'")
        if like is None and self.is_followed:
            self.tell(RunEvent(Stage.FETCHING, request.uri))
        plan = await self._planner.plan(
            request,
            like=like,
            on_progress=lambda line: self.tell(RunEvent(Stage.FETCHING, request.uri, detail=line)),
        )
        backend = self._backends[plan.backend]
        backend.check_tracking(self.tracking.uri, plan.config)
        if backend.runs_here and request.resources is not None:
            self._machine.check(request.resources)
        return plan

    async def cancel(self) -> None:
        """Cancel every run that has not ended; returns once nothing of them runs any more."""
        async with anyio.create_task_group() as group:
            for run in tuple(self._runs):
                group.start_soon(run.cancel)

    async def join(self) -> None:
        """Wait until every run has ended."""
        await self._tasks.join()

    def events(self, *, buffer: int = 10_000) -> Subscription[RunEvent]:
        """What happens to the runs of this Fleet, from this call on: ``async for event in fleet.events(): …``.

        Every reader gets every event. It ends when the Fleet is closed.

        Args:
            buffer: how many events are kept for this reader if it does not keep up. After that the oldest are dropped,
                and `RunEvent.lost` of the next one says how many.
        """
        return self._events.subscribe(buffer)

    @property
    def runs(self) -> tuple[FleetRun, ...]:
        """The runs that have not ended."""
        return tuple(self._runs)

    def _supervise(self, run: FleetRun) -> None:
        name = f"mlfleet run of {run.plan.project_name}"
        self._tasks.start(run.supervise(), name=name, then=partial(self._ended, run))

    def _ended(self, run: FleetRun) -> None:
        self._runs.discard(run)
        run.give_up()

    # ---- what its runs share ----------------------------------------------------------------------------------------

    @property
    def fetcher(self) -> ProjectFetcher:
        """What fetches projects for all runs of this Fleet."""
        return self._fetcher

    async def backend(self, name: str) -> Backend:
        """The backend of that name, opened at its first use and closed with the Fleet."""
        backend = self._backends.get(name)
        if backend is None:
            backend = self._backend_instance(await anyio.to_thread.run_sync(find, name))
        await self._services.open(backend)
        return backend

    def _backend_instance(self, kind: type[Backend]) -> Backend:
        return self._backends.setdefault(kind.name, kind())

    def environment_manager(self, name: str) -> EnvironmentManager:
        """The manager of that name; one for all runs, so that one build serves them all."""
        if name not in self._managers:
            self._managers[name] = create_manager(name)
        return self._managers[name]

    async def experiment_id(self, plan: Plan) -> str:
        """The experiment of a run: as asked for, else by the environment, else the default one."""
        name, experiment_id = choose_experiment(plan.request.experiment_name, plan.request.experiment_id)
        if name is None:
            return experiment_id
        return await self._experiments(name, lambda: self.tracking.experiment_id(name))

    def slot(self, plan: Plan) -> Slot:
        """The place of such a run."""
        needed = self._needed(plan)
        return Slot(self._count, None if needed is None else self._machine.share(needed))

    def room(self, plan: Plan) -> int | None:
        """How many such runs can go on at once; None is no limit."""
        needed = self._needed(plan)
        limits = [] if self._max_concurrent is None else [self._max_concurrent]
        limits += [] if needed is None else [self._machine.machine.fits(needed)]
        return min(limits, default=None)

    def _needed(self, plan: Plan) -> Resources | None:
        """What a run takes of this machine; None if it is not to be counted."""
        if not self._backends[plan.backend].runs_here:
            return None
        if plan.request.resources is None and self._max_concurrent is None:
            return Resources(cpus=1)
        return plan.request.resources

    @property
    def is_followed(self) -> bool:
        """Whether anybody hears what `tell` tells."""
        return self._on_event is not None or self._events.has_readers

    def tell(self, event: RunEvent) -> None:
        """Pass an event on to ``on_event``, and to those who read `events`."""
        self._events.publish(event)
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:
            logger.exception("on_event failed for %r", event)


def _with_lost(event: RunEvent, lost: int) -> RunEvent:
    return replace(event, lost=lost)
