"""The reason why a run does not start, and the outcome of one that has ended, both from a snapshot. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from mlfleet.backends._remote.run import exit_text
from mlfleet.backends.kubernetes.state import Condition, ContainerState, PodState, Snapshot
from mlfleet.errors import RunLost
from mlfleet.resources import memory_text
from mlfleet.runs import FailureKind, Outcome, RunStatus

__all__ = [
    "PendingKind",
    "PendingReason",
    "decided_outcome",
    "exit_code",
    "outcome",
    "pending_reason",
    "straggling_pod",
]

_IMAGE = (
    "ErrImagePull",
    "ImagePullBackOff",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
)
_CONFIG = (
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "PreCreateHookError",
)
_LONGEST = 500


class PendingKind(StrEnum):
    """The kinds of reasons for which a run does not start; each has a limit of its own."""

    IMAGE = "image"
    CONFIG = "config"
    UNSCHEDULABLE = "unschedulable"


@dataclass(frozen=True, slots=True)
class PendingReason:
    """The reason why a run does not start now.

    Attributes:
        kind: The kind of reason, which has a limit of its own.
        text: The reason for a person to read.
        pod: The name of the pod that waits; empty if none was created yet.
    """

    kind: PendingKind
    text: str
    pod: str = ""


def pending_reason(snapshot: Snapshot) -> PendingReason | None:
    """Return the reason why the run does not start; None if there is none, or a queue holds it back (Kueue, a gate)."""
    job = snapshot.job
    if job.ended or job.suspended or job.deleting:
        return None
    waiting = [pod for pod in snapshot.pods if not pod.ended and not pod.deleting]
    if not waiting:
        # Between two attempts the Job controller waits; before the first there should be a pod at once.
        return None if snapshot.pods else PendingReason(PendingKind.UNSCHEDULABLE, "no pod was created for the Job")
    pod = waiting[-1]
    if pod.gated:
        return None
    if pod.unschedulable:
        return PendingReason(PendingKind.UNSCHEDULABLE, f"no node takes the pod: {_short(pod.unschedulable)}", pod.name)
    for container in (*pod.init, pod.main):
        found = _pending_kind(container)
        if found is not None:
            return PendingReason(found, f"{container.waiting}: {_short(container.message)}".rstrip(": "), pod.name)
    return None


def straggling_pod(snapshot: Snapshot) -> PodState | None:
    """Return the pod whose run container has ended for good while others go on; None if there is none.

    Kubernetes ends sidecars (init containers with ``restartPolicy: Always``) by itself, but waits for every other
    container, such as a proxy that an admission webhook has added.
    """
    job = snapshot.job
    if job.ended or job.ending is not None or job.deleting or not snapshot.pods:
        return None
    pod = snapshot.pods[-1]
    if not pod.main.terminated or pod.deleting or not pod.running:
        return None
    restarts = pod.restart_policy != "Never" and pod.main.exit_code != 0
    return None if restarts else pod


def decided_outcome(snapshot: Snapshot) -> Outcome | None:
    """Return the outcome of a Job by the end of its command, before the Job has one; None if it may try again."""
    job, pod = snapshot.job, snapshot.last_pod
    assert pod is not None  # noqa: S101 - its command has ended
    if pod.main.exit_code == 0:
        return Outcome(RunStatus.FINISHED, 0)
    # Not the controller's own count: before Kubernetes 1.26 it does not count pods that were deleted.
    tried = sum(1 for each in snapshot.pods if each.main.terminated and each.main.exit_code != 0)
    if tried <= job.retries:
        return None
    failed = Condition("Failed", "BackoffLimitExceeded")
    return outcome(replace(snapshot, job=replace(job, failed=failed, attempts=tried)))


def outcome(snapshot: Snapshot) -> Outcome:
    """Return the outcome of a Job that has ended: by its conditions first, and by its pods where it has none.

    The outcome's error is `RunLost` where the end is unknown.
    """
    job = snapshot.job
    code = exit_code(snapshot)
    # A Job that is deleted between the two phases of its end has the first only.
    ending = job.ending.type if job.ending is not None and job.deleted else ""
    if job.complete or ending == "SuccessCriteriaMet":
        return Outcome(RunStatus.FINISHED, 0)
    condition = job.failed or (job.ending if ending else None)
    if condition is None:
        return _without_condition(snapshot, code)
    return Outcome(
        RunStatus.FAILED,
        code,
        _reason(snapshot, condition.reason, condition.message),
        cause=_cause(snapshot, condition.reason),
    )


def exit_code(snapshot: Snapshot) -> int | None:
    """Return the exit code of the last attempt; None if it is unknown."""
    pod = snapshot.last_pod
    if pod is None or not (pod.main.started or pod.main.exit_code is not None):
        return None
    main = pod.main
    if _given_up(snapshot, pod) and pod.cut and main.terminated and main.previous_code is not None:
        # The attempt that was deleted says nothing.
        return main.previous_code
    return main.exit_code


def _without_condition(snapshot: Snapshot, code: int | None) -> Outcome:
    """Return the outcome of a Job that is gone and never had a final condition."""
    job, pod = snapshot.job, snapshot.last_pod
    if not job.unseen:
        reason = f"the Job {job.name} was deleted from outside"
        code = code if pod is not None and pod.main.terminated else None
        return Outcome(RunStatus.FAILED, code, reason, cause=FailureKind.INFRASTRUCTURE)
    if pod is not None and pod.main.terminated and code is not None and not pod.deleting:
        if code == 0:
            return Outcome(RunStatus.FINISHED, 0)
        if job.attempts + 1 > job.retries:
            return Outcome(RunStatus.FAILED, code, _pod_reason(pod, code, deleted=False), cause=_cause(snapshot, ""))
    reason = f"the Job {job.name} is gone, and how it ended was not seen"
    hint = "its ttlSecondsAfterFinished may be too short" if not job.deleting else "somebody deleted it"
    lost = RunLost(f"{reason}; {hint}", backend="kubernetes")
    return Outcome(RunStatus.FAILED, code, str(lost), error=lost)


def _reason(snapshot: Snapshot, reason: str, message: str) -> str:
    job, pod, code = snapshot.job, snapshot.last_pod, exit_code(snapshot)
    why = "" if pod is None else _pod_reason(pod, code, deleted=_deleted_outside(snapshot, pod))
    match reason:
        case "BackoffLimitExceeded":
            # With restartPolicy OnFailure an attempt is a container of the same pod.
            attempts = sum(pod.main.restarts for pod in snapshot.pods) + job.attempts
            tried = f" (attempt {attempts} of {job.retries + 1})" if job.retries else ""
            return f"{why or 'its pods failed'}{tried}"
        case "DeadlineExceeded":
            return "the Job's activeDeadlineSeconds ran out (DeadlineExceeded)"
        case "PodFailurePolicy":
            return f"{why or 'its pod failed'}, which the Job's podFailurePolicy takes for final: {_short(message)}"
        case _:
            return "; ".join(part for part in (why, f"{reason}: {_short(message)}".strip(": ")) if part)


def _cause(snapshot: Snapshot, reason: str) -> FailureKind | None:
    """Return the kind of failure; None leaves that to the exit code."""
    pod = snapshot.last_pod
    # Jobs and pods both have an activeDeadlineSeconds.
    if reason == "DeadlineExceeded" or (pod is not None and pod.reason == "DeadlineExceeded"):
        return FailureKind.TIMEOUT
    if pod is None:
        return FailureKind.INFRASTRUCTURE
    if pod.main.reason == "OOMKilled":
        return FailureKind.OOM
    if pod.reason == "Evicted" or pod.disruption is not None:
        return FailureKind.PREEMPTED
    if _deleted_outside(snapshot, pod):
        return FailureKind.INFRASTRUCTURE
    if not pod.main.started:
        return FailureKind.FAILURE if pod.main.reason == "StartError" else FailureKind.INFRASTRUCTURE
    return None


def _deleted_outside(snapshot: Snapshot, pod: PodState) -> bool:
    """Return True if a pod was deleted while its command ran, and not by the Job's controller."""
    return pod.cut and not _given_up(snapshot, pod)


def _given_up(snapshot: Snapshot, pod: PodState) -> bool:
    """Return True if the Job's controller deletes a pod because its container was restarted too often."""
    # pkg/controller/job/job_controller.go of Kubernetes, pastBackoffLimitOnFailure
    return pod.restart_policy == "OnFailure" and 0 < pod.main.restarts >= snapshot.job.retries


def _pod_reason(pod: PodState, code: int | None, *, deleted: bool) -> str:
    """Return the reason why a pod failed; empty if it is unknown.

    Args:
        pod: The pod.
        code: The exit code of its command; None if it is unknown.
        deleted: True if somebody deleted it while its command ran.
    """
    main = pod.main
    if main.reason == "OOMKilled":
        limit = memory_text(int(pod.memory)) if pod.memory.isdecimal() else pod.memory
        return "out of memory" + (f" (its limit is {limit})" if limit else "")
    if pod.reason == "Evicted":
        return f"evicted from the node {pod.node}: {_short(pod.message)}".rstrip(": ")
    if pod.disruption is not None:
        return f"ended by the cluster ({pod.disruption.reason}): {_short(pod.disruption.message)}".rstrip(": ")
    if deleted:
        return f"its pod {pod.name} was deleted from outside"
    broken = next((each for each in pod.init if each.terminated and each.exit_code), None)
    if broken is not None and not main.started:
        return f"the init container {broken.name!r} failed: {exit_text(broken.exit_code or 0)}"
    if main.reason == "StartError":
        return f"the command cannot be started: {_short(main.message)}"
    if pod.reason:
        return f"{pod.reason}: {_short(pod.message)}".rstrip(": ")
    other = next((each for each in pod.others if each.terminated and each.exit_code), None)
    if other is not None and code == 0:
        return f"the command has succeeded, but the container {other.name!r} failed: {exit_text(other.exit_code or 0)}"
    return "" if code is None else exit_text(code)


def _pending_kind(container: ContainerState) -> PendingKind | None:
    if container.waiting in _IMAGE:
        return PendingKind.IMAGE
    return PendingKind.CONFIG if container.waiting in _CONFIG else None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
