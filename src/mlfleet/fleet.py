"""Fleet: the owner of many runs, of their limits and of what they share."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self, Unpack

from mlfleet._concurrency.broadcast import Subscription
from mlfleet._concurrency.throttle import Throttle
from mlfleet._engine.context import RunContext
from mlfleet._engine.request import RunOptions, RunRequest
from mlfleet._engine.run import FleetRun
from mlfleet._engine.services import Events, FleetServices
from mlfleet._engine.tracked import TrackedRun
from mlfleet._process.inherit import read_inherit_env
from mlfleet._sweeps import GIVE_UP_AFTER, OnFailure, Resume, Retry, Sweep, SweepSettings, track
from mlfleet.errors import UsageError
from mlfleet.resources import Resources
from mlfleet.runs import FleetCounts, RunEvent, Timeouts, check_seconds
from mlfleet.spaces import Points
from mlfleet.tracking import Tracking, open_tracking

__all__ = ["Fleet", "context_of"]


class Fleet:
    """The owner of any number of runs, which share connections, fetched projects and built environments.

    Leaving ``async with Fleet()`` waits for all runs, or cancels them if `on_exit` says so; leaving it by an exception
    or a cancellation cancels them first. Either way their processes have ended afterwards, and each run has its
    terminal status.

    Args:
        tracking_uri: The URI of the tracking server or store; None: ``MLFLOW_TRACKING_URI``, else MLflow's default.
        tracking: A `Tracking` of your own, instead of the URI. The Fleet opens and closes it.
        max_concurrent: The number of runs past the queue at the same time; None: as many as there are CPUs for runs on
            this machine, and any number for runs elsewhere.
        group_limit: The number of runs of one group past the queue at the same time: a number for every group, or
            numbers by the names of groups; None: any number. Groups take turns, however many runs each has in the
            queue. Runs without a group are not limited.
        max_queued: The number of runs that may wait in the queue; None: any number. `submit` then raises `FleetFull`,
            or waits. A group gets a place as long as it has fewer there than are free, so that it leaves room to
            others. A run that can start at once is never refused. Sweeps bound their runs themselves, and are not
            refused either.
        resources: The resources of this machine that its runs may use together; None: all that this process may use.
        inherit_env: The environment variables of this process that the commands of its runs get, for runs that are
            submitted without their own ``inherit_env``: True for all; False for a minimal set (``PATH``, ``HOME``,
            ``LANG``, …); names for these as well, as in ``["AWS_*", "HTTPS_PROXY"]``. Services should give False or
            names, to keep their own secrets to themselves.
        timeouts: The time limits of each stage, for runs that are submitted without their own.
        tracking_patience: Seconds for which writing the terminal status of a run is repeated while tracking cannot be
            reached.
        on_event: Called on the event loop with every `RunEvent`. It must not block. What an async function does for one
            event is awaited before that for the next one begins; the runs do not wait for it, leaving the Fleet does.
        on_exit: ``"wait"``: a normal exit of the block waits for the active runs. ``"cancel"``: it cancels them, which
            is what services want, whose shutdown has little time.
    """

    def __init__(
        self,
        *,
        tracking_uri: str | None = None,
        tracking: Tracking | None = None,
        max_concurrent: int | None = None,
        group_limit: int | Mapping[str, int] | None = None,
        max_queued: int | None = None,
        resources: Resources | None = None,
        inherit_env: bool | Collection[str] = True,
        timeouts: Timeouts | None = None,
        tracking_patience: float = 60.0,
        on_event: Callable[[RunEvent], Awaitable[None] | None] | None = None,
        on_exit: Literal["wait", "cancel"] = "wait",
    ) -> None:
        if on_exit not in ("wait", "cancel"):
            raise UsageError(f"on_exit is {on_exit!r}: give 'wait' or 'cancel'")
        if tracking is not None and tracking_uri is not None:
            raise UsageError("both tracking and tracking_uri are given: give one of them")
        for name, value, least in (("max_concurrent", max_concurrent, 1), ("max_queued", max_queued, 0)):
            if value is not None and (type(value) is not int or value < least):
                raise UsageError(f"{name} is {value!r}: give a whole number, {least} or more, or None")
        check_seconds("tracking_patience", tracking_patience)
        limits = (
            group_limit.values() if isinstance(group_limit, Mapping) else [] if group_limit is None else [group_limit]
        )
        if any(type(limit) is not int or limit < 1 for limit in limits):
            raise UsageError(
                f"group_limit is {group_limit!r}: give a whole number, 1 or more, such numbers by group, or None"
            )
        self._services = FleetServices(
            tracking=tracking if tracking is not None else open_tracking(tracking_uri),
            timeouts=timeouts or Timeouts(),
            tracking_patience=tracking_patience,
            max_concurrent=max_concurrent,
            group_limit=dict(group_limit) if isinstance(group_limit, Mapping) else group_limit,
            max_queued=max_queued,
            resources=resources,
            events=Events(on_event),
            inherit_env=read_inherit_env(inherit_env),
            tracking_uri=None if tracking is not None else tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "",
        )
        self._on_exit = on_exit
        self._throttle = Throttle()
        self._is_used = False

    async def __aenter__(self) -> Self:
        if self._is_used:
            raise UsageError("a Fleet is used once: make a new one")
        self._is_used = True
        await self._services.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._services.stop_accepting()
        try:
            if error is None and self._on_exit == "wait":
                await self._services.join()
        finally:
            # Runs that are still active are cancelled.
            await self._services.close()

    @property
    def tracking(self) -> Tracking:
        """The tracking server or store."""
        return self._services.context.tracking

    @property
    def timeouts(self) -> Timeouts:
        """The time limits of runs that are submitted without their own."""
        return self._services.timeouts

    @property
    def tracking_patience(self) -> float:
        """Seconds for which writing a terminal status is repeated. A change counts for the runs that are active."""
        return self._services.tracking_patience

    @tracking_patience.setter
    def tracking_patience(self, seconds: float) -> None:
        check_seconds("tracking_patience", seconds)
        self._services.tracking_patience = seconds

    async def submit(
        self,
        uri: str | os.PathLike[str],
        entry_point: str = "main",
        version: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        *,
        group: str | None = None,
        wait: bool = False,
        tracking_uri: str | None = None,
        tracking: Tracking | None = None,
        **options: Unpack[RunOptions],
    ) -> FleetRun:
        """Submit a run and return its handle as soon as its MLflow run exists.

        The run then waits for a free slot, builds its environment and starts its command in the background. Errors
        there are failures of the run. A cancelled call cancels the run.

        A detached run (``detach=True``) does not belong to the Fleet: leaving the block, `cancel` and `join` leave it
        alone, and its slots and resources are not counted. Its handle is of use as long as the Fleet is open.

        Args:
            uri: The project: a folder, a Git URI or a zip file, with ``#sub/folder``.
            entry_point: The entry point: a name from MLproject, or a script of the project.
            version: The commit, branch or tag of a Git project.
            parameters: The parameters of the entry point.
            group: The group of the run, for ``Fleet(group_limit=…)``, such as the tenant of a service; None: it belongs
                to none.
            wait: True to wait for room if the queue is full (``Fleet(max_queued=…)``). Several calls get it in their
                order.
            tracking_uri: The URI of the tracking server or store for this run; None: that of the Fleet. The Fleet opens
                each URI once, and closes it when it is closed itself.
            tracking: A `Tracking` of your own, instead of the URI. The Fleet opens it once, and closes it.
            options: The other arguments of `mlfleet.run_async`: the keys of `RunOptions`.

        Raises:
            FleetFull: The queue is full. No run was made.
            MlfleetError: The request, the project or the parameters are wrong, or tracking cannot be reached. No run
                was made.
        """
        # Hundreds of calls at the same time must not keep the event loop from everything else.
        await self._throttle.wait()
        request = RunRequest.of(uri, entry_point, version, parameters, group=group, **options)
        context = await self._services.tracked_by(tracking_uri, tracking)
        return await context.start(request, wait=wait)

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
        group: str | None = None,
        **options: Unpack[RunOptions],
    ) -> Sweep:
        """Run a project at every point of a space.

        Use it as ``async with fleet.sweep(…) as sweep: async for result in sweep: …``. The results come as the points
        end; failed points are results, not exceptions. Leaving the block early cancels the rest. In MLflow the sweep is
        a run of its own, the parent of all others.

        Args:
            uri: The project. All runs use the same commit.
            space: `mlfleet.grid`, `mlfleet.sample`, `mlfleet.zip_`, `mlfleet.rows`, or any iterable or asynchronous
                iterable of mappings. A point is pulled only when it can run. From an asynchronous iterable it is pulled
                only when, besides, all results so far have been consumed, so that it can depend on them.
            entry_point: The entry point: a name from MLproject, or a script of the project.
            version: The commit, branch or tag of a Git project.
            parameters: The parameters that all runs share. A point may override them.
            name: The name of the sweep, unique in its experiment. A sweep with a name can be resumed, and its runs on
                this machine outlive this process if it is killed.
            resume: Continue the sweep of that name, if it exists: skip points that finished, supervise those that still
                run, and run those that failed or were lost. ``"changed"``: even if the project has changed since.
            retry_failed: Run failed points again when resuming.
            max_concurrent: The number of points that are active at the same time; None: as many as the Fleet admits,
                and 100 if it has no limit.
            on_failure: ``"stop"`` ends the sweep at the first failed point and cancels its active runs.
            max_failures: The number of failed points that ends the sweep; None: any number may fail.
            give_up_after: End the sweep if the first so many runs all fail in their setup or within seconds; None:
                never.
            retry: The failures that are tried again, and how often; None: none.
            timeout: Seconds for the command of each run, beside the other limits of the Fleet.
            group: The group of the runs, for ``Fleet(group_limit=…)``; None: they belong to none.
            options: The other arguments of `mlfleet.run_async`, for all runs. ``run_name`` is the name of the parent.

        Raises:
            UsageError: The arguments contradict each other. Errors of the project or the first point are raised when
                the block is entered.
        """
        if timeout is not None:
            if options.get("timeouts") is not None:
                raise UsageError("both timeout and timeouts are given: give Timeouts(run=…) with the others")
            options["timeouts"] = replace(self._services.timeouts, run=timeout)
        if options.get("detach"):
            raise UsageError("a sweep cannot be detached: give it a name, by which it can be resumed")
        if on_failure not in ("continue", "stop"):
            raise UsageError(f"on_failure is {on_failure!r}: give 'continue' or 'stop'")
        settings = SweepSettings(
            request=RunRequest.of(uri, entry_point, version, parameters, group=group, **options),
            name=name,
            resume=resume,
            retry_failed=retry_failed,
            max_concurrent=max_concurrent,
            max_failures=1 if on_failure == "stop" and max_failures is None else max_failures,
            give_up_after=give_up_after,
            retry=retry or Retry(),
        )
        return Sweep(self._services.context, space, settings)

    async def attach(
        self,
        run_id: str,
        *,
        timeouts: Timeouts | None = None,
        tracking_uri: str | None = None,
        tracking: Tracking | None = None,
    ) -> FleetRun:
        """Find a run again that an earlier process submitted, and supervise it to its end like a run of this Fleet.

        If that process is still alive, both supervise the run, and both write the same terminal status. A cancelled
        call leaves the run as it is.

        Args:
            run_id: The id of the MLflow run.
            timeouts: The time limits from now on, of which ``run`` and ``cancel_grace`` count; None: those of the
                Fleet.
            tracking_uri: The URI of the tracking server or store that has the run, as with `submit`; None: the one that
                the record of an active run on this machine names, if it is open, else that of the Fleet.
            tracking: A `Tracking` of your own, instead of the URI.

        Returns:
            The handle. For a run that was lost, which has failed, `FleetRun.check` raises.

        Raises:
            UsageError: The run has ended already, or ends with the process that started it.
            MlfleetError: Tracking or the backend cannot be reached.
        """
        context = await self._services.tracked_by(tracking_uri, tracking, run_id)
        return await context.attach(run_id, timeouts=timeouts)

    async def get(
        self, run_id: str, *, tracking_uri: str | None = None, tracking: Tracking | None = None
    ) -> FleetRun | TrackedRun:
        """Return a handle for any run, active or ended, whichever process submitted it.

        The run is left as it is: unlike `attach`, this does not make it a run of this Fleet.

        Args:
            run_id: The id of the MLflow run, also that of a sweep.
            tracking_uri: The URI of the tracking server or store that has the run, as with `submit`; None: the one that
                the record of an active run on this machine names, if it is open, else that of the Fleet.
            tracking: A `Tracking` of your own, instead of the URI.

        Returns:
            The `FleetRun` if this Fleet supervises the run, else a `TrackedRun`. Both can be asked for `get_status`,
            `wait`, `outcome`, `cancel` and `logs` as long as the Fleet is open.

        Raises:
            TrackingError: There is no such run, or tracking cannot be reached.
        """
        self._services.check_open()
        found = self._services.find(run_id)
        return found or await track(await self._services.tracked_by(tracking_uri, tracking, run_id), run_id)

    async def cancel(self) -> None:
        """Cancel every active run. Return once all their processes have ended and their statuses are written."""
        await self._services.cancel()

    async def join(self) -> None:
        """Wait until every run has ended."""
        await self._services.join()

    def events(self, *, buffer: int = 10_000) -> Subscription[RunEvent]:
        """Read the events of this Fleet's runs from this call on: ``async for event in fleet.events(): …``.

        Every reader gets every event. The iteration ends when the Fleet is closed.

        Args:
            buffer: The number of events that are kept for this reader. If it is slower, the oldest ones are dropped,
                and `RunEvent.lost` of the next one is their number.

        Raises:
            UsageError: `buffer` is not 1 or more.
        """
        if buffer < 1:
            raise UsageError(f"buffer is {buffer}: give 1 or more")
        return self._services.events.subscribe(buffer)

    @property
    def counts(self) -> FleetCounts:
        """The numbers of the runs that are queued, preparing and running, and the same by group.

        Runs that have ended and detached runs are not counted.
        """
        return self._services.counts

    @property
    def runs(self) -> tuple[FleetRun, ...]:
        """The runs that have not ended."""
        return self._services.runs


def context_of(fleet: Fleet) -> RunContext:
    """Return the services of a Fleet, for mlfleet's own modules. They may change with any version."""
    return fleet._services.context
