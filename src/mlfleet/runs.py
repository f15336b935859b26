"""What a run is to everybody: its handle, its status, how it ended, and how to find it again."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from mlfleet.errors import ExecutionException, RunCancelled, RunTimeout, SpecError, TrackingError, UsageError

__all__ = [
    "DEFAULT_CANCEL_GRACE",
    "STARTED_TAG",
    "FailureKind",
    "JobRef",
    "Outcome",
    "RunEvent",
    "RunStatus",
    "Stage",
    "SubmittedRun",
    "Timeouts",
    "failure",
]

DEFAULT_CANCEL_GRACE = 10.0
"""Seconds between the request to stop (SIGTERM) and the end by force (SIGKILL)."""

STARTED_TAG = "mlfleet.started"
"""When the command of a run began that had to wait for it, in milliseconds since the epoch."""


class RunStatus(StrEnum):
    """The state of a run, in the strings that MLflow uses."""

    SCHEDULED = "SCHEDULED"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"

    @property
    def is_terminal(self) -> bool:
        """Whether a run in this state has ended and will not change any more."""
        return self in (RunStatus.FINISHED, RunStatus.FAILED, RunStatus.KILLED)


class Stage(StrEnum):
    """Where a run is on its way through a Fleet."""

    FETCHING = "fetching"
    QUEUED = "queued"
    PREPARING = "preparing"
    STARTING = "starting"
    STARTED = "started"
    RETRIED = "retried"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something happened to a run.

    Attributes:
        stage: the stage that the run has come to, or is still in.
        uri: of the project.
        run_id: of the MLflow run; None before there is one.
        run_name: its name; None before there is one.
        detail: one line on what is going on, such as the last line of an environment's build; with ``retried`` and
            ``finished`` the reason of a failure.
        status: its terminal status, with ``finished``.
        time: seconds since the epoch.
        sweep_id: the MLflow run of the sweep that the run belongs to.
        index: the point of the sweep, counted from 0.
        attempt: which attempt at that point this is, counted from 1; with ``retried`` the one that failed.
        lost: how many events this reader has missed right before this one, because it did not keep up.
    """

    stage: Stage
    uri: str
    run_id: str | None = None
    run_name: str | None = None
    detail: str = ""
    status: RunStatus | None = None
    time: float = field(default_factory=time.time)
    sweep_id: str | None = None
    index: int | None = None
    attempt: int = 1
    lost: int = 0


class FailureKind(StrEnum):
    """Why a run failed, as far as that matters for trying again."""

    INFRASTRUCTURE = "infrastructure"
    """Not the run's own doing: its environment, its backend, the tracking server, a lost machine."""
    PREEMPTED = "preempted"
    """Its machine was taken away for something else."""
    OOM = "oom"
    """It was killed, as the system does when memory runs out."""
    TIMEOUT = "timeout"
    """It ran out of a time that was set for it."""
    FAILURE = "failure"
    """Its own command failed."""


@runtime_checkable
class SubmittedRun(Protocol):
    """The handle of a run that was submitted. Every backend's handle and the Fleet's satisfy it."""

    @property
    def run_id(self) -> str:
        """The id of the MLflow run."""
        ...

    async def wait(self) -> bool:
        """Wait for the end; True if the run finished well.

        Any number of tasks may wait for one run. Cancelling a waiter only ends that waiting, never the run.
        """
        ...

    async def cancel(self) -> None:
        """End the run, and return once nothing of it runs any more.

        A second call, also at the same time, and a call on a run that has ended, are fine.
        """
        ...

    async def get_status(self) -> RunStatus:
        """The state of the run now."""
        ...

    def logs(self, *, follow: bool = True) -> AsyncIterator[str]:
        """The lines of the run's output (stdout and stderr), from its beginning, without their line ends.

        Args:
            follow: go on until the run has ended; False gives what there is now.
        """
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: a terminal status.
        exit_code: of the project's process; negative for a signal; None if it never got that far.
        reason: why it did not finish well, in a few words; None if it did.
        output: the last lines of its output, if it was captured and the run did not finish well.
        error: the error that ended the run before or outside its own process.
        tracking_error: why tracking could not be told of this end.
        cause: what kind of failure it was, if the backend knows; see `kind`.
    """

    status: RunStatus
    exit_code: int | None = None
    reason: str | None = None
    output: tuple[str, ...] = ()
    error: BaseException | None = field(default=None, repr=False)
    tracking_error: TrackingError | None = field(default=None, repr=False)
    cause: FailureKind | None = None

    @property
    def kind(self) -> FailureKind | None:
        """What kind of failure it was; None if the run did not fail."""
        if self.status is not RunStatus.FAILED:
            return None
        if self.cause is not None:
            return self.cause
        if isinstance(self.error, RunTimeout):
            return FailureKind.TIMEOUT
        if self.error is not None:
            return FailureKind.INFRASTRUCTURE
        # 137 is what a shell makes of the SIGKILL of its child.
        return FailureKind.OOM if self.exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL) else FailureKind.FAILURE


def failure(name: str, run_id: str, outcome: Outcome, output: Path | None = None) -> ExecutionException:
    """The error for a run that did not end well: it names the run, the reason and the last lines of its output.

    Args:
        name: of the run.
        run_id: of the MLflow run.
        outcome: how it ended.
        output: the file with its whole output.
    """
    cancelled = outcome.status is RunStatus.KILLED
    lines = [f"the run {name!r} ({run_id}) " + ("was cancelled" if cancelled else f"failed: {outcome.reason}")]
    lines += [f"  | {line}" for line in outcome.output]
    if output is not None and outcome.exit_code is not None:
        lines.append(f"The whole output is in {output}")
    if outcome.tracking_error is not None:
        lines.append(f"Its status could not be written: {outcome.tracking_error}")
    error: ExecutionException
    if cancelled:
        error = RunCancelled("\n".join(lines))
    elif isinstance(outcome.error, RunTimeout):
        error = RunTimeout("\n".join(lines), stage=outcome.error.stage, seconds=outcome.error.seconds)
    else:
        error = ExecutionException("\n".join(lines))
    error.run_id, error.exit_code, error.reason, error.output = (
        run_id,
        outcome.exit_code,
        outcome.reason,
        outcome.output,
    )
    error.__cause__ = outcome.error
    return error


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long each stage of a run may take, in seconds; None is no limit.

    Attributes:
        queue: waiting for a free slot of the Fleet.
        setup: from the slot to the start of the command: environment, downloads, image, scheduling by the backend.
        run: the command itself.
        cancel_grace: between the request to stop and the end by force.
    """

    queue: float | None = None
    setup: float | None = None
    run: float | None = None
    cancel_grace: float = DEFAULT_CANCEL_GRACE

    def __post_init__(self) -> None:
        for name in ("queue", "setup", "run", "cancel_grace"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds >= 0:
                raise UsageError(f"the timeout {name!r} is {seconds!r}: give a number of seconds that is not negative")


@dataclass(frozen=True, slots=True)
class JobRef:
    """Where a run lives outside this process: enough to attach to it after this process died.

    It is plain JSON and is written to the MLflow run as the tag ``mlfleet.ref``.

    Attributes:
        backend: the backend's name.
        run_id: the id of the MLflow run; external names derive from it.
        data: what else the backend needs (a namespace, a pid), JSON values only.
    """

    TAG: ClassVar[str] = "mlfleet.ref"

    backend: str
    run_id: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """This reference as compact JSON."""
        return json.dumps(
            {"backend": self.backend, "run_id": self.run_id, "data": dict(self.data)},
            separators=(",", ":"),
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            SpecError: the text is no such reference.
        """
        try:
            raw = json.loads(text)
            return cls(backend=str(raw["backend"]), run_id=str(raw["run_id"]), data=dict(raw["data"]))
        except (ValueError, TypeError, KeyError) as error:
            raise SpecError(f"not a reference to a run: {text[:200]!r}") from error
