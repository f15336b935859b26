"""The services that all runs and sweeps of one Fleet share."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from mlfleet._concurrency.broadcast import Broadcast
from mlfleet._concurrency.cancellation import complete, wait_done
from mlfleet._concurrency.notebook import interruptible_cells
from mlfleet._concurrency.tasks import ServiceOwner, TaskOwner
from mlfleet._concurrency.threads import FILES
from mlfleet._engine.admission import Admission
from mlfleet._engine.conclude import conclude_left
from mlfleet._engine.context import RunContext
from mlfleet._engine.detached import DetachedSupervisor
from mlfleet._engine.plan import Plan, Planner
from mlfleet._engine.records import RunRecords, find_record
from mlfleet._engine.run import FleetRun
from mlfleet._engine.shared_handles import SharedHandles
from mlfleet._engine.supervisor import Instrumentation, Supervisor
from mlfleet._environments.manager import EnvironmentManager, create_manager
from mlfleet._paths import runs_folder
from mlfleet._project.fetch import ProjectFetcher
from mlfleet._run_log import get_logger
from mlfleet._store.private_folders import secure_state
from mlfleet.backends.base import Backend
from mlfleet.backends.registry import find
from mlfleet.errors import MlfleetError, UsageError
from mlfleet.resources import Machine, Resources, this_machine
from mlfleet.runs import FleetCounts, RunEvent, RunStatus, Timeouts
from mlfleet.tracking import Tracking, open_tracking

__all__ = ["Events", "FleetServices"]

logger = get_logger("mlfleet.fleet")

_LAST_WRITE = 1.0
"""Seconds for writing the statuses of all runs right before the process exits."""


class Events(Broadcast[RunEvent]):
    """The events of a Fleet, for a callback and for any number of readers.

    Args:
        on_event: Called on the event loop with every event; None for no callback. What it returns, if that can be
            awaited, is awaited in the order of the events, one at a time.
    """

    def __init__(self, on_event: Callable[[RunEvent], Awaitable[None] | None] | None) -> None:
        super().__init__(lambda event, lost: replace(event, lost=lost))
        self._on_event = on_event
        self._reactions: deque[tuple[RunEvent, Awaitable[None]]] = deque()
        self._tasks = TaskOwner()

    @property
    def has_readers(self) -> bool:
        """True if there is a callback or a reader, so that it is worth making an event."""
        return self._on_event is not None or bool(self._readers)

    def publish(self, item: RunEvent) -> None:
        """Pass an event to all readers and to the callback, whose errors are logged."""
        super().publish(item)
        if self._on_event is None:
            return
        try:
            reaction = self._on_event(item)
        except Exception:
            logger.exception("on_event failed for %r", item)
            return
        if reaction is None or not inspect.isawaitable(reaction):
            return
        self._reactions.append((item, reaction))
        if len(self._reactions) == 1:
            self._tasks.start(self._await_reactions(), name="mlfleet on_event", then=self._drop_reactions)

    async def join(self) -> None:
        """Wait until all that `on_event` returned was awaited."""
        await self._tasks.join()

    async def _await_reactions(self) -> None:
        while self._reactions:
            item, reaction = self._reactions[0]
            try:
                await reaction
            except Exception:
                logger.exception("on_event failed for %r", item)
            self._reactions.popleft()

    def _drop_reactions(self) -> None:
        """Close the coroutines that will not be awaited, since ``asyncio.run`` has cancelled all tasks at its end."""
        for _, reaction in self._reactions:
            if inspect.iscoroutine(reaction):
                reaction.close()
        self._reactions.clear()


class FleetServices:
    """The services that all runs and sweeps of one Fleet share: backends, environments, slots, records and events.

    Args:
        tracking: The tracking server or store of runs that name none; opened and closed with the services.
        tracking_uri: The URI that it was made of; see `RunContext`.
        timeouts: The time limits of runs without their own.
        tracking_patience: Seconds for which writing a terminal status is repeated.
        max_concurrent: The number of runs past the queue; None: as many as the machine has CPUs, for runs on it.
        group_limit: The number of runs of one group past the queue, for all groups or by name; None: any number.
        max_queued: The number of runs in the queue; None: any number.
        resources: The resources of this machine that the runs may use; None: all that this process may use.
        events: The events of the Fleet.
        inherit_env: The variables of this process that commands inherit; see `Job.inherit_env`.

    Attributes:
        context: The context of runs that name no tracking.
        resources: The argument `resources`.
        inherit_env: The argument `inherit_env`.
        admission: The queue, the slots and the resources of this machine.
        planner: The maker of plans.
        fetcher: The fetcher of projects.
        backends: The backends that were asked for, by name; not all are open.
        runs_folder: The folder with one sub-folder for each run.
        records: The records of the runs, for the processes that conclude them if this one dies.
        handles: The backends' handles of runs that are not supervised here.
        is_open: True between `open` and the beginning of the end.
        sweep_ids: The MLflow runs of the active sweeps.
        sweeps: A function for each active sweep that ends it.
        instrumentation: Observes the runs that are submitted from now on; None for none.
        queued_after: Seconds that a run may wait in the queue before MLflow shows it as SCHEDULED.
        scheduled_after: Seconds that a run may wait at its backend before MLflow shows it as SCHEDULED.
        unseen_patience: Seconds in which a driver that cannot be seen must write the status of a run that has ended at
            its backend.
    """

    def __init__(
        self,
        *,
        tracking: Tracking,
        tracking_uri: str | None,
        timeouts: Timeouts,
        tracking_patience: float,
        max_concurrent: int | None,
        group_limit: int | Mapping[str, int] | None,
        max_queued: int | None,
        resources: Resources | None,
        events: Events,
        inherit_env: bool | tuple[str, ...],
    ) -> None:
        self.context = RunContext(self, tracking, tracking_uri)
        self.timeouts = timeouts
        self.tracking_patience = tracking_patience
        self.queued_after = 1.0
        self.scheduled_after = 10.0
        self.unseen_patience = 120.0
        self.events = events
        self.instrumentation: Instrumentation | None = None
        self.fetcher = ProjectFetcher()
        self.runs_folder = runs_folder()
        self.records = RunRecords(self._cancel_as_asked)
        self.handles = SharedHandles(self.backend)
        self.is_open = False
        self.sweep_ids: set[str] = set()
        self.sweeps: set[Callable[[], Coroutine[Any, Any, None]]] = set()
        self.resources = resources
        self.inherit_env = inherit_env
        self._max_concurrent = max_concurrent
        self._make_admission = partial(
            Admission, max_concurrent=max_concurrent, group_limit=group_limit, max_queued=max_queued
        )
        self.admission = self._make_admission(Machine(cpus=0))
        self.planner = Planner(self.fetcher, self._backend_instance, inherit_env)
        self.backends: dict[str, Backend] = {}
        self._managers: dict[tuple[str, Path | None], EnvironmentManager] = {}
        self._tasks = TaskOwner()
        self._services = ServiceOwner(self._tasks)
        self._runs: dict[FleetRun, Supervisor] = {}
        self._followers = TaskOwner()
        self._detached: dict[FleetRun, DetachedSupervisor] = {}
        self._others: dict[object, RunContext] = {}
        self._concluding: dict[RunContext, asyncio.Task[None]] = {}

    # ---- its life ---------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open tracking. A failed or cancelled call leaves nothing open."""
        try:
            await self._services.open(interruptible_cells())
            machine = await FILES.run(self._look_around)
            self.admission = self._make_admission(machine)
            await self._services.open(self.context.tracking)
        except BaseException:
            await self.close()
            raise
        self.is_open = True
        self._begin_to_conclude(self.context)

    def _begin_to_conclude(self, context: RunContext) -> None:
        task = asyncio.create_task(conclude_left(context), name="mlfleet conclude what others left")
        self._concluding[context] = task

    async def tracked_by(
        self, tracking_uri: str | None, tracking: Tracking | None, run_id: str | None = None
    ) -> RunContext:
        """Return the context of runs that a tracking server or store has, which is opened at its first use.

        Args:
            tracking_uri: The URI of the tracking server or store, opened once for each URI.
            tracking: A `Tracking` instead of the URI.
            run_id: The id of a run whose record on this machine says which of the open ones has it, if neither is
                given. Otherwise it is that of the Fleet.

        Raises:
            UsageError: Both are given.
            TrackingError: It cannot be opened. The next call tries it again.
        """
        if tracking_uri is not None and tracking is not None:
            raise UsageError("both tracking and tracking_uri are given: give one of them")
        self.check_open()
        tracking_uri = tracking_uri or None  # an empty one is none, as in the environment
        if tracking_uri is None and tracking is None:
            record = await FILES.run(partial(find_record, run_id)) if run_id is not None and self._others else None
            key = None if record is None else record.tracking
            return next((each for each in self._others.values() if each.tracking_key == key), self.context)
        if self.context.is_of(tracking_uri, tracking):
            return self.context
        # `mlflow.set_workspace` sets the variable, too.
        which = id(tracking) if tracking is not None else (tracking_uri, os.environ.get("MLFLOW_WORKSPACE", ""))
        other = self._others.get(which)
        if other is None:
            made = open_tracking(tracking_uri) if tracking is None else tracking
            other = self._others[which] = RunContext(self, made, tracking_uri)
        try:
            await self._services.open(other.tracking)
        except Exception:
            if self._others.get(which) is other:
                del self._others[which]
            self._services.forget(other.tracking)
            raise
        if other not in self._concluding and self.is_open:
            self._begin_to_conclude(other)
        return other

    def _look_around(self) -> Machine:
        """Check the folder of this user's runs, and return the resources of the machine. Blocking."""
        secure_state()
        return this_machine(self.resources)

    def stop_accepting(self) -> None:
        """Refuse further runs, also those that wait for room in the queue."""
        self.is_open = False
        self.admission.turn_away()

    async def close(self) -> None:
        """End all runs and close all services, however often the caller is cancelled."""
        self.stop_accepting()
        await complete(self._close, restart=True)

    async def _close(self) -> None:
        for task in tuple(self._concluding.values()):
            task.cancel()
            await wait_done(task)
        for supervisor in self._detached.values():
            supervisor.stop_following()
        # A sweep that another task goes through writes its own status, for which it needs the services.
        async with anyio.create_task_group() as group:
            for end in tuple(self.sweeps):
                group.start_soon(end)
        await self.cancel()
        await self.join()
        await self._followers.join()
        await self._services.close()
        await self.records.close()
        await self.events.join()
        self.fetcher.close()
        self.events.close()

    async def join(self) -> None:
        """Wait until every run has ended."""
        await self._tasks.join()

    async def cancel(self) -> None:
        """Cancel every run and wait for their ends."""
        async with anyio.create_task_group() as group:
            for run in self.runs:
                group.start_soon(run.cancel)

    async def write_killed(self) -> None:
        """Write KILLED for all active runs and sweeps at once, and return within a second.

        For a process that is about to exit without waiting for their ends. A status that cannot be written in time is
        left as it is.
        """
        runs = [(each.tracking, each.info.run_id) for each in self._runs.values() if each.info is not None]
        runs += [(self.context.tracking, run_id) for run_id in self.sweep_ids]
        writes = [asyncio.ensure_future(_try_to_write_killed(tracking, run_id)) for tracking, run_id in runs]
        if writes:
            # Not a cancellation: a call in a thread would be waited for.
            await asyncio.wait(writes, timeout=_LAST_WRITE)

    # ---- runs -------------------------------------------------------------------------------------------------------

    @property
    def runs(self) -> tuple[FleetRun, ...]:
        """The runs that have not ended."""
        return tuple(self._runs)

    @property
    def counts(self) -> FleetCounts:
        """The numbers of the runs that have not ended."""
        groups: dict[str | None, Counter[str]] = {}
        for supervisor in self._runs.values():
            if supervisor.outcome is not None:
                continue
            place = "queued" if supervisor.is_queued else "running" if supervisor.started.is_set() else "preparing"
            groups.setdefault(supervisor.description.group, Counter())[place] += 1
        named = {group: _counts(counted) for group, counted in groups.items() if group is not None}
        return replace(_counts(sum(groups.values(), Counter())), groups=named)

    def find(self, run_id: str) -> FleetRun | None:
        """Return the handle of a run of this Fleet that has not ended; None if it has no such run."""
        supervisors = (*self._runs.items(), *self._detached.items())
        return next((run for run, each in supervisors if each.info is not None and each.info.run_id == run_id), None)

    def _cancel_as_asked(self, run_id: str, grace: float | None) -> None:
        """Cancel a run because another process asks for it, which then waits for the status."""
        run = self.find(run_id)
        if run is not None:
            self._followers.start(_cancel(run, grace), name="mlfleet cancel for another process")

    def check_open(self) -> None:
        """Raise `UsageError` unless the Fleet is open."""
        if not self.is_open:
            raise UsageError("this Fleet is not open: use it inside of 'async with Fleet() as fleet:'")

    def supervise(self, supervisor: Supervisor) -> FleetRun:
        """Start to supervise a run, which belongs to the Fleet from now on."""
        run = FleetRun(supervisor)
        self._runs[run] = supervisor
        name = f"mlfleet run of {supervisor.description.project_name}"
        self._tasks.start(supervisor.supervise(), name=name, then=partial(self._forget, run))
        return run

    def follow(self, supervisor: DetachedSupervisor) -> FleetRun:
        """Start to follow a detached run, which does not belong to the Fleet."""
        run = FleetRun(supervisor)
        self._detached[run] = supervisor

        def forget() -> None:
            self._detached.pop(run).give_up()

        self._followers.start(supervisor.supervise(), name="mlfleet detached run", then=forget)
        return run

    def _forget(self, run: FleetRun) -> None:
        self._runs.pop(run).give_up()

    # ---- what the runs share ----------------------------------------------------------------------------------------

    async def backend(self, name: str) -> Backend:
        """Return the backend of that name, opened at its first use and closed with the Fleet."""
        backend = self.backends.get(name)
        if backend is None:
            # In a thread: its module may be imported only now.
            backend = self._backend_instance(await FILES.run(partial(find, name)))
        await self._services.open(backend)
        return backend

    def _backend_instance(self, kind: type[Backend]) -> Backend:
        return self.backends.setdefault(kind.name, kind())

    def environment_manager(self, name: str, root: Path | None = None) -> EnvironmentManager:
        """Return the manager of that name, one for all runs, so that one build serves all of them.

        Args:
            name: The name of the manager.
            root: The folder of built environments; None: that of this machine.
        """
        if (name, root) not in self._managers:
            self._managers[name, root] = create_manager(name, root)
        return self._managers[name, root]

    def capacity(self, plan: Plan) -> int | None:
        """Return how many such runs can be active at the same time; None: any number."""
        return self.admission.capacity(self.needed(plan), plan.request.group)

    def needed(self, plan: Plan) -> Resources | None:
        """Return the resources of this machine that a run needs; None if they are not counted."""
        if not self.backends[plan.backend].runs_here:
            return None
        if plan.request.resources is None and self._max_concurrent is None:
            return Resources(cpus=1)
        return plan.request.resources


async def _try_to_write_killed(tracking: Tracking, run_id: str) -> None:
    with suppress(MlfleetError):
        await tracking.update_run(run_id, RunStatus.KILLED, retry_for=_LAST_WRITE)


def _counts(places: Counter[str]) -> FleetCounts:
    return FleetCounts(queued=places["queued"], preparing=places["preparing"], running=places["running"])


async def _cancel(run: FleetRun, grace: float | None) -> None:
    with suppress(MlfleetError):  # its supervisor tells of it
        await run.cancel(grace=grace)
