"""One run, from its MLflow run to its terminal status: the handle, and the task that supervises it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio

from mlfleet._engine.job import Services, draft, prepare
from mlfleet._engine.plan import Plan
from mlfleet.backends.base import Backend, BackendRun, Job
from mlfleet.errors import MlfleetError, RunCancelled, RunLost, RunTimeout, TrackingError, UsageError
from mlfleet.runs import STARTED_TAG, Outcome, RunEvent, RunStatus, Stage, failure
from mlfleet.tracking.base import RunInfo, end_run

__all__ = ["FleetRun"]

logger = logging.getLogger("mlfleet.runs")

_WAITED = 1.0  # seconds from which on it is worth a request to say that a run waited

_UNBOUNDED = nullcontext()
_SECOND_RUN_TAG = "mlfleet.second_run"


class FleetRun:
    """The handle of a run of a `Fleet`. It satisfies `SubmittedRun`.

    Attributes:
        plan: what is run.
    """

    def __init__(self, services: Services, plan: Plan) -> None:
        self.plan = plan
        self._services = services
        self._timeouts = plan.request.timeouts or services.timeouts
        self._scope = anyio.CancelScope()
        self._grace: float | None = None
        self._info: RunInfo | None = None
        self._stage = Stage.QUEUED
        self._handle: BackendRun | None = None
        self._outcome: Outcome | None = None
        self._settled: Outcome | None = None
        self._times: dict[Stage, float] = {}
        self._metrics: Mapping[str, float] = {}
        self._output: Path | None = None
        self._second_run: str | None = None
        self._creation_error: Exception | None = None
        self._created = asyncio.Event()
        self._started = asyncio.Event()
        self._done = asyncio.Event()

    def __repr__(self) -> str:
        state = self._outcome.status if self._outcome else self._stage
        return f"<FleetRun {self._info.run_id if self._info else '(not created)'} {state}>"

    # ---- the handle -------------------------------------------------------------------------------------------------

    @property
    def run_id(self) -> str:
        """The id of the MLflow run."""
        return self.info.run_id

    @property
    def info(self) -> RunInfo:
        """The MLflow run as it was created: its ids, its name, where its artifacts are."""
        if self._info is None:
            raise UsageError("this run has no MLflow run: it was cancelled before there was one")
        return self._info

    @property
    def stage(self) -> Stage:
        """Where the run is on its way."""
        return self._stage

    @property
    def times(self) -> Mapping[Stage, float]:
        """When the run came to each stage that it has seen, in seconds since the epoch."""
        return self._times

    @property
    def metrics(self) -> Mapping[str, float]:
        """The latest value of each metric that the run had logged when it ended; empty before."""
        return self._metrics

    @property
    def output_path(self) -> Path | None:
        """The file with the run's output; None if it is inherited, or kept elsewhere by the backend."""
        if self.plan.request.output == "inherit":
            return None
        if self._output is None:
            self._output = self._services.runs_folder.joinpath(self.run_id, "output.log")
        return self._output

    async def wait(self) -> bool:
        """Wait until the run has ended and tracking tells so; True if it finished well.

        Any number of tasks may wait. Cancelling one of them does not touch the run.
        """
        return (await self.outcome()).status is RunStatus.FINISHED

    async def outcome(self) -> Outcome:
        """Wait like `wait`, and tell how the run ended."""
        await self._done.wait()
        assert self._outcome is not None  # noqa: S101 - set before the event
        return self._outcome

    async def check(self) -> None:
        """Wait like `wait`, and raise if the run did not end well.

        Raises:
            RunCancelled: it was cancelled.
            RunTimeout: it ran out of one of its times.
            ExecutionException: it failed.
        """
        outcome = await self.outcome()
        if outcome.status is not RunStatus.FINISHED:
            raise failure(self.info.name, self.run_id, outcome, self.output_path)

    async def cancel(self, *, grace: float | None = None) -> None:
        """End the run; returns once nothing of it runs any more and tracking tells so (KILLED).

        A run that has ended already keeps its status. Any number of calls, also at the same time.

        Args:
            grace: seconds between the request to stop and the end by force, 0 kills at once; None: as the run's
                timeouts say. Of several calls the shortest grace counts.
        """
        self._scope.cancel()
        if grace is not None:
            self._grace = grace if self._grace is None else min(grace, self._grace)
            if self._handle is not None:
                await self._handle.cancel(grace=grace)
        await self._done.wait()

    async def get_status(self) -> RunStatus:
        """SCHEDULED until the command runs, RUNNING while it does, then how it ended."""
        if self._outcome is not None:
            return self._outcome.status
        if self._handle is None:
            return RunStatus.SCHEDULED
        status = await self._handle.get_status()
        # What the backend calls ended is not ended before tracking says so.
        return RunStatus.RUNNING if status.is_terminal else status

    async def logs(self, *, follow: bool = True) -> AsyncGenerator[str, None]:
        """The lines of the run's output from its beginning.

        Args:
            follow: go on until the run has ended; False gives what there is now.

        Raises:
            UsageError: the output is not captured.
        """
        if self.plan.request.output == "inherit":
            raise UsageError("the output of this run is not captured: submit it with output='capture' to read its logs")
        if follow:
            await self._started.wait()
        if self._handle is not None:
            async for line in self._handle.logs(follow=follow):
                yield line

    # ---- its supervisor ---------------------------------------------------------------------------------------------

    async def created(self) -> None:
        """Wait until the MLflow run exists; raises what prevented it."""
        await self._created.wait()
        if self._creation_error is not None:
            raise self._creation_error
        if self._info is None:
            raise RunCancelled("the run was cancelled before its MLflow run was created")

    async def supervise(self) -> None:
        """The whole life of the run; ends when its terminal status is written. Started once, by the Fleet."""
        outcome: Outcome | None = None
        try:
            with self._scope:
                outcome = await self._live()
        finally:
            # The run's own scope is left, and around this task there is none.
            await self._end(outcome or self._settled or Outcome(RunStatus.KILLED, reason="cancelled"))

    async def _live(self) -> Outcome:
        try:
            await self._create()
        except Exception as error:
            self._creation_error = error
            return Outcome(RunStatus.FAILED, reason=str(error), error=error)
        self._created.set()
        self._tell(Stage.QUEUED)
        try:
            return await self._stages()
        except MlfleetError as error:
            seen = self._settled.output if self._settled else tuple(getattr(error, "output", ()))
            return Outcome(RunStatus.FAILED, reason=_reason(error), error=error, output=seen)
        except Exception as error:
            logger.exception("the run %s ended by an unexpected error", self.run_id)
            return Outcome(RunStatus.FAILED, reason=f"{type(error).__name__}: {error}", error=error)

    async def _create(self) -> None:
        request, tracking = self.plan.request, self._services.tracking
        if request.run_id is None:
            experiment = await self._services.experiment_id(self.plan)
            self._info = await tracking.create_run(experiment, name=request.run_name, tags=self.plan.tags)
            return
        self._info = await tracking.get_run(request.run_id)
        if self._info.status.is_terminal:
            await tracking.update_run(self._info.run_id, RunStatus.RUNNING)

    async def _stages(self) -> Outcome:
        backend = await self._services.backend(self.plan.backend)
        job = await draft(
            self.plan,
            self.info,
            self._services.tracking,
            output=self.output_path,
            cancel_grace=self._timeouts.cancel_grace,
        )
        await self._log(backend, job)
        slot = self._services.slot(self.plan)
        with self._within("queue", self._timeouts.queue):
            share = await slot.take()
        try:
            async with AsyncExitStack() as stack:
                return await self._run(backend, job, stack, share)
        finally:
            slot.release()

    async def _run(self, backend: Backend, job: Job, stack: AsyncExitStack, share: Mapping[str, str]) -> Outcome:
        try:
            with self._within("setup", self._timeouts.setup):
                self._tell(Stage.PREPARING)
                job = await prepare(
                    job, self.plan, self._services, stack, share, on_progress=partial(self._tell, Stage.PREPARING)
                )
                self._tell(Stage.STARTING)
                self._handle = await backend.submit(job)
                await self._log_submitted(backend, self._handle)
                await self._handle.started()
            return await self._await_end(self._handle)
        finally:
            await self._settle()

    async def _await_end(self, handle: BackendRun) -> Outcome:
        self._tell(Stage.STARTED)
        self._started.set()
        with self._within("run", self._timeouts.run):
            self._settled = outcome = await handle.outcome()
        return outcome

    async def _settle(self) -> None:
        """Leave nothing running, whichever way the stages were left; what the backend saw last is the truth."""
        if self._handle is None or self._settled is not None:
            return
        with anyio.CancelScope(shield=True):
            await self._handle.cancel(grace=self._grace)
            self._settled = await self._handle.outcome()

    async def _log(self, backend: Backend, job: Job) -> None:
        """Parameters and the reference of the run, in one request; before anything is made that must be found again."""
        tags: dict[str, str] = {}
        if self.plan.request.run_id is not None:
            tags.update(self.plan.tags)
        reference = backend.reference(job)
        if reference is not None:
            tags[reference.TAG] = reference.to_json()
        if tags or self.plan.parameters.logged:
            await self._services.tracking.log(job.run_id, params=self.plan.parameters.logged, tags=tags)

    async def _log_submitted(self, backend: Backend, handle: BackendRun) -> None:
        """What is known only now; a second run is put below this one in MLflow, and ends with it."""
        tags = dict(backend.tags(handle))
        self._second_run = backend.second_run(handle)
        if self._second_run is not None:
            tags[_SECOND_RUN_TAG] = self._second_run
            nesting = {"mlflow.parentRunId": self.run_id, "mlflow.project.backend": backend.name}
            await self._services.tracking.log(self._second_run, tags=nesting)
        if tags:
            await self._services.tracking.log(self.run_id, tags=tags)

    async def _end(self, outcome: Outcome) -> None:
        """Write the terminal status, then tell everybody who waits."""
        if self._info is not None:
            await self._log_output()
            await self._log_start()
            try:
                for run_id in filter(None, (self._second_run, self.run_id)):
                    seen = await end_run(
                        self._services.tracking, run_id, outcome.status, patience=self._services.tracking_patience
                    )
                    self._metrics = {**self._metrics, **seen.metrics}
                if isinstance(outcome.error, RunLost) and seen.status is RunStatus.FINISHED:
                    # Its backend cannot tell how it ended, but the run's own code has.
                    outcome = Outcome(RunStatus.FINISHED)
                if seen.status is RunStatus.KILLED and outcome.status is not RunStatus.KILLED:
                    # Whoever cancels a run from another process writes so before it ends the command.
                    outcome = replace(outcome, status=RunStatus.KILLED, reason="cancelled by another process")
            except TrackingError as error:
                logger.error(
                    "the run %s is %s, but its status could not be written to MLflow: %s",
                    self._info.run_id, outcome.status, error,
                )  # fmt: skip
                outcome = replace(outcome, tracking_error=error)
        self._ended(outcome)
        self._tell(Stage.FINISHED, outcome.reason or "", outcome.status)

    def _ended(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._stage = Stage.FINISHED
        for event in (self._created, self._started, self._done):
            event.set()

    def give_up(self) -> None:
        """Nobody shall wait for a run whose supervisor was cancelled before its first step, or torn out of its end."""
        if self._outcome is None:
            self._ended(self._settled or Outcome(RunStatus.KILLED, reason="cancelled"))

    async def _log_output(self) -> None:
        if not self.plan.request.log_output or self._handle is None:
            return
        path = self.output_path
        if path is None:
            return
        try:
            with anyio.move_on_after(self._services.tracking_patience) as scope:
                await self._services.tracking.log_artifact(self.info, path)
            if scope.cancelled_caught:
                logger.warning("the output of the run %s was not logged in time; it is in %s", self.run_id, path)
        except MlfleetError as error:
            logger.warning("the output of the run %s could not be logged; it is in %s: %s", self.run_id, path, error)

    async def _log_start(self) -> None:
        """When the command of a sweep's run began, if it had to wait: the rest of its times are MLflow's own."""
        queued, started = self._times.get(Stage.QUEUED), self._times.get(Stage.STARTED)
        if self.plan.request.member is None or queued is None or started is None or started - queued < _WAITED:
            return
        with suppress(TrackingError), anyio.move_on_after(self._services.tracking_patience):
            await self._services.tracking.log(self.run_id, tags={STARTED_TAG: str(int(started * 1000))})

    def _tell(self, stage: Stage, detail: str = "", status: RunStatus | None = None) -> None:
        self._stage = stage
        now = time.time()
        self._times.setdefault(stage, now)
        if not self._services.is_followed:
            return
        member = self.plan.request.member
        self._services.tell(
            RunEvent(
                stage,
                self.plan.project.uri,
                run_id=self._info.run_id if self._info else None,
                run_name=self._info.name if self._info else None,
                detail=detail,
                status=status,
                time=now,
                sweep_id=member.sweep_id if member else None,
                index=member.index if member else None,
                attempt=member.attempt if member else 1,
            )
        )

    def _within(self, stage: str, seconds: float | None) -> AbstractContextManager[None]:
        """Bound a stage; running out of it raises `RunTimeout`."""
        return _UNBOUNDED if seconds is None else self._bounded(stage, seconds)

    @contextmanager
    def _bounded(self, stage: str, seconds: float) -> Iterator[None]:
        with anyio.move_on_after(seconds) as scope:
            yield
        if scope.cancelled_caught:
            reason = f"the {stage} timeout of {seconds:g} s ran out"
            raise RunTimeout(reason, run_id=self.run_id, reason=reason, stage=stage, seconds=seconds)


def _reason(error: MlfleetError) -> str:
    return str(error).partition("\n")[0]
