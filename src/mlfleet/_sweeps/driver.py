"""The driver of a sweep: it pulls a point when there is a slot for it, runs it, and counts its end."""

from __future__ import annotations

from collections import Counter
from contextlib import AsyncExitStack, suppress

import anyio
from anyio.abc import TaskGroup

from mlfleet._engine.context import RunContext
from mlfleet._engine.records import RunRecord
from mlfleet._sweeps.attempts import Attempts
from mlfleet._sweeps.points import Gate, Source
from mlfleet._sweeps.record import SweepRecord, open_record
from mlfleet._sweeps.results import PointResult, ResultBuffer, SweepCounts
from mlfleet._sweeps.settings import SweepSettings
from mlfleet.errors import TrackingError, UsageError
from mlfleet.runs import Outcome, RunStatus
from mlfleet.spaces import Point, Points, describe
from mlfleet.tracking.base import RunInfo

__all__ = ["Driver"]

_DEFAULT_CONCURRENT = 100  # active points, if neither the sweep nor the Fleet has a limit
_STATUS_INTERVAL = 3.0  # seconds between two reads of the sweep's status, which another process may set to KILLED
_BUFFER = 256  # results that may wait for the iterating task


class Driver:
    """The driver of one sweep, which runs in one task.

    Args:
        context: The services of the Fleet.
        points: The space.
        settings: The settings of the sweep.

    Attributes:
        gate: The limit to the number of active points.
        results: The results that the caller has not read yet.
        entered: Set when the sweep has begun, or has failed before.
        ended: Set when the sweep has its terminal status.
        error: The error that ended the sweep; None if there was none.
        record: The record of the sweep; None before it has begun.
        attempts: The runner of its points; None before it has begun.
        stopped: The reason why the sweep ends before its space does; None if it does not.
        cancelled: True if the sweep was cancelled, here or by another process.
    """

    def __init__(self, context: RunContext, points: Points, settings: SweepSettings) -> None:
        self._context = context
        self._points = points
        self._settings = settings
        self._source = Source(points)
        self._scope = anyio.CancelScope()
        self._pulling = anyio.CancelScope()
        self._total: int | None = None
        self._statuses: Counter[RunStatus] = Counter()
        self._earlier = 0
        self._active = 0
        self.gate = Gate(settings.max_concurrent or 1)
        self.results = ResultBuffer(_BUFFER)
        self.entered = anyio.Event()
        self.ended = anyio.Event()
        self.error: Exception | None = None
        self.record: SweepRecord | None = None
        self.attempts: Attempts | None = None
        self.stopped: str | None = None
        self.cancelled = False

    @property
    def counts(self) -> SweepCounts:
        """The progress of the sweep."""
        return SweepCounts(
            total=self._total,
            finished=self._statuses[RunStatus.FINISHED],
            failed=self._statuses[RunStatus.FAILED],
            killed=self._statuses[RunStatus.KILLED],
            running=self._active,
            retries=self.attempts.retries if self.attempts else 0,
            earlier=self._earlier,
        )

    def stop(self, reason: str) -> None:
        """Start no further runs, and end the active ones. Only the first reason counts."""
        if self.stopped is not None:
            return
        self.stopped = reason
        self._pulling.cancel()
        self.results.remove_limit()
        self.gate.open()
        if self.attempts is None:
            self._scope.cancel()
        else:
            self.attempts.stopping.set()

    async def run(self) -> None:
        """Drive the sweep from its first point to its terminal status. Started once; errors are kept in `error`."""
        try:
            with self._scope:
                async with AsyncExitStack() as stack:
                    stack.push_async_callback(self._source.close)
                    await self._begin(stack)
        except Exception as error:
            self.error = error
        finally:
            if self.record is not None:
                self._context.fleet.sweep_ids.discard(self.record.info.run_id)
            self.ended.set()
            self.entered.set()
            self.results.close()

    async def _begin(self, stack: AsyncExitStack) -> None:
        """Check the request and the first point before anything is created; then run the points."""
        context, settings = self._context, self._settings
        self._total = await self._source.total()
        first = await self._source.next()
        if first is None:
            raise UsageError("the space of the sweep has no points: there is nothing to run")
        plan = await context.plan(settings.request_for(first))
        if settings.max_concurrent is None:
            self.gate.resize(context.fleet.capacity(plan) or _DEFAULT_CONCURRENT)
        experiment = await context.experiment_id(plan.request)
        submission = None
        if settings.name is None:  # nobody goes on with it if this process dies; one with a name has a lock for that
            submission = await context.fleet.records.begin(context.tracking_key, experiment)
        opening = open_record(
            context.tracking, settings, plan, experiment, describe(self._points),
            patience=context.fleet.tracking_patience, submission=submission,
        )  # fmt: skip
        stack.push_async_callback(self._remove_record)
        self.record = record = await stack.enter_async_context(opening)
        context.fleet.sweep_ids.add(record.info.run_id)
        if settings.name is None:
            facts = RunRecord(
                run_id=record.info.run_id, backend="sweep", project=plan.project_name, tracking=context.tracking_key,
                captured=False,
            )  # fmt: skip
            await context.fleet.records.add(facts)
        self.attempts = Attempts(context, settings, plan, record, self.gate)
        self.entered.set()
        try:
            await self._run_points(first, record, self.attempts)
            record.status = self._status()
        finally:
            record.counts, record.stopped = self.counts, self.stopped
        if self.error is not None:
            raise self.error

    async def _remove_record(self) -> None:
        """Remove the record of a sweep whose status is written; else leave the status in it."""
        if self.record is None:
            return
        if self.record.is_written:
            self._context.fleet.records.remove(self.record.info.run_id)
        else:
            self._context.fleet.records.end(self.record.info.run_id, Outcome(self.record.status))

    def _status(self) -> RunStatus:
        if self.cancelled:
            return RunStatus.KILLED
        good = self.error is None and self._statuses.keys() <= {RunStatus.FINISHED}
        return RunStatus.FINISHED if good else RunStatus.FAILED

    async def _run_points(self, first: Point, record: SweepRecord, attempts: Attempts) -> None:
        async with anyio.create_task_group() as watching:
            watching.start_soon(attempts.end_runs)
            watching.start_soon(self._watch_status, record)
            async with anyio.create_task_group() as points:
                with self._pulling:
                    await self._pull(first, points, attempts)
                if self.stopped is None:
                    for info in record.unclaimed():
                        points.start_soon(self._reattach, info, attempts)
            watching.cancel_scope.cancel()

    async def _watch_status(self, record: SweepRecord) -> None:
        """Stop the sweep when another process has cancelled it, which it does by writing KILLED to tracking."""
        while self.stopped is None:
            await anyio.sleep(_STATUS_INTERVAL)
            await self._check_status(record)

    async def _check_status(self, record: SweepRecord) -> None:
        with suppress(TrackingError):
            info = await self._context.tracking.get_run(record.info.run_id)
            if info.status is RunStatus.KILLED and self.stopped is None:
                self.cancelled = True
                self.stop("cancelled by another process")

    async def _pull(self, first: Point, points: TaskGroup, attempts: Attempts) -> None:
        point: Point | None = first
        index = 0
        try:
            while point is not None:
                await self.gate.enter()
                if index > 0:
                    if self._source.adaptive:
                        await self.results.consumed()
                    point = await self._source.next()
                if point is None:
                    self.gate.leave()
                else:
                    self._active += 1
                    points.start_soon(self._run_point, index, point, attempts)
                    index += 1
        except Exception as error:
            self._fail(error)

    async def _run_point(self, index: int, point: Point, attempts: Attempts) -> None:
        try:
            result = await attempts.run(index, point)
        except Exception as error:
            self._fail(error)
            return
        finally:
            self._active -= 1
        self._count(result, attempts)
        if result.status is RunStatus.KILLED and self.stopped is None and self.record is not None:
            await self._check_status(self.record)
        await self.results.put(result)
        self.gate.leave()

    async def _reattach(self, info: RunInfo, attempts: Attempts) -> None:
        """Supervise a run of an earlier session whose point the space does not have any more. It gives no result."""
        try:
            await attempts.reattach(info)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Stop the sweep because of an error of its own."""
        if self.error is None:
            self.error = error
        self.stop(f"{type(error).__name__}: {error}")

    def _count(self, result: PointResult, attempts: Attempts) -> None:
        self._statuses[result.status] += 1
        self._earlier += result.earlier
        if result.status is not RunStatus.FAILED:
            return
        failed, most = self._statuses[RunStatus.FAILED], self._settings.max_failures
        if most is not None and failed >= most:
            self.stop(f"{failed} of at most {most} points failed; the last one: {result.reason}")
        early, enough = attempts.count_early_failures(), self._settings.give_up_after
        if enough is not None and early is not None and early >= enough:
            self.stop(f"the first {early} runs all failed before they got going; the last one: {result.reason}")
