"""The handle of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.tasks import TaskOwner
from mlfleet._engine.context import RunContext
from mlfleet._engine.run import FleetRun
from mlfleet._sweeps.driver import Driver
from mlfleet._sweeps.record import SweepRecord
from mlfleet._sweeps.results import PointResult, SweepCounts, SweepResult
from mlfleet._sweeps.settings import SweepSettings
from mlfleet.errors import UsageError
from mlfleet.runs import RunStatus, check_seconds
from mlfleet.spaces import Points
from mlfleet.tracking.base import RunInfo

__all__ = ["Sweep"]


class Sweep:
    """A sweep, made by `Fleet.sweep` and used as ``async with … as sweep: async for result in sweep: …``.

    Entering it checks the request and the first point before anything is created. Iterating gives the results as the
    points end; failed points are results, not exceptions. The iteration ends when the sweep's own MLflow run has its
    terminal status. Leaving the block before that cancels the active runs.
    """

    def __init__(self, context: RunContext, points: Points, settings: SweepSettings) -> None:
        self._context = context
        self._settings = settings
        self._driver = Driver(context, points, settings)
        self._tasks = TaskOwner()
        self._state = "new"

    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise UsageError("a sweep is used once: make a new one")
        self._state = "open"
        self._context.fleet.sweeps.add(self._leave)
        self._tasks.start(self._driver.run(), name=f"mlfleet sweep {self._settings.name or ''}".strip())
        try:
            await self._driver.entered.wait()
        except anyio.get_cancelled_exc_class():
            await self._leave()
            raise
        if self._driver.attempts is None:
            await self._leave()
            raise self._driver.error or UsageError("the sweep was cancelled before it began")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> PointResult:
        result = await self._driver.results.get()
        if result is not None:
            return result
        if self._driver.error is not None:
            raise self._driver.error
        raise StopAsyncIteration

    @property
    def name(self) -> str | None:
        """The name of the sweep; None if it has none."""
        return self._settings.name

    @property
    def run_id(self) -> str:
        """The id of the MLflow run of the sweep, which is the parent of its runs."""
        return self._record.info.run_id

    @property
    def run_name(self) -> str:
        """The name of the MLflow run of the sweep. The runs of its points add ``-`` and their index."""
        return self._record.info.name

    @property
    def experiment_id(self) -> str:
        """The id of the experiment of the sweep and all its runs."""
        return self._record.info.experiment_id

    @property
    def info(self) -> RunInfo:
        """The MLflow run of the sweep as it was when the sweep began."""
        return self._record.info

    @property
    def status(self) -> RunStatus:
        """RUNNING until the sweep has ended, then its terminal status."""
        return self._record.status if self._driver.ended.is_set() else RunStatus.RUNNING

    @property
    def counts(self) -> SweepCounts:
        """The progress of the sweep."""
        return self._driver.counts

    @property
    def runs(self) -> tuple[FleetRun, ...]:
        """The active runs."""
        return tuple(self._driver.attempts.runs) if self._driver.attempts else ()

    @property
    def max_concurrent(self) -> int:
        """The number of points that may be active at the same time."""
        return self._driver.gate.size

    @property
    def paused(self) -> bool:
        """True between `pause` and `resume`."""
        return self._driver.gate.paused

    @property
    def stopped(self) -> str | None:
        """The reason why the sweep ends, or has ended, before its space does; None if it does not."""
        return self._driver.stopped

    def pause(self) -> None:
        """Start no further runs until `resume`. Active runs continue."""
        self._driver.gate.pause(True)

    def resume(self) -> None:
        """Start runs again after `pause`."""
        self._driver.gate.pause(False)

    def resize(self, max_concurrent: int) -> None:
        """Change the number of points that may be active at the same time. Active runs continue.

        The limits of the Fleet still hold.

        Args:
            max_concurrent: The new number, 1 or more.

        Raises:
            UsageError: The number is less than 1.
        """
        if type(max_concurrent) is not int or max_concurrent < 1:
            raise UsageError(f"max_concurrent is {max_concurrent!r}: give 1 or more, or pause the sweep")
        self._driver.gate.resize(max_concurrent)

    async def cancel(self, *, grace: float | None = None) -> None:
        """Start no further runs and end the active ones. Return when the sweep has ended (KILLED).

        The results of the cancelled runs can still be iterated over. A sweep that has ended keeps its status.

        Args:
            grace: Seconds between the request to stop and the end by force; 0 kills at once. Default: the
                ``cancel_grace`` of the runs. Of several calls the shortest grace counts.

        Raises:
            UsageError: The grace is negative or not a finite number. The sweep goes on.
        """
        grace = check_seconds("grace", grace, or_none=True, is_finite=True)
        driver = self._driver
        if driver.ended.is_set():
            return
        driver.cancelled = True
        attempts = driver.attempts
        if attempts is not None and grace is not None:
            attempts.grace.request(grace)
        driver.stop("cancelled")
        if attempts is not None and grace is not None:
            async with anyio.create_task_group() as group:
                for run in tuple(attempts.runs):
                    group.start_soon(attempts.end_run, run)
        await driver.ended.wait()

    async def result(self, seen: Sequence[PointResult] = ()) -> SweepResult:
        """Wait for the end and return all results. An error that the space raised is raised again.

        Args:
            seen: The results that were iterated over before.
        """
        results = [*seen, *[result async for result in self]]
        return SweepResult(
            name=self.name,
            run_id=self.run_id,
            status=self._record.status,
            stopped=self.stopped,
            counts=self.counts,
            results=tuple(sorted(results, key=lambda result: result.index)),
            experiment_id=self.experiment_id,
            tracking_uri=self._context.tracking.uri,
            _open=self._context.reopen,
        )

    @property
    def _record(self) -> SweepRecord:
        if self._driver.record is None:
            raise UsageError("this sweep has not begun: use it as 'async with fleet.sweep(…) as sweep:'")
        return self._driver.record

    async def _leave(self) -> None:
        """Cancel the sweep if it has not ended, and wait for its end through any cancellations of the caller."""
        await complete(self._end, restart=True)

    async def _end(self) -> None:
        await self.cancel()
        await self._tasks.join()
        self._context.fleet.sweeps.discard(self._leave)
