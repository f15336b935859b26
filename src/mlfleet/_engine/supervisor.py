"""The life of one run: the task that creates its MLflow run, starts it, awaits its end and writes its status."""

from __future__ import annotations

import asyncio
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.grace import StopRequest
from mlfleet._concurrency.threads import FILES
from mlfleet._engine.job import draft, prepare
from mlfleet._engine.plan import Plan
from mlfleet._engine.records import RunRecord
from mlfleet._engine.request import Output, SweepMember
from mlfleet._run_log import get_logger, set_run
from mlfleet._text.lines import last_lines
from mlfleet._text.masking import mask_values
from mlfleet.backends.base import Backend, BackendRun, Job
from mlfleet.errors import MlfleetError, RunLost, RunTimeout, TrackingError, UsageError
from mlfleet.runs import FAILURE_KIND_TAG, REASON_TAG, STARTED_TAG, Outcome, RunEvent, RunStatus, Stage, Timeouts
from mlfleet.tracking.base import RunInfo, Tracking, clean_reason, end_run, failure_tags, log_tags, worse
from mlfleet.tracking.links import run_url
from mlfleet.tracking.models import SUBMISSION_TAG

if TYPE_CHECKING:
    from mlfleet._engine.admission import Reservation
    from mlfleet._engine.context import RunContext

__all__ = ["Instrumentation", "RunDescription", "RunObserver", "SubmittedSupervisor", "Supervisor", "end_tags"]

logger = get_logger("mlfleet.runs")

_NOTABLE_WAIT = 1.0
"""Seconds between queue and start from which on the time of the start is worth a request."""

_HINT_LINES = 100
_CHANGED = re.compile(r"Changing param values is not allowed\.(?:.*?'?\bkey'?(?:=|: )'([^']{1,250})')?")

_SECOND_RUN_TAG = "mlfleet.second_run"
_UNBOUNDED = nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDescription:
    """The facts about a run that its handle and its supervisor need, submitted here or attached to.

    Attributes:
        uri: The URI of the project.
        project_name: The name of the project.
        entry_point: The name of the entry point.
        backend: The name of the backend.
        parameters: The parameters as they were given; empty if they are not known.
        output: The destination of the run's output.
        log_output: Log the captured output as an artifact at the end.
        member: The place of the run in its sweep; None if it does not belong to one.
        secrets: The values of the caller's variables; empty if they are not known.
        group: The group of the run in its Fleet; None if it belongs to none.
    """

    uri: str
    project_name: str
    entry_point: str
    backend: str
    parameters: Mapping[str, Any]
    output: Output = "capture"
    log_output: bool = False
    member: SweepMember | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)
    group: str | None = None

    @classmethod
    def of(cls, plan: Plan) -> RunDescription:
        """Describe the run of a plan."""
        request = plan.request
        return cls(
            uri=plan.project.uri,
            project_name=plan.project_name,
            entry_point=plan.entry_point.name,
            backend=plan.backend,
            parameters=request.parameters,
            output=request.output,
            log_output=request.log_output,
            member=request.member,
            secrets=tuple((request.env or {}).values()),
            group=request.group,
        )


class RunObserver(Protocol):
    """An observer of one run. Its methods are called on the event loop, must not block and must not raise."""

    @property
    def variables(self) -> Mapping[str, str]:
        """Environment variables for the command."""
        ...

    def follow(self, event: RunEvent) -> None:
        """Receive an event of the run, before all other readers do."""
        ...

    def end(self) -> None:
        """Receive the end of the supervision, after the last event."""
        ...


class Instrumentation(Protocol):
    """A maker of observers for the runs of a Fleet."""

    @property
    def names(self) -> Collection[str]:
        """The names of the environment variables that a run may get."""
        ...

    def observe(self, supervisor: Supervisor) -> RunObserver:
        """Observe a new run. Called where the run is submitted."""
        ...


class Supervisor(ABC):
    """Supervises one run from its MLflow run to its terminal status, in one task that the Fleet owns.

    However the task ends (by itself, by `cancel`, or by any number of cancellations from outside), the run is ended at
    its backend and its status is written before. Both happen in tasks of their own.

    Args:
        context: The services of the Fleet.
        description: The facts about the run.
        timeouts: The time limits of its stages.

    Attributes:
        description: The facts about the run.
        info: The MLflow run; None before it exists.
        stage: The present stage.
        times: The times at which stages began, in seconds since the epoch.
        metrics: The latest values of the metrics, once the run has ended.
        handle: The backend's handle; None before the run was given to the backend.
        outcome: The outcome; None before the end.
        creation_error: The error that prevented the MLflow run.
        created: Set when the MLflow run exists, or never will.
        started: Set when the command runs, or never will.
        done: Set when the terminal status is written.
        stop: The request to stop, if a call named a grace for it.
    """

    def __init__(self, context: RunContext, description: RunDescription, timeouts: Timeouts) -> None:
        self.description = description
        self.info: RunInfo | None = None
        self.stage = Stage.QUEUED
        self.times: dict[Stage, float] = {}
        self.metrics: Mapping[str, float] = {}
        self.handle: BackendRun | None = None
        self.outcome: Outcome | None = None
        self.creation_error: Exception | None = None
        # Not anyio.Event, which makes one asyncio.Event more for each of them.
        self.created = asyncio.Event()
        self.started = asyncio.Event()
        self.done = asyncio.Event()
        self.stop = StopRequest(timeouts.cancel_grace)
        self._context = context
        self._timeouts = timeouts
        self._scope = anyio.CancelScope()
        self._output_path: Path | None = None
        self._second_run: str | None = None
        self._seen: Outcome | None = None
        """The end of the run as its backend reported it."""
        instrumentation = context.fleet.instrumentation
        self._observer = None if instrumentation is None else instrumentation.observe(self)

    @property
    def tracking(self) -> Tracking:
        """The tracking server or store that has the MLflow run."""
        return self._context.tracking

    @property
    def run_id(self) -> str:
        """The id of the MLflow run.

        Raises:
            UsageError: The run was cancelled before its MLflow run was created.
        """
        if self.info is None:
            raise UsageError("this run has no MLflow run: it was cancelled before there was one")
        return self.info.run_id

    @property
    def url(self) -> str | None:
        """The address of the run's page in MLflow; None without a server."""
        info = self.info
        return None if info is None else run_url(self._context.tracking.uri, info.experiment_id, info.run_id)

    @property
    def output_path(self) -> Path | None:
        """The file with the run's output; None if the output is inherited."""
        if self.description.output == "inherit":
            return None
        if self._output_path is None:
            self._output_path = self._context.fleet.runs_folder.joinpath(self.run_id, "output.log")
        return self._output_path

    async def cancel(self, grace: float | None) -> None:
        """End the run and wait until its status is written. A cancelled call has requested the end all the same.

        Args:
            grace: Seconds between the request to stop and the end by force; None: as the run was submitted with.
        """
        self._scope.cancel()
        if grace is not None:
            self.stop.request(grace)
            if self.handle is not None:
                await self.handle.cancel(grace=grace)
        await self.done.wait()

    async def supervise(self) -> None:
        """Supervise the run to its end. Started once, by the Fleet."""
        outcome: Outcome | None = None
        try:
            with self._scope:
                outcome = await self._live()
        finally:
            await complete(partial(self._end, outcome), restart=True)

    @property
    def is_queued(self) -> bool:
        """True while the run waits in the queue of the Fleet."""
        return False

    def give_up(self) -> None:
        """End the observation. Release all waiters if the supervisor was cancelled before its first step."""
        if self.outcome is None:
            self._set_outcome(self._seen or Outcome(RunStatus.KILLED, reason="cancelled"))
        self._end_observation()

    def _end_observation(self) -> None:
        if self._observer is not None:
            self._observer.end()
            self._observer = None  # they refer to each other

    # ---- stages -----------------------------------------------------------------------------------------------------

    @abstractmethod
    async def _create(self) -> None:
        """Set `info`: create and record the MLflow run, or find it."""

    @abstractmethod
    async def _run_stages(self) -> Outcome:
        """Take the run through all of its stages."""

    async def _live(self) -> Outcome:
        try:
            await self._create()
        except Exception as error:
            self.creation_error = error
            return Outcome(RunStatus.FAILED, reason=str(error), error=error)
        set_run(self.run_id)
        try:
            # Only now: a run whose id is known must be concluded if its driver dies.
            self.created.set()
            self._publish(Stage.QUEUED)
            return await self._run_stages()
        except MlfleetError as error:
            seen = self._seen.output if self._seen else tuple(getattr(error, "output", ()))
            reason = str(error).partition("\n")[0]
            if self._seen is not None and isinstance(self._seen.error, RunLost) and error is not self._seen.error:
                # The run was to be ended for this error, and may still run.
                reason = f"{reason}; {self._seen.error}"
            return Outcome(RunStatus.FAILED, reason=reason, error=error, output=seen)
        except Exception as error:
            logger.exception("the run %s ended by an unexpected error", self.run_id)
            return Outcome(RunStatus.FAILED, reason=f"{type(error).__name__}: {error}", error=error)

    async def _record(self) -> None:
        """Record that this process is the driver of the run, so that others know what to do if it dies."""
        assert self.info is not None  # noqa: S101 - set before
        member = self.description.member
        record = RunRecord(
            run_id=self.info.run_id,
            backend=self.description.backend,
            project=self.description.project_name,
            tracking=self._context.tracking_key,
            grace=self._timeouts.cancel_grace,
            durable=member is not None and member.durable,
            captured=self.description.output == "capture",
            sweep_id=None if member is None else member.sweep_id,
        )
        await self._context.fleet.records.add(record)

    async def _await_end(self, handle: BackendRun) -> Outcome:
        self._publish(Stage.STARTED)
        self.started.set()
        with self._within("run", self._timeouts.run):
            self._seen = await handle.outcome()
        assert self._seen is not None  # noqa: S101 - else the time limit has raised
        return self._seen

    async def _settle(self) -> None:
        """End the run at its backend if its stages were left early. The end that the backend saw counts."""
        if self.handle is not None and self._seen is None:
            await complete(partial(self._stop_handle, self.handle), restart=True)

    async def _stop_handle(self, handle: BackendRun) -> None:
        await handle.cancel(grace=self.stop.remaining)
        self._seen = await handle.outcome()

    # ---- the end ----------------------------------------------------------------------------------------------------

    async def _end(self, outcome: Outcome | None) -> None:
        """Write the terminal status, then release all waiters."""
        outcome = outcome or self._seen or Outcome(RunStatus.KILLED, reason="cancelled")
        if outcome.reason is not None:
            # The words of a backend may be those of the run, which knows its secrets.
            outcome = replace(outcome, reason=mask_values(outcome.reason, await self._secrets()))
        if self.info is not None:
            self._context.fleet.records.end(self.info.run_id, outcome)
            await self._log_output()
            await self._log_start()
            outcome = await self._with_hint(outcome)
            outcome = await self._write_status(self.info, outcome)
            if outcome.tracking_error is None:
                self._context.fleet.records.remove(self.info.run_id)
        self._set_outcome(outcome)
        self._publish(Stage.FINISHED, outcome.reason or "", outcome.status)

    async def _write_status(self, info: RunInfo, outcome: Outcome) -> Outcome:
        tracking, patience = self._context.tracking, self._context.fleet.tracking_patience
        try:
            if self._second_run is not None:
                second = await end_run(tracking, self._second_run, outcome.status, patience=patience)
                self.metrics = second.metrics
                outcome = _with_tracked(outcome, second.status)
            # If the backend cannot tell how the run ended, a status that the run's own code has written counts.
            known = not isinstance(outcome.error, RunLost)
            seen = await end_run(
                tracking,
                info.run_id,
                outcome.status,
                patience=patience,
                overwrite=known,
                tags=self._end_tags(outcome),
            )
            if not known and seen.status is RunStatus.FINISHED:
                ended = Outcome(RunStatus.FINISHED)
            else:
                ended = _with_tracked(outcome, seen.status)
            if ended.status is RunStatus.FAILED and ended is not outcome:
                await log_tags(tracking, info.run_id, self._end_tags(ended), patience=patience)
        except TrackingError as error:
            logger.error(
                "the run %s is %s, but its status could not be written to MLflow: %s",
                info.run_id, outcome.status, error,
            )  # fmt: skip
            return replace(outcome, tracking_error=error)
        self.metrics = {**self.metrics, **seen.metrics}
        return ended

    def _end_tags(self, outcome: Outcome) -> dict[str, str]:
        return end_tags(outcome, is_member=self.description.member is not None)

    async def _secrets(self) -> list[str]:
        """Return the values that must not show in what is written about the run."""
        with suppress(Exception):  # a Tracking of the caller's own: no error of it may keep the run from its end
            _, secret = await self._context.tracking.environ()
            return [*self.description.secrets, *secret.values()]
        return list(self.description.secrets)

    def _set_outcome(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.stage = Stage.FINISHED
        self._release()

    def _release(self) -> None:
        for event in (self.created, self.started, self.done):
            event.set()

    async def _with_hint(self, outcome: Outcome) -> Outcome:
        """Add to the reason of a failure what the run's output says about parameters, which only mlfleet explains."""
        if outcome.status is not RunStatus.FAILED or not outcome.exit_code or self.output_path is None:
            return outcome
        # MLflow's message goes on for 30 lines after the one that is looked for.
        lines = await FILES.run(partial(last_lines, self.output_path, _HINT_LINES))
        found = next((match for line in reversed(lines) if (match := _CHANGED.search(line))), None)
        if found is None:
            return outcome
        name = f" {found[1]!r}" if found[1] else ""
        hint = f"its code logs the parameter{name} with another text than it was given, as 1.0 for 1"
        return replace(outcome, reason=f"{outcome.reason}: {hint}")

    async def _log_output(self) -> None:
        if not self.description.log_output or self.handle is None or self.info is None:
            return
        path = self.output_path
        if path is None:
            return
        try:
            with anyio.move_on_after(self._context.fleet.tracking_patience) as scope:
                await self._context.tracking.log_artifact(self.info, path)
            if scope.cancelled_caught:
                logger.warning("the output of the run %s was not logged in time; it is in %s", self.run_id, path)
        except MlfleetError as error:
            logger.warning("the output of the run %s could not be logged; it is in %s: %s", self.run_id, path, error)

    async def _log_start(self) -> None:
        """Log when the command of a sweep's run began, if it had to wait. MLflow itself keeps the other times."""
        queued, started = self.times.get(Stage.QUEUED), self.times.get(Stage.STARTED)
        if self.description.member is None or queued is None or started is None or started - queued < _NOTABLE_WAIT:
            return
        with suppress(TrackingError), anyio.move_on_after(self._context.fleet.tracking_patience):
            await self._context.tracking.log(self.run_id, tags={STARTED_TAG: str(int(started * 1000))})

    # ---- helpers ----------------------------------------------------------------------------------------------------

    def _publish(self, stage: Stage, detail: str = "", status: RunStatus | None = None) -> None:
        self.stage = stage
        now = time.time()
        self.times.setdefault(stage, now)
        if self._observer is None and not self._context.fleet.events.has_readers:
            return
        member = self.description.member
        self._pass_on(
            RunEvent(
                stage,
                self.description.uri,
                run_id=self.info.run_id if self.info else None,
                run_name=self.info.name if self.info else None,
                detail=detail,
                status=status,
                time=now,
                sweep_id=member.sweep_id if member else None,
                index=member.index if member else None,
                attempt=member.attempt if member else 1,
            )
        )

    def _report(self, stage: Stage, line: str) -> None:
        """Publish a line on the progress of a stage. It may come late: a pull or a build goes on for other runs."""
        if self.stage is stage:
            self._publish(stage, line)

    def _pass_on(self, event: RunEvent) -> None:
        if self._observer is not None:
            self._observer.follow(event)
        self._context.fleet.events.publish(event)

    def _within(self, stage: str, seconds: float | None) -> AbstractContextManager[None]:
        """Limit the time of a stage. When it is over, `RunTimeout` is raised."""
        return _UNBOUNDED if seconds is None else self._bounded(stage, seconds)

    @contextmanager
    def _bounded(self, stage: str, seconds: float) -> Iterator[None]:
        with anyio.move_on_after(seconds) as scope:
            yield
        if scope.cancelled_caught:
            reason = f"the {stage} timeout of {seconds:g} s ran out"
            raise RunTimeout(reason, run_id=self.run_id, reason=reason, stage=stage, seconds=seconds)


def end_tags(outcome: Outcome, *, is_member: bool, secrets: Iterable[str] = ()) -> dict[str, str]:
    """Return the tags to write with a terminal status: see `failure_tags`, and that a run of a sweep was lost.

    Args:
        outcome: The outcome of the run.
        is_member: True if it belongs to a sweep.
        secrets: Texts that the tags must not show.
    """
    tags = failure_tags(outcome, secrets)
    if is_member and isinstance(outcome.error, RunLost):
        tags[SweepMember.LOST_TAG] = clean_reason(outcome.reason or str(outcome.error), secrets)
    return tags


def _with_tracked(outcome: Outcome, seen: RunStatus) -> Outcome:
    """Return the outcome with the status that the MLflow run had already, if that is the worse one.

    1. KILLED: a process that cancels the run of another one writes KILLED before it ends the command.
    2. FAILED: the run's own code has called ``mlflow.end_run("FAILED")``, whatever its exit code says.
    3. FINISHED, or not ended: the outcome counts.
    """
    if not seen.is_terminal or worse(outcome.status, seen) is outcome.status:
        return outcome
    if seen is RunStatus.KILLED:
        return replace(outcome, status=seen, reason="cancelled by another process")
    code = "" if outcome.exit_code is None else f" and ended with exit code {outcome.exit_code}"
    return replace(outcome, status=seen, reason=f"its code set the status {seen} in MLflow{code}")


class SubmittedSupervisor(Supervisor):
    """Supervises a run that this Fleet submits.

    Args:
        context: The services of the Fleet.
        plan: The plan of the run.
        reservation: The place of the run in the queue; released at its end.
    """

    def __init__(self, context: RunContext, plan: Plan, reservation: Reservation) -> None:
        super().__init__(context, RunDescription.of(plan), plan.request.timeouts or context.fleet.timeouts)
        self._plan = plan
        self._reservation = reservation

    @property
    def is_queued(self) -> bool:
        """True while the run waits in the queue."""
        return self._reservation.is_queued

    def give_up(self) -> None:
        """Release all waiters and the place in the queue if the supervisor was cancelled before its first step."""
        self._reservation.release()
        super().give_up()

    async def _live(self) -> Outcome:
        try:
            return await super()._live()
        finally:
            self._reservation.release()

    async def _create(self) -> None:
        request, tracking = self._plan.request, self._context.tracking
        if request.run_id is None:
            experiment = await self._context.experiment_id(request)
            submission = await self._context.fleet.records.begin(self._context.tracking_key, experiment)
            tags = {**self._plan.tags, SUBMISSION_TAG: submission}
            # If this is cancelled, tracking ends what it has created (see `Tracking.create_run`).
            self.info = await tracking.create_run(experiment, name=request.run_name, tags=tags)
        else:
            self.info = await tracking.get_run(request.run_id)
            if self.info.status.is_terminal:
                await tracking.update_run(self.info.run_id, RunStatus.RUNNING)
        await self._record()

    async def _run_stages(self) -> Outcome:
        assert self.info is not None  # noqa: S101 - set by _create
        backend = await self._context.fleet.backend(self._plan.backend)
        job = await draft(
            self._plan,
            self.info,
            self._context.tracking,
            output=self.output_path,
            timeouts=self._timeouts,
        )
        if self._observer is not None:
            # What the caller gives the run counts more.
            added = {name: text for name, text in self._observer.variables.items() if name not in job.secrets}
            job = replace(job, environ={**added, **job.environ})
        await self._log_job(backend, job)
        with self._within("queue", self._timeouts.queue):
            variables = await self._await_slot()
        if variables is None:
            return Outcome(RunStatus.KILLED, reason="cancelled by another process")
        async with AsyncExitStack() as stack:
            return await self._run_job(backend, job, stack, variables)

    async def _await_slot(self) -> Mapping[str, str] | None:
        """Wait for slot and resources. A run that waits for more than a moment is SCHEDULED in MLflow meanwhile.

        Returns:
            The environment variables that tell the run which resources it may use; None if another process has
            cancelled it meanwhile.
        """
        if not self._reservation.is_queued:
            return await self._reservation.granted()
        # Not anyio.move_on_after, which takes more steps: most runs of a fan-out come here.
        with suppress(TimeoutError):
            async with asyncio.timeout(self._context.fleet.queued_after):
                return await self._reservation.granted()
        await self._show_status(RunStatus.SCHEDULED)
        variables = await self._reservation.granted()
        tracking = self._context.tracking
        with suppress(TrackingError), anyio.move_on_after(self._context.fleet.tracking_patience):
            if (await tracking.get_run(self.run_id)).status is RunStatus.KILLED:
                return None
            await tracking.update_run(self.run_id, RunStatus.RUNNING)
        return variables

    async def _run_job(
        self, backend: Backend, job: Job, stack: AsyncExitStack, variables: Mapping[str, str]
    ) -> Outcome:
        try:
            with self._within("setup", self._timeouts.setup):
                self._publish(Stage.PREPARING)
                job = await prepare(
                    job,
                    self._plan,
                    self._context,
                    stack,
                    variables,
                    on_progress=partial(self._report, Stage.PREPARING),
                )
                self._publish(Stage.STARTING)
                self.handle = await backend.submit(replace(job, on_progress=partial(self._report, Stage.STARTING)))
                await self._log_submitted(backend, self.handle)
                await self._await_start(self.handle)
            return await self._await_end(self.handle)
        finally:
            await self._settle()

    async def _await_start(self, handle: BackendRun) -> None:
        """Wait until the command runs, or never will. A run that is held back for long is SCHEDULED in MLflow."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._context.fleet.scheduled_after):
                await handle.started()
                return
        if await handle.get_status() is RunStatus.SCHEDULED:
            await self._show_status(RunStatus.SCHEDULED)
            await handle.started()
            # Not over the KILLED of another process, which has ended the run instead.
            if await handle.get_status() is RunStatus.RUNNING:
                await self._show_status(RunStatus.RUNNING)
        await handle.started()

    async def _show_status(self, status: RunStatus) -> None:
        with suppress(TrackingError), anyio.move_on_after(self._context.fleet.tracking_patience):
            await self._context.tracking.update_run(self.run_id, status)

    async def _log_job(self, backend: Backend, job: Job) -> None:
        """Log parameters and the job's reference in one request, before anything exists that must be found again."""
        tags: dict[str, str] = {}
        if self._plan.request.run_id is not None:
            tags.update(self._plan.tags)
            assert self.info is not None  # noqa: S101 - set by _create
            # The reason of its earlier end is out of date. Removing tags would be requests of their own.
            tags.update({name: "" for name in (REASON_TAG, FAILURE_KIND_TAG) if name in self.info.tags})
        reference = backend.reference(job)
        if reference is not None:
            tags[reference.TAG] = reference.to_json()
        if tags or self._plan.parameters.logged:
            await self._context.tracking.log(job.run_id, params=self._plan.parameters.logged, tags=tags)

    async def _log_submitted(self, backend: Backend, handle: BackendRun) -> None:
        """Log the tags that are known only now. A second MLflow run is nested under the first, and ends with it."""
        tags = dict(backend.tags(handle))
        self._second_run = backend.second_run(handle)
        if self._second_run is not None:
            tags[_SECOND_RUN_TAG] = self._second_run
            nesting = {"mlflow.parentRunId": self.run_id, "mlflow.project.backend": backend.name}
            await self._context.tracking.log(self._second_run, tags=nesting)
        if tags:
            await self._context.tracking.log(self.run_id, tags=tags)
