"""The states of a Job and its pods, read from the JSON of the API server. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from mlfleet.runs import RunStatus

__all__ = [
    "CONTAINER_ANNOTATION",
    "MANAGED_BY",
    "RUN_LABEL",
    "SWEEP_LABEL",
    "Condition",
    "ContainerState",
    "JobState",
    "PodState",
    "Snapshot",
    "job_of_pod",
    "read_job",
    "read_pod",
]

MANAGED_BY = "app.kubernetes.io/managed-by"
RUN_LABEL = "mlfleet.run-id"
SWEEP_LABEL = "mlfleet.sweep-id"
CONTAINER_ANNOTATION = "kubectl.kubernetes.io/default-container"
"""The annotation that names the run's container; kubectl uses it for the same purpose."""

_OWNER_LABELS = ("batch.kubernetes.io/controller-uid", "controller-uid")
# The container was never started: https://github.com/kubernetes/kubernetes/blob/master/pkg/kubelet/container/sync_result.go
_NOT_STARTED = ("StartError", "ContainerCannotRun", "ContainerStatusUnknown")


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition whose status is "True"."""

    type: str
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """The state of a Job.

    Attributes:
        uid: The uid of this Job; a later one with the same name has another.
        name: The name in its namespace.
        run_id: The id of the MLflow run, from the label.
        complete: True if it has ended well.
        failed: The condition with which it has failed; None if it has not.
        ending: The condition with which it will end as soon as its pods have (Kubernetes 1.31 and later).
        suspended: True if none of its pods may run now, as Kueue wants it until it has capacity.
        deleting: True if its deletion was requested.
        deleted: True if it does not exist any more; the rest is its last state.
        unseen: True if it disappeared while the watch was interrupted: the last state may not be its end.
        attempts: The number of its pods that have failed.
        retries: The number of pods that may fail without the Job failing.
    """

    uid: str
    name: str
    run_id: str = ""
    complete: bool = False
    failed: Condition | None = None
    ending: Condition | None = None
    suspended: bool = False
    deleting: bool = False
    deleted: bool = False
    unseen: bool = False
    attempts: int = 0
    retries: int = 6

    @property
    def ended(self) -> bool:
        """True if the Job has a final condition, or does not exist any more."""
        return self.complete or self.failed is not None or self.deleted


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerState:
    """The state of a container of a pod.

    Attributes:
        name: The name in its pod.
        waiting: The reason why it waits, such as ``ImagePullBackOff``; empty if it does not wait.
        running: True if it runs now.
        exit_code: The exit code of its last end; None if it has not ended yet.
        reason: The reason of its last end: ``OOMKilled``, ``Error``, ``StartError``.
        message: The message about its waiting or its end.
        started: True if it has ever run.
        terminated: True if it has ended, and its next instance, if there will be one, has not been started.
        restarts: The number of times that it was started again, as ``restartPolicy: OnFailure`` wants it.
        previous_code: The exit code of the instance before the latest one; None if there was none, or it is unknown.
        ended_at: The time of its last end (RFC 3339); empty if it has not ended yet.
    """

    name: str
    waiting: str = ""
    running: bool = False
    exit_code: int | None = None
    reason: str = ""
    message: str = ""
    started: bool = False
    terminated: bool = False
    restarts: int = 0
    previous_code: int | None = None
    ended_at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodState:
    """The state of a pod of a Job.

    Attributes:
        uid: The uid of the pod.
        name: The name in its namespace.
        created: The time of its creation (RFC 3339).
        phase: The phase: ``Pending``, ``Running``, ``Succeeded``, ``Failed`` or ``Unknown``.
        reason: The reason for the phase, such as ``Evicted``; mostly empty.
        message: The message about the phase; mostly empty.
        node: The name of its node; empty while it has none.
        main: The run's container.
        others: The containers beside the run's: those of the template, and injected ones.
        init: The init containers, sidecars among them.
        unschedulable: The reason why no node takes it; empty if one may.
        gated: True if a scheduling gate holds it back.
        disruption: The condition with which the cluster ended it (preemption, a drained node); None if it did not.
        memory: The memory limit of the run's container as written; empty if it has none.
        restart_policy: ``Never``, or ``OnFailure`` if a container that fails is started again in the same pod.
        deleting: True if its deletion was requested.
        cut: True if its deletion was requested before the run's container had ended.
        gone: True if it does not exist any more; the rest is its last state.
    """

    uid: str
    name: str
    created: str = ""
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    node: str = ""
    main: ContainerState
    others: tuple[ContainerState, ...] = ()
    init: tuple[ContainerState, ...] = ()
    unschedulable: str = ""
    gated: bool = False
    disruption: Condition | None = None
    memory: str = ""
    restart_policy: str = "Never"
    deleting: bool = False
    cut: bool = False
    gone: bool = False

    @property
    def ended(self) -> bool:
        """True if none of its containers runs any more."""
        return self.gone or self.phase in ("Succeeded", "Failed")

    @property
    def running(self) -> tuple[str, ...]:
        """The names of the containers that may still run. The node ends sidecars after the others."""
        if self.ended:
            return ()
        return tuple(each.name for each in (self.main, *self.others) if not each.terminated)

    def merge(self, earlier: PodState | None) -> PodState:
        """Return this state with what only an earlier one has shown: the last one names the removal of the pod only."""
        return replace(self, cut=True) if earlier is not None and earlier.cut else self


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The latest known states of a Job and its pods.

    Attributes:
        job: The Job.
        pods: The pods in the order of their creation.
    """

    job: JobState
    pods: tuple[PodState, ...] = ()

    @property
    def ended(self) -> bool:
        """True if the Job has ended or is gone."""
        return self.job.ended

    @property
    def started(self) -> bool:
        """True if the command has ever run."""
        return any(pod.main.started for pod in self.pods)

    @property
    def last_pod(self) -> PodState | None:
        """The pod whose end is the run's end: the last one that has ended, else the last one."""
        ended = [pod for pod in self.pods if pod.main.exit_code is not None or pod.ended]
        return (ended or self.pods or (None,))[-1]

    @property
    def status(self) -> RunStatus:
        """The status in MLflow's words. ``startTime`` does not make it RUNNING: a container must run, or have run."""
        if self.job.ended:
            return RunStatus.FINISHED if self.job.complete else RunStatus.FAILED
        if self.started and not self.job.suspended:
            return RunStatus.RUNNING
        return RunStatus.SCHEDULED


def read_job(raw: Mapping[str, Any], *, deleted: bool = False) -> JobState:
    """Return the state of a Job.

    Args:
        raw: The JSON of the Job.
        deleted: True if this is its last state.
    """
    meta, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    conditions = _conditions(status)
    return JobState(
        uid=meta["uid"],
        name=meta["name"],
        run_id=(meta.get("labels") or {}).get(RUN_LABEL, ""),
        complete="Complete" in conditions,
        failed=conditions.get("Failed"),
        ending=conditions.get("SuccessCriteriaMet") or conditions.get("FailureTarget"),
        suspended=bool(spec.get("suspend")),
        deleting="deletionTimestamp" in meta,
        deleted=deleted,
        attempts=int(status.get("failed") or 0),
        retries=int(spec.get("backoffLimit", 6)),
    )


def read_pod(raw: Mapping[str, Any], *, gone: bool = False) -> PodState:
    """Return the state of a pod.

    Args:
        raw: The JSON of the pod.
        gone: True if this is its last state.
    """
    meta, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    containers = spec.get("containers") or [{}]
    name = (meta.get("annotations") or {}).get(CONTAINER_ANNOTATION) or containers[0].get("name", "")
    spec_of_main: Mapping[str, Any] = next((each for each in containers if each.get("name") == name), {})
    scheduled: Mapping[str, Any] = next(
        (each for each in status.get("conditions") or () if each["type"] == "PodScheduled"), {}
    )
    waits = scheduled.get("status") == "False"
    main = _find(name, status.get("containerStatuses") or ())
    return PodState(
        uid=meta["uid"],
        name=meta["name"],
        created=meta.get("creationTimestamp") or "",
        phase=status.get("phase") or "Pending",
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        node=spec.get("nodeName") or "",
        main=main,
        others=tuple(_container(each) for each in status.get("containerStatuses") or () if each.get("name") != name),
        init=tuple(_container(each) for each in status.get("initContainerStatuses") or ()),
        unschedulable=scheduled.get("message", "") if waits and scheduled.get("reason") == "Unschedulable" else "",
        gated=waits and scheduled.get("reason") == "SchedulingGated",
        disruption=_conditions(status).get("DisruptionTarget"),
        memory=str(((spec_of_main.get("resources") or {}).get("limits") or {}).get("memory") or ""),
        restart_policy=spec_of_main.get("restartPolicy") or spec.get("restartPolicy") or "Never",
        deleting="deletionTimestamp" in meta,
        cut=_is_cut(meta, main),
        gone=gone,
    )


def job_of_pod(raw: Mapping[str, Any]) -> str | None:
    """Return the uid of the Job that a pod belongs to, or belonged to before it was orphaned; None if there is none."""
    labels = raw["metadata"].get("labels") or {}
    return next((labels[name] for name in _OWNER_LABELS if name in labels), None)


def _is_cut(meta: Mapping[str, Any], main: ContainerState) -> bool:
    """Return True if a pod's deletion was requested before its container had ended."""
    if "deletionTimestamp" not in meta:
        return False
    if not main.terminated:
        return True
    # The node asks for the removal of a pod that has ended with a grace of 0, whoever had it deleted.
    grace = float(meta.get("deletionGracePeriodSeconds") or 0)
    return grace > 0 and _time(meta["deletionTimestamp"]) - timedelta(seconds=grace) <= _time(main.ended_at)


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)


def _conditions(status: Mapping[str, Any]) -> dict[str, Condition]:
    return {
        each["type"]: Condition(each["type"], each.get("reason") or "", each.get("message") or "")
        for each in status.get("conditions") or ()
        if each.get("status") == "True"
    }


def _find(name: str, statuses: Sequence[Mapping[str, Any]]) -> ContainerState:
    return next((_container(each) for each in statuses if each.get("name") == name), ContainerState(name=name))


def _container(raw: Mapping[str, Any]) -> ContainerState:
    state = raw.get("state") or {}
    waiting, running, terminated = state.get("waiting"), state.get("running"), state.get("terminated")
    before = (raw.get("lastState") or {}).get("terminated") or {}
    ended = terminated or before
    return ContainerState(
        name=raw.get("name", ""),
        waiting=(waiting or {}).get("reason") or ("unknown" if waiting is not None else ""),
        running=running is not None,
        exit_code=ended.get("exitCode"),
        reason=ended.get("reason") or "",
        message=(waiting or terminated or {}).get("message") or "",
        started=running is not None or ("exitCode" in ended and ended.get("reason") not in _NOT_STARTED),
        terminated=terminated is not None,
        restarts=int(raw.get("restartCount") or 0),
        previous_code=before.get("exitCode") if terminated is not None else None,
        ended_at=ended.get("finishedAt") or "",
    )
