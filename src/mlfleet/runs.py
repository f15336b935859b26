"""The facts about a run: its status and events, its time limits, its outcome, and the reference to its job."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from mlfleet.errors import ExecutionException, RunCancelled, RunTimeout, SpecError, TrackingError, UsageError

__all__ = [
    "DEFAULT_CANCEL_GRACE",
    "FAILURE_KIND_TAG",
    "REASON_TAG",
    "STARTED_TAG",
    "FailureKind",
    "FleetCounts",
    "JobRef",
    "Outcome",
    "RunEvent",
    "RunStatus",
    "Stage",
    "SubmittedRun",
    "Timeouts",
    "check_seconds",
    "failure",
]

DEFAULT_CANCEL_GRACE = 10.0
"""Default seconds between the request to stop (SIGTERM) and the end by force (SIGKILL)."""

REASON_TAG = "mlfleet.reason"
"""The tag with the reason why a run did not finish well, in one line."""

FAILURE_KIND_TAG = "mlfleet.failure_kind"
"""The tag with the kind of a failure: a value of `FailureKind`."""

STARTED_TAG = "mlfleet.started"
"""The tag with the time at which a run's command began, in milliseconds since the epoch, if it had to wait."""


class RunStatus(StrEnum):
    """The status of a run, in the strings that MLflow uses."""

    SCHEDULED = "SCHEDULED"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"

    @property
    def is_terminal(self) -> bool:
        """True if the run has ended, as FINISHED, FAILED or KILLED. The status will not change then."""
        return self in (RunStatus.FINISHED, RunStatus.FAILED, RunStatus.KILLED)


class Stage(StrEnum):
    """The stages of a run in a Fleet."""

    FETCHING = "fetching"
    QUEUED = "queued"
    PREPARING = "preparing"
    STARTING = "starting"
    STARTED = "started"
    RETRIED = "retried"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RunEvent:
    """An event in the life of a run.

    Attributes:
        stage: The stage that the run has come to, or is still in.
        uri: The URI of the project.
        run_id: The id of the MLflow run; None before it exists.
        run_name: The name of the MLflow run; None before it exists.
        detail: One line about the progress, such as the last line of an environment's build. With ``retried`` and
            ``finished`` it is the reason of a failure.
        status: The terminal status, with ``finished`` and ``retried``.
        time: The time of the event, in seconds since the epoch.
        sweep_id: The id of the MLflow run of the sweep; None if the run does not belong to one.
        index: The number of the sweep's point, counted from 0.
        attempt: The number of the attempt at that point, counted from 1. With ``retried`` it is the one that failed.
        lost: The number of events that this reader missed right before this one, because it was too slow.
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

    def _repr_html_(self) -> str:
        from mlfleet._text.html import Html, block, escaped, status, values

        facts: list[tuple[str, object]] = [("run", self.run_id)] if self.run_id else [("project", self.uri)]
        facts += [] if self.index is None else [("point", self.index), ("attempt", self.attempt)]
        head = f"{status(self.stage)} {status(self.status or '')} {escaped(self.run_name or '')} {values(facts)}"
        return block(Html(head), self.detail)


class FailureKind(StrEnum):
    """The kinds of failure, as far as they matter for trying again."""

    INFRASTRUCTURE = "infrastructure"
    """The surroundings failed, such as the environment, the backend, the tracking server or the machine."""
    PREEMPTED = "preempted"
    """The machine was taken away from the run."""
    OOM = "oom"
    """The run was killed with SIGKILL, as the system does when memory runs out."""
    TIMEOUT = "timeout"
    """A time limit of the run was exceeded."""
    FAILURE = "failure"
    """The command of the run failed."""


@dataclass(frozen=True, slots=True)
class FleetCounts:
    """The numbers of a Fleet's runs that have not ended.

    Attributes:
        queued: The runs that wait in the queue.
        preparing: The runs past the queue whose command does not run yet.
        running: The runs whose command runs, or whose status is being written.
        groups: The same numbers for each group that has such runs, by its name; those of a group have no groups.
    """

    queued: int = 0
    preparing: int = 0
    running: int = 0
    groups: Mapping[str, FleetCounts] = field(default_factory=dict)


@runtime_checkable
class SubmittedRun(Protocol):
    """A protocol for handles of submitted runs. Those of every backend and of the Fleet satisfy it."""

    @property
    def run_id(self) -> str:
        """The id of the MLflow run."""
        ...

    async def wait(self) -> bool:
        """Wait for the end. Return True if the run finished well.

        Any number of tasks may wait for one run. Cancelling one of them does not affect the run.
        """
        ...

    async def cancel(self) -> None:
        """End the run, and return once all of its processes have ended.

        Any number of tasks may call this. A run that has ended keeps its status.
        """
        ...

    async def get_status(self) -> RunStatus:
        """Return the present status of the run."""
        ...

    def logs(self, *, follow: bool = True) -> AsyncIterator[str]:
        """Read the lines of the run's output (stdout and stderr) from its beginning, without their line ends.

        The handles that mlfleet returns also take ``tail`` and ``start``; see `FleetRun.logs`.

        Args:
            follow: Go on until the run has ended. False returns the lines that exist now.
        """
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        status: The terminal status.
        exit_code: The exit code of the project's process; negative for a signal; None if the process did not start or
            its code is not known.
        reason: The reason why the run did not finish well, in a few words; None if it did.
        output: The last lines of the run's output, if it was captured and the run did not finish well.
        error: The error that ended the run before or outside its own process.
        tracking_error: The error that prevented writing the status to tracking; None if it was written.
        cause: The kind of failure, if the backend knows it; see `kind`.
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
        """The kind of failure; None if the run did not fail."""
        if self.status is not RunStatus.FAILED:
            return None
        if self.cause is not None:
            return self.cause
        if isinstance(self.error, RunTimeout):
            return FailureKind.TIMEOUT
        if self.error is not None:
            return FailureKind.INFRASTRUCTURE
        # bash exits with 128 + 9 if SIGKILL ended its child (Bash Reference Manual, Exit Status).
        return FailureKind.OOM if self.exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL) else FailureKind.FAILURE


def failure(name: str, run_id: str, outcome: Outcome, output: Path | None = None) -> ExecutionException:
    """Return the error for a run that did not end well, with its name, the reason and the last lines of its output.

    Args:
        name: The name of the run.
        run_id: The id of the MLflow run.
        outcome: The outcome of the run.
        output: The file with the whole output; None if there is none.
    """
    cancelled = outcome.status is RunStatus.KILLED
    lines = [f"the run {name!r} ({run_id}) " + ("was cancelled" if cancelled else f"failed: {outcome.reason}")]
    lines += [f"  | {line}" for line in outcome.output]
    if output is not None and outcome.exit_code is not None:
        lines.append(f"The whole output is in {output}")
    if outcome.tracking_error is not None:
        lines.append(f"Its status could not be written: {outcome.tracking_error}")
    text = "\n".join(lines)
    facts: dict[str, Any] = {
        "run_id": run_id,
        "exit_code": outcome.exit_code,
        "reason": outcome.reason,
        "output": outcome.output,
    }
    error: ExecutionException
    if cancelled:
        error = RunCancelled(text, **facts)
    elif isinstance(outcome.error, RunTimeout):
        error = RunTimeout(text, stage=outcome.error.stage, seconds=outcome.error.seconds, **facts)
    else:
        error = ExecutionException(text, **facts)
    error.__cause__ = outcome.error
    return error


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The time limits of the stages of a run, in seconds. None, the default of the first three, sets no limit.

    Attributes:
        queue: The time of waiting for a free slot of the Fleet, and again for a Databricks workspace whose quota of new
            jobs is used up.
        setup: The time from the slot to the start of the command: environment, downloads, image, scheduling by the
            backend.
        run: The time of the command itself.
        cancel_grace: The time between the request to stop and the end by force; 10 s by default.
    """

    queue: float | None = None
    setup: float | None = None
    run: float | None = None
    cancel_grace: float = DEFAULT_CANCEL_GRACE

    def __post_init__(self) -> None:
        for name in ("queue", "setup", "run"):
            object.__setattr__(self, name, check_seconds(f"Timeouts: {name}", getattr(self, name), or_none=True))
        grace = check_seconds("Timeouts: cancel_grace", self.cancel_grace, is_finite=True)
        object.__setattr__(self, "cancel_grace", grace)


def check_seconds(name: str, seconds: object, *, or_none: bool = False, is_finite: bool = False) -> float | None:
    """Check a number of seconds that a caller gives, and return it as a number that JSON takes: numpy's are none.

    Args:
        name: The name of the argument, for the error.
        seconds: The value of the argument.
        or_none: Allow None.
        is_finite: Refuse infinity: no orchestrator takes it for a grace.

    Raises:
        UsageError: The value is not a number, is NaN, or is negative.
    """
    if seconds is None and or_none:
        return None
    try:
        number = float(seconds) if isinstance(seconds, Real) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not number >= 0 or (is_finite and number == math.inf):
        raise UsageError(f"{name} is {seconds!r}: give seconds, 0 or more{', or None' if or_none else ''}")
    return number


@dataclass(frozen=True, slots=True)
class JobRef:
    """The reference to a run's job outside this process, with which it can be attached to after this process died.

    It is written to the MLflow run as JSON, in the tag ``mlfleet.ref``.

    Attributes:
        backend: The name of the backend.
        run_id: The id of the MLflow run, from which external names derive.
        data: The other facts that the backend needs, such as a namespace; JSON values only.
        tags: The tags of the MLflow run when the reference was read, among them those of `Backend.tags`; they are not
            part of the JSON.
    """

    TAG: ClassVar[str] = "mlfleet.ref"

    backend: str
    run_id: str
    data: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> str:
        """Return this reference as compact JSON."""
        return json.dumps(
            {"backend": self.backend, "run_id": self.run_id, "data": dict(self.data)},
            separators=(",", ":"),
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text that `to_json` wrote.

        Raises:
            SpecError: The text is not such a reference.
        """
        try:
            raw = json.loads(text)
            return cls(backend=str(raw["backend"]), run_id=str(raw["run_id"]), data=dict(raw["data"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SpecError(f"not a reference to a run: {text[:200]!r}") from error
