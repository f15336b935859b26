"""What goes on in a sweep: points are pulled when there is a place for them, run, and counted."""

from __future__ import annotations

from collections import Counter
from contextlib import AsyncExitStack, suppress

import anyio
from anyio.abc import TaskGroup

from mlfleet._engine.context import RunContext
from mlfleet._sweeps.attempts import Attempts
from mlfleet._sweeps.points import Gate, Source
from mlfleet._sweeps.record import SweepRecord, open_record
from mlfleet._sweeps.results import PointResult, ResultBuffer, SweepCounts
from mlfleet._sweeps.settings import SweepSettings
from mlfleet.errors import TrackingError, UsageError
from mlfleet.runs import RunStatus
from mlfleet.spaces import Point, Points, describe
from mlfleet.tracking.base import RunInfo

__all__ = ["Driver"]

_ELSEWHERE = 100  # runs at once where neither the sweep nor the Fleet has a limit
_HEED = 3.0  # seconds between two looks whether another process has cancelled the sweep
_BUFFER = 256  # results that may wait for the iterating task


class Driver:
    """Drives one sweep, in one task.

    Attributes:
        gate: how many points may be on their way.
        results: on their way to the caller.
        entered: set when the sweep has begun, or could not.
        ended: set when it has its terminal status.
        error: that ended it.
        record: of it; None before it has begun.
        attempts: likewise.
        stopped: why it ends before its space does.
        cancelled: whether that is the caller's wish.
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
        self._on_their_way = 0
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
        """How far the sweep is now."""
        return SweepCounts(
            total=self._total,
            finished=self._statuses[RunStatus.FINISHED],
            failed=self._statuses[RunStatus.FAILED],
            killed=self._statuses[RunStatus.KILLED],
            running=self._on_their_way,
            retries=self.attempts.retries if self.attempts else 0,
            earlier=self._earlier,
        )

    def stop(self, reason: str) -> None:
        """Start nothing more, and end what runs. Only the first reason counts."""
        if self.stopped is not None:
            return
        self.stopped = reason
        self._pulling.cancel()
        self.results.unbound()
        self.gate.open()
        if self.attempts is None:
            self._scope.cancel()
        else:
            self.attempts.stopping.set()

    async def run(self) -> None:
        """From the first point to the terminal status; started once, and never raises."""
        try:
            with self._scope:
                async with AsyncExitStack() as stack:
                    stack.push_async_callback(self._source.close)
                    await self._begin(stack)
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()
            self.entered.set()
            self.results.close()

    async def _begin(self, stack: AsyncExitStack) -> None:
        """Find every mistake that can be found before anything exists; then run the points."""
        context, settings = self._context, self._settings
        self._total = await self._source.total()
        first = await self._source.next()
        if first is None:
            raise UsageError("the space of the sweep has no points: there is nothing to run")
        plan = await context.plan(settings.request_for(first))
        if settings.max_concurrent is None:
            self.gate.resize(context.capacity(plan) or _ELSEWHERE)
        opening = open_record(
            context.tracking, settings, plan, await context.experiment_id(plan.request), describe(self._points),
            patience=context.tracking_patience,
        )  # fmt: skip
        self.record = record = await stack.enter_async_context(opening)
        self.attempts = Attempts(context, settings, plan, record, self.gate)
        self.entered.set()
        try:
            await self._run_points(first, record, self.attempts)
            record.status = self._status()
        finally:
            record.counts, record.stopped = self.counts, self.stopped
        if self.error is not None:
            raise self.error

    def _status(self) -> RunStatus:
        if self.cancelled:
            return RunStatus.KILLED
        good = self.error is None and self._statuses.keys() <= {RunStatus.FINISHED}
        return RunStatus.FINISHED if good else RunStatus.FAILED

    async def _run_points(self, first: Point, record: SweepRecord, attempts: Attempts) -> None:
        async with anyio.create_task_group() as watching:
            watching.start_soon(attempts.end_runs)
            watching.start_soon(self._heed_others, record)
            async with anyio.create_task_group() as points:
                with self._pulling:
                    await self._pull(first, points)
                if self.stopped is None:
                    for info in record.unclaimed():
                        points.start_soon(self._take_back, info)
            watching.cancel_scope.cancel()

    async def _heed_others(self, record: SweepRecord) -> None:
        """Another process cancels a sweep by writing so in tracking."""
        while self.stopped is None:
            await anyio.sleep(_HEED)
            await self._heed(record)

    async def _heed(self, record: SweepRecord) -> None:
        with suppress(TrackingError):
            info = await self._context.tracking.get_run(record.info.run_id)
            if info.status is RunStatus.KILLED and self.stopped is None:
                self.cancelled = True
                self.stop("cancelled by another process")

    async def _pull(self, first: Point, points: TaskGroup) -> None:
        point: Point | None = first
        index = 0
        try:
            while point is not None:
                await self.gate.enter()
                if index > 0:
                    if self._source.adaptive:
                        await self.results.worked_through()
                    point = await self._source.next()
                if point is None:
                    self.gate.leave()
                else:
                    self._on_their_way += 1
                    points.start_soon(self._run_point, index, point)
                    index += 1
        except Exception as error:
            self._fail(error)

    async def _run_point(self, index: int, point: Point) -> None:
        assert self.attempts is not None  # noqa: S101 - there is no point before
        try:
            result = await self.attempts.run(index, point)
        except Exception as error:
            self._fail(error)
            return
        finally:
            self._on_their_way -= 1
        self._count(result)
        if result.status is RunStatus.KILLED and self.stopped is None and self.record is not None:
            await self._heed(self.record)
        await self.results.put(result)
        self.gate.leave()

    async def _take_back(self, info: RunInfo) -> None:
        """See to a run of an earlier session whose point is not in the space any more; it gives no result."""
        assert self.attempts is not None  # noqa: S101
        try:
            await self.attempts.take_back(info)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """The sweep itself cannot go on."""
        if self.error is None:
            self.error = error
        self.stop(f"{type(error).__name__}: {error}")

    def _count(self, result: PointResult) -> None:
        assert self.attempts is not None  # noqa: S101
        self._statuses[result.status] += 1
        self._earlier += result.earlier
        if result.status is not RunStatus.FAILED:
            return
        failed, most = self._statuses[RunStatus.FAILED], self._settings.max_failures
        if most is not None and failed >= most:
            self.stop(f"{failed} of at most {most} points failed; the last one: {result.reason}")
        broken, enough = self.attempts.broken_after(), self._settings.give_up_after
        if enough is not None and broken is not None and broken >= enough:
            self.stop(f"the first {broken} runs all failed before they got going; the last one: {result.reason}")
