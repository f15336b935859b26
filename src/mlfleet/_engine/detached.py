"""The handle's side of a detached run: the supervision is in a process of its own, which outlives this one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Number
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import anyio

from mlfleet._engine.attach import find_again, tracked_outcome
from mlfleet._engine.conclude import Driver, judge
from mlfleet._engine.request import RunRequest
from mlfleet._engine.supervisor import RunDescription, Supervisor
from mlfleet._process.detached import Connection
from mlfleet.backends._output import FileOutput
from mlfleet.errors import MlfleetError, RunCancelled, RunLost, SubmitError, UsageError
from mlfleet.resources import Resources
from mlfleet.runs import Outcome, RunEvent, RunStatus, Stage

if TYPE_CHECKING:
    from mlfleet._engine.context import RunContext

__all__ = ["DetachedSupervisor", "Order"]

_PAUSE = 0.2  # seconds between two looks at a run that another process concludes
_PLAIN = (str, int, float, bool, bytes, type(None))
_BY_THIS_PROCESS = (Stage.QUEUED, Stage.FINISHED)
"""The stages that this process publishes itself, when it knows the run and the outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The first message to the process that supervises a detached run.

    Attributes:
        request: The request, with the time limits of the Fleet if it had none.
        tracking_uri: The tracking URI, with its credentials.
        tracking_patience: Seconds for which writing the terminal status is repeated.
        resources: The resources of this machine that the run may use; None: all that the process may use.
        log_level: The level from which on log records are sent back, until the run is known.
        variables: Environment variables for the command that are not the caller's.
    """

    request: RunRequest
    tracking_uri: str
    tracking_patience: float
    resources: Resources | None
    log_level: int
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, request: RunRequest, **settings: Any) -> Order:
        """Make an order whose parameters can be sent to another process."""
        parameters = {name: _plain(value) for name, value in request.parameters.items()}
        level = logging.getLogger("mlfleet").getEffectiveLevel()
        return cls(request=replace(request, parameters=parameters), log_level=level, **settings)


class DetachedSupervisor(Supervisor):
    """Follows a run that another process supervises.

    The end of this supervisor is not the end of the run, unless the MLflow run does not exist yet or `cancel` was
    called. If the other process dies, this one concludes the run.

    Args:
        context: The services of the Fleet.
        order: The message for the other process.
    """

    def __init__(self, context: RunContext, order: Order, parameters: Mapping[str, Any]) -> None:
        request = order.request
        description = RunDescription(
            uri=request.uri,
            project_name=request.uri,
            entry_point=request.entry_point,
            backend=request.backend,
            parameters=parameters,
        )
        super().__init__(context, description, request.timeouts or context.fleet.timeouts)
        self._order = order
        self._connection: Connection | None = None
        self._refusal: Exception | None = None
        self._is_cancelled = False
        self._is_mine = False
        """True if the other process has died, and this one is the driver of the run."""

    async def cancel(self, grace: float | None) -> None:
        """End the run, wherever it is supervised, and wait until its status is written."""
        if self.done.is_set():
            return
        self._is_cancelled = True
        if grace is not None:
            self.stop.request(grace)
        if self._connection is None or (self._is_mine and self.handle is not None):
            await super().cancel(grace)
            return
        self._connection.send("cancel", grace)
        await self.done.wait()

    def stop_following(self) -> None:
        """Stop following the run, which goes on. A run without an MLflow run yet is cancelled."""
        self._scope.cancel()

    def give_up(self) -> None:
        """End the observation. Release all waiters if this supervisor was cancelled before its first step."""
        self._release()
        self._end_observation()

    # ---- stages -----------------------------------------------------------------------------------------------------

    async def _create(self) -> None:
        try:
            self._connection = connection = await Connection.start()
        except OSError as error:
            raise SubmitError(f"the process that supervises the detached run cannot be started: {error}") from error
        try:
            variables = {} if self._observer is None else self._observer.variables
            connection.send("order", replace(self._order, variables=variables))
        except Exception as error:
            raise UsageError(f"the arguments of a detached run must be plain values: {error}") from error
        if self._is_cancelled:
            connection.send("cancel", self.stop.remaining)
        await self._follow(lambda: self.info is not None or self._seen is not None)
        if self._refusal is not None:
            raise self._refusal
        if self.info is None:
            raise RunCancelled("the run was cancelled before its MLflow run was created")

    async def _run_stages(self) -> Outcome:
        self.handle = _Followed(self)
        await self._follow(lambda: self._seen is not None)
        if self._seen is not None:
            return self._seen
        self.handle = None
        return await self._conclude()

    async def _conclude(self) -> Outcome:
        """Conclude a run whose supervising process has died, unless another one does."""
        while True:
            info = await self._context.tracking.get_run(self.run_id)
            if info.status.is_terminal:
                return tracked_outcome(info)
            verdict = await judge(self._context, info, elsewhere=False)
            if verdict.driver is not Driver.LIVES:
                break
            await anyio.sleep(_PAUSE)
        found = None if verdict.outcome is not None else (await find_again(self._context, info)).handle
        await self._record()
        self._is_mine = True
        if verdict.outcome is not None:
            return verdict.outcome
        if isinstance(found, RunLost):
            raise found
        assert found is not None  # noqa: S101 - one of them is given
        self.handle = found
        try:
            if self._is_cancelled:
                await found.cancel(grace=self.stop.remaining)
            await found.started()
            return await self._await_end(found)
        finally:
            if self._is_cancelled:
                await self._settle()

    # ---- messages ---------------------------------------------------------------------------------------------------

    async def _follow(self, is_enough: Callable[[], bool]) -> None:
        """Apply messages of the other process until `is_enough`, or until it is gone."""
        assert self._connection is not None  # noqa: S101 - set by _create
        while not is_enough() and self._refusal is None:
            message = await self._connection.receive()
            if message is None:
                if self.info is None:
                    self._refusal = SubmitError("the process that supervises the detached run has died")
                return
            self._apply(message)

    def _apply(self, message: tuple[Any, ...]) -> None:
        match message:
            case ("log", name, level, text):
                logging.getLogger(name).log(level, "%s", text)
            case ("event", event):
                self._relay(event)
            case ("created", info, description):
                self.info = info
                self.description = replace(description, parameters=self.description.parameters)
            case ("refused", error):
                self._refusal = error
            case ("failed", text):
                self._refusal = SubmitError(f"the process that supervises the detached run has failed:\n{text}")
            case ("ended", outcome, metrics):
                self._seen, self.metrics = outcome, metrics

    def _relay(self, event: RunEvent) -> None:
        if event.stage in _BY_THIS_PROCESS:
            return
        if event.run_id is not None:
            self.stage = event.stage
            self.times.setdefault(event.stage, event.time)
            if event.stage is Stage.STARTED:
                self.started.set()
        self._pass_on(event)

    # ---- the end ----------------------------------------------------------------------------------------------------

    async def _end(self, outcome: Outcome | None) -> None:
        if self._connection is not None:
            if outcome is None and (self.info is None or (self._is_cancelled and not self._is_mine)):
                # The call that submits the run was cancelled: nothing may be left.
                self._is_cancelled = True
                self._connection.send("cancel", self.stop.remaining)
                await self._follow(lambda: self._seen is not None)
            await self._connection.close()
        outcome = outcome or self._seen
        if outcome is None and self.info is not None and not self._is_cancelled:
            self._release()
            return
        outcome = outcome or Outcome(RunStatus.KILLED, reason="cancelled")
        if self._is_mine:
            await super()._end(outcome)
            return
        self._set_outcome(outcome)
        if self.info is not None:
            self._publish(Stage.FINISHED, outcome.reason or "", outcome.status)


class _Followed(FileOutput):
    """The handle of a run that another process gave to its backend.

    Args:
        supervisor: Follows the run.
    """

    def __init__(self, supervisor: DetachedSupervisor) -> None:
        self._supervisor = supervisor

    @property
    def run_id(self) -> str:
        return self._supervisor.run_id

    async def started(self) -> None:
        await self._supervisor.started.wait()

    async def wait(self) -> bool:
        return (await self.outcome()).status is RunStatus.FINISHED

    async def outcome(self) -> Outcome:
        await self._supervisor.done.wait()
        if self._supervisor.outcome is None:
            raise MlfleetError(f"the run {self.run_id} is followed no more")
        return self._supervisor.outcome

    async def cancel(self, *, grace: float | None = None) -> None:
        await self._supervisor.cancel(grace)

    async def get_status(self) -> RunStatus:
        return RunStatus.RUNNING if self._supervisor.stage is Stage.STARTED else RunStatus.SCHEDULED

    def _output_file(self) -> Path | None:
        return self._supervisor.output_path

    async def _output_ended(self) -> None:
        await self._supervisor.done.wait()


def _plain(value: object) -> object:
    """Return a parameter's value in a form that another process can read. It counts as what ``str()`` makes of it."""
    if type(value) not in _PLAIN and isinstance(value, str | Number | PurePath):
        return str(value)
    return value
