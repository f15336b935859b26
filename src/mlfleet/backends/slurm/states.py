"""What the words of Slurm mean: for a job that goes on, and for the outcome of one that has ended."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mlfleet.backends._remote.run import exit_text
from mlfleet.errors import RunLost
from mlfleet.runs import FailureKind, Outcome, RunStatus

__all__ = ["GONE", "ExitRecord", "JobState", "conclude"]

# The states of squeue(1), JOB STATE CODES.
_WAITING = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
)
# COMPLETING may last as long as KillWait and more: processes of the job may still live.
_RUNNING = frozenset({"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT", "COMPLETING"})
_ENDED = frozenset(
    {
        "COMPLETED", "FAILED", "OUT_OF_MEMORY", "TIMEOUT", "DEADLINE", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED",
        "CANCELLED", "LAUNCH_FAILED", "RECONFIG_FAIL",
    }
)  # fmt: skip
# Reasons that do not pass by themselves (squeue(1), JOB REASON CODES).
_NEVER = frozenset(
    {
        "PartitionConfig", "BadConstraints", "InvalidAccount", "InvalidQOS", "DependencyNeverSatisfied",
        "PartitionTimeLimit", "PartitionNodeLimit", "AccountNotAllowed", "QOSNotAllowed",
    }
)  # fmt: skip
_LAUNCH_FAILED = "launch_failed_requeued_held"
_MEMORY_TEXT = "Exceeded job memory limit"
# The controller starts a job again whose node did not answer within MessageTimeout, also with --no-requeue. A node that
# could not begin the first one then cancels it ("Could not launch job … and not able to requeue it, cancelling job" in
# slurmd.log, Slurm 22.05).
_NOT_LAUNCHED = "Slurm cancelled the job, since its node did not start it in time"


@dataclass(frozen=True, slots=True)
class JobState:
    """The state of a job, as squeue shows it.

    Attributes:
        word: The state, such as ``PENDING``; empty: Slurm does not know the job (any more).
        exit_code: The raw exit code, a wait status as in waitpid(2).
        reason: The reason for a pending job to wait, or for the end of another one.
        restarts: The number of times that Slurm has started the job again.
        name: The name of the job: after a reset of the controller another job may have the id.
    """

    word: str
    exit_code: int = 0
    reason: str = ""
    restarts: int = 0
    name: str = ""

    @property
    def is_gone(self) -> bool:
        """True if Slurm does not know the job (any more)."""
        return not self.word

    @property
    def is_waiting(self) -> bool:
        """True if the job has not been started, or waits for another start."""
        return self.word in _WAITING

    @property
    def is_over(self) -> bool:
        """True if no process of the job lives. Unknown words count as going on."""
        return self.is_gone or self.word in _ENDED

    @property
    def is_unknown(self) -> bool:
        """True if this version of mlfleet does not know the word."""
        return not (self.is_gone or self.is_waiting or self.word in _RUNNING or self.word in _ENDED)

    @property
    def never_starts(self) -> bool:
        """True if the job waits for a reason that does not pass by itself."""
        return self.is_waiting and self.reason in _NEVER

    @property
    def failed_to_launch(self) -> bool:
        """True if Slurm could not start the job and holds it until somebody releases it."""
        return self.is_waiting and self.reason.replace(" ", "_") == _LAUNCH_FAILED

    @property
    def is_launch_failure(self) -> bool:
        """True if the job may not have begun. The reason comes with any death by a signal, too."""
        return self.word == "FAILED" and self.reason == "JobLaunchFailure"


GONE = JobState("")


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """What the batch script has recorded of the command's end.

    Attributes:
        code: The exit code, as bash has it: 128 and the number of a signal.
        asked: True if the command was asked to stop before.
    """

    code: int
    asked: bool


def conclude(
    state: JobState, record: ExitRecord | None, *, cancelled: bool, claimed: bool, output: tuple[str, ...]
) -> Outcome:
    """Return the outcome of a job that is over.

    1. A cancellation of ours is KILLED, unless the command had ended by itself.
    2. What Slurm did to the job (time limit, preemption, a lost node, a cancellation from outside) counts more than
       the exit code, which is then that of the signal.
    3. The exit code that the batch script has recorded.
    4. Without a record: what Slurm says.

    Args:
        state: The last state of the job.
        record: What the batch script has recorded; None: nothing.
        cancelled: True if this process has cancelled the job.
        claimed: True if the batch script has begun the command.
        output: The last lines of the output, and without a record also those of Slurm's messages.
    """
    by_itself = record is not None and not record.asked
    if cancelled and not by_itself:
        return Outcome(RunStatus.KILLED, None if record is None else record.code, "cancelled", output)
    match state.word:
        case "TIMEOUT" | "DEADLINE":
            return _failed("the job reached its time limit", FailureKind.TIMEOUT, state, output)
        case "PREEMPTED":
            return _failed("the job was preempted", FailureKind.PREEMPTED, state, output)
        case "NODE_FAIL" | "BOOT_FAIL" | "REVOKED" | "LAUNCH_FAILED" | "RECONFIG_FAIL":
            return _failed(f"the node of the job failed ({state.word})", FailureKind.INFRASTRUCTURE, state, output)
        case "OUT_OF_MEMORY":
            return _failed("the job ran out of memory", FailureKind.OOM, state, output)
        case "CANCELLED" if not by_itself:
            text = "the job was cancelled from outside" if claimed or not state.restarts else _NOT_LAUNCHED
            return _failed(text, FailureKind.INFRASTRUCTURE, state, output)
    if record is not None:
        return _ended(record.code, output)
    return _judge(state, claimed, output)


def _judge(state: JobState, claimed: bool, output: tuple[str, ...]) -> Outcome:
    """Return the outcome of a job without an exit record."""
    if state.is_gone:
        error = RunLost("Slurm does not know the job any more, and it has recorded no exit code", backend="slurm")
        return Outcome(RunStatus.FAILED, None, str(error), output, error=error)
    if state.word == "COMPLETED" and claimed:
        return Outcome(RunStatus.FINISHED, 0)
    if any(_MEMORY_TEXT in line for line in output):
        return _failed("the job exceeded its memory limit", FailureKind.OOM, state, output)
    if not claimed:
        why = f" ({state.reason})" if state.reason not in ("", "None") else ""
        # The raw exit code is then one of Slurm's own error numbers.
        text = f"Slurm could not start the job{why}: see that the node has the work folder at the same path"
        if state.word == "COMPLETED":
            text = "the job did not run the command, since the run had been withdrawn"
        return Outcome(RunStatus.FAILED, None, text, output, cause=FailureKind.INFRASTRUCTURE)
    return _ended(_bash_code(state.exit_code), output)


def _failed(reason: str, kind: FailureKind, state: JobState, output: tuple[str, ...]) -> Outcome:
    return Outcome(RunStatus.FAILED, _bash_code(state.exit_code) or None, reason, output, cause=kind)


def _ended(code: int, output: tuple[str, ...]) -> Outcome:
    if code == 0:
        return Outcome(RunStatus.FINISHED, 0)
    return Outcome(RunStatus.FAILED, code, exit_text(code), output)


def _bash_code(status: int) -> int:
    """Return the exit code of a wait status as bash has it."""
    code = os.waitstatus_to_exitcode(status & 0xFFFF)
    return 128 - code if code < 0 else code
