"""The attempts at the points of a sweep: found from an earlier session, run, and run again after failures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.grace import StopRequest
from mlfleet._engine.attach import read_kind
from mlfleet._engine.conclude import Driver, Verdict, conclude
from mlfleet._engine.context import RunContext
from mlfleet._engine.plan import Plan
from mlfleet._engine.request import SweepMember
from mlfleet._engine.run import FleetRun
from mlfleet._run_log import get_logger
from mlfleet._sweeps.points import Gate, point_key
from mlfleet._sweeps.record import History, SweepRecord
from mlfleet._sweeps.results import PointResult
from mlfleet._sweeps.settings import SweepSettings
from mlfleet.errors import BackendError, MlfleetError, ParameterError, RunLost, SpecError, TrackingError
from mlfleet.runs import REASON_TAG, JobRef, Outcome, RunEvent, RunStatus, Stage
from mlfleet.spaces import Point
from mlfleet.tracking.base import RunInfo, clean_reason

__all__ = ["Attempts"]

logger = get_logger("mlfleet.sweep")

_EARLY = 5.0  # seconds; a run that fails sooner has probably not begun its work


class Attempts:
    """A runner of the points of one sweep.

    Args:
        context: The services of the Fleet.
        settings: The settings of the sweep.
        plan: The plan of the first run. Those of other runs differ only in their parameters.
        record: The record of the sweep.
        gate: The gate that a point leaves while it waits for its next attempt.

    Attributes:
        runs: The active runs.
        retries: The number of attempts of this session after the first ones.
        stopping: Set when no further runs may start and the active ones must be ended.
        grace: The request to stop the runs, if a call named a grace for it.
    """

    def __init__(
        self, context: RunContext, settings: SweepSettings, plan: Plan, record: SweepRecord, gate: Gate
    ) -> None:
        self._context = context
        self._settings = settings
        self._plan = plan
        self._record = record
        self._gate = gate
        self._ended = 0
        self._only_early_failures = True
        self.runs: set[FleetRun] = set()
        self.retries = 0
        self.stopping = anyio.Event()
        self.grace = StopRequest(0)

    async def run(self, index: int, point: Point) -> PointResult:
        """Run a point until it needs no further attempt. A cancelled call ends its run."""
        parameters = {**self._settings.request.parameters, **point}
        content = self._record.content
        key = None if content is None else point_key(content, self._settings.request.entry_point, parameters)
        history = History() if key is None else self._record.recall(key, index)
        blank = PointResult(index=index, point=point, parameters=parameters, status=RunStatus.KILLED, attempts=0)
        if (earlier := self._settled(blank, history)) is not None:
            return earlier
        return await self._attempts(blank, key, history)

    async def reattach(self, info: RunInfo) -> Outcome | None:
        """Supervise a run of an earlier session to its end. Return None if it was never started."""
        run = await self._find(info)
        return None if run is None else await self._outcome(run)

    async def end_runs(self) -> None:
        """Wait for `stopping`, then end the active runs."""
        await self.stopping.wait()
        async with anyio.create_task_group() as group:
            for run in tuple(self.runs):
                group.start_soon(self.end_run, run)

    async def end_run(self, run: FleetRun) -> None:
        """End one run with the shortest grace that was requested."""
        await run.cancel(grace=self.grace.remaining)

    def count_early_failures(self) -> int | None:
        """Return the number of ended runs if all of them failed early; else None."""
        return self._ended if self._only_early_failures and self._ended else None

    # ---- one point --------------------------------------------------------------------------------------------------

    def _settled(self, blank: PointResult, history: History) -> PointResult | None:
        """Return the result of a point that needs no further attempt; None if it needs one."""
        done = history.finished
        latest = history.latest
        if done is None and latest is not None and not self._settings.retry_failed and not history.open:
            # A run that was lost with its driver did not fail by itself: it runs again.
            done = latest if latest.status is RunStatus.FAILED and SweepMember.LOST_TAG not in latest.tags else None
        if done is None:
            return None
        reason = kind = None
        if done.status is not RunStatus.FINISHED:
            reason = done.tags.get(REASON_TAG) or "failed before the sweep was resumed"
            kind = read_kind(done.tags)
        return replace(
            blank,
            status=done.status, run_id=done.run_id, reason=reason, kind=kind, attempts=history.attempts,
            metrics=done.metrics, earlier=True,
        )  # fmt: skip

    async def _attempts(self, blank: PointResult, key: str | None, history: History) -> PointResult:
        left = list(reversed(history.open))
        attempt, tries = history.attempts, 0
        reason = "it did not finish before the sweep was resumed" if history.runs else None
        while True:
            run: FleetRun | None = None
            is_reattached = bool(left)
            try:
                if left:
                    run = await self._find(left.pop())
                    if run is None:
                        continue
                elif self.stopping.is_set():
                    return replace(blank, attempts=attempt, reason="the sweep ended first")
                else:
                    attempt += 1
                    run = await self._launch(blank, key, attempt, reason)
                outcome = await self._outcome(run)
            except (TrackingError, BackendError, ParameterError, SpecError) as error:
                outcome = Outcome(RunStatus.FAILED, reason=_first_line(error), error=error)
            if is_reattached and isinstance(outcome.error, RunLost):
                reason = outcome.reason  # it died with its driver, which does not count as a try of this session
                continue
            tries += 1
            result = _result(blank, run, outcome, attempt)
            if not self._needs_retry(outcome, tries):
                return result
            reason = outcome.reason
            self._publish_retry(result)
            await self._back_off(tries)

    async def _launch(self, blank: PointResult, key: str | None, attempt: int, reason: str | None) -> FleetRun:
        request, sweep = self._settings.request, self._record.info
        members = self._record.members
        token = None if members is None else await members.expect()
        member = SweepMember(
            sweep_id=sweep.run_id, index=blank.index, key=key, attempt=attempt, token=token,
            retry_reason=None if reason is None else clean_reason(reason), durable=key is not None,
        )  # fmt: skip
        request = replace(
            request,
            parameters=blank.parameters, run_name=f"{sweep.name}-{blank.index}", parent_run_id=sweep.run_id,
            experiment_name=None, experiment_id=sweep.experiment_id, member=member,
        )  # fmt: skip
        run = await self._context.launch(await self._context.plan(request, like=self._plan))
        if members is not None and token is not None:
            try:
                await members.add(token, run.run_id)
            except BaseException:
                await complete(partial(self.end_run, run), restart=True)
                raise
        return run

    async def _find(self, info: RunInfo) -> FleetRun | None:
        """Attach to the run of an earlier session. Return None if it was never started: its MLflow run is ended."""
        if JobRef.TAG in info.tags:
            return await self._context.attach(info.run_id, timeouts=self._settings.request.timeouts, ended=True)
        lost = RunLost("its driver ended before it was started")
        _warn(info.run_id, lost)
        outcome = Outcome(RunStatus.FAILED, reason=str(lost), error=lost)
        await conclude(self._context, info, Verdict(Driver.GONE, ended=True, outcome=outcome))
        return None

    async def _outcome(self, run: FleetRun) -> Outcome:
        self.runs.add(run)
        try:
            if self.stopping.is_set():
                await self.end_run(run)
            outcome = await run.outcome()
        except anyio.get_cancelled_exc_class():
            await complete(partial(self.end_run, run), restart=True)
            raise
        finally:
            self.runs.discard(run)
        if isinstance(outcome.error, RunLost):
            _warn(run.run_id, outcome.error)
        self._count(run, outcome)
        return outcome

    def _count(self, run: FleetRun, outcome: Outcome) -> None:
        if outcome.status is RunStatus.KILLED:
            return
        self._ended += 1
        seconds = _seconds(run)
        if outcome.status is RunStatus.FINISHED or (seconds is not None and seconds >= _EARLY):
            self._only_early_failures = False

    def _needs_retry(self, outcome: Outcome, tries: int) -> bool:
        if self.stopping.is_set() or isinstance(outcome.error, ParameterError | SpecError):
            return False
        return self._settings.retry.again(outcome.kind, tries)

    def _publish_retry(self, failed: PointResult) -> None:
        self.retries += 1
        event = RunEvent(
            Stage.RETRIED,
            self._plan.project.uri,
            run_id=failed.run_id,
            detail=failed.reason or "",
            status=failed.status,
            sweep_id=self._record.info.run_id,
            index=failed.index,
            attempt=failed.attempts,
        )
        self._context.fleet.events.publish(event)

    async def _back_off(self, tries: int) -> None:
        """Wait for the next attempt. Other points may use the slot in the meantime."""
        self._gate.leave()
        with anyio.move_on_after(self._settings.retry.delay(tries)):
            await self.stopping.wait()
        await self._gate.enter()


def _result(blank: PointResult, run: FleetRun | None, outcome: Outcome, attempt: int) -> PointResult:
    result = replace(
        blank,
        status=outcome.status,
        reason=outcome.reason,
        kind=outcome.kind,
        exit_code=outcome.exit_code,
        attempts=attempt,
    )
    if run is None:
        return result
    return replace(result, run=run, run_id=run.run_id, seconds=_seconds(run), metrics=run.metrics)


def _seconds(run: FleetRun) -> float | None:
    """Return the seconds for which the command ran; None if it did not."""
    started, ended = run.times.get(Stage.STARTED), run.times.get(Stage.FINISHED)
    return None if started is None or ended is None else ended - started


def _warn(run_id: str, lost: RunLost) -> None:
    logger.warning("the run %s was lost: %s", run_id, _first_line(lost), extra={"run_id": run_id})


def _first_line(error: MlfleetError) -> str:
    return str(error).partition("\n")[0]
