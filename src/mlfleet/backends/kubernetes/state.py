"""What the API server says of a Job and its pods, cut down to what decides. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    "Seen",
    "job_of_pod",
    "read_job",
    "read_pod",
]

MANAGED_BY = "app.kubernetes.io/managed-by"
RUN_LABEL = "mlfleet.run-id"
SWEEP_LABEL = "mlfleet.sweep-id"
CONTAINER_ANNOTATION = "kubectl.kubernetes.io/default-container"
"""Which container is the run's: the annotation that kubectl has for the same purpose."""

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
    """A Job.

    Attributes:
        uid: of this Job; one of the same name that is created later has another.
        name: in its namespace.
        run_id: of the MLflow run, from its label.
        complete: it has ended well.
        failed: how it has failed.
        ending: it will end so, as soon as its pods have (Kubernetes 1.31 and later).
        suspended: nothing of it may run now, as Kueue has it until there is room.
        deleting: somebody has asked for its deletion.
        deleted: it does not exist any more; the rest is its last state.
        unseen: it vanished while nobody looked, so that the last state need not be how it ended.
        attempts: how many of its pods have failed.
        retries: how many may fail without the Job failing.
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
        """Whether it has a condition that no later one changes, or is gone."""
        return self.complete or self.failed is not None or self.deleted


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerState:
    """A container of a pod.

    Attributes:
        name: in its pod.
        waiting: why it waits: ``ContainerCreating``, ``ImagePullBackOff``; empty if it does not.
        running: whether it runs.
        exit_code: how it ended the last time; None: it has not yet.
        reason: ``OOMKilled``, ``Error``, ``StartError``.
        message: of what it waits for, or of its end.
        started: whether it ever ran.
        terminated: whether it has ended and is not started again.
    """

    name: str
    waiting: str = ""
    running: bool = False
    exit_code: int | None = None
    reason: str = ""
    message: str = ""
    started: bool = False
    terminated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PodState:
    """A pod of a Job.

    Attributes:
        uid: of the pod.
        name: in its namespace.
        created: RFC 3339.
        phase: ``Pending``, ``Running``, ``Succeeded``, ``Failed`` or ``Unknown``.
        reason: such as ``Evicted``; mostly empty.
        message: likewise.
        node: where it is; empty while it has none.
        main: the run's container.
        init: init containers, sidecars among them.
        unschedulable: why no node takes it; empty if one may.
        gated: it waits for somebody to admit it.
        disruption: the cluster ended it: preemption, a drained node.
        memory: the limit of the run's container, as written; empty is none.
        deleting: its end has been asked for.
        gone: it does not exist any more; the rest is its last state.
    """

    uid: str
    name: str
    created: str = ""
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    node: str = ""
    main: ContainerState
    init: tuple[ContainerState, ...] = ()
    unschedulable: str = ""
    gated: bool = False
    disruption: Condition | None = None
    memory: str = ""
    deleting: bool = False
    gone: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.gone or self.phase in ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a Job and its pods.

    Attributes:
        job: None before it was seen.
        pods: in the order of their creation.
    """

    job: JobState | None = None
    pods: tuple[PodState, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the Job has ended or is gone."""
        return self.job is not None and self.job.ended

    @property
    def started(self) -> bool:
        """Whether the command has ever run."""
        return any(pod.main.started for pod in self.pods)

    @property
    def last_pod(self) -> PodState | None:
        """The pod that tells how the run ended: the last one that got so far, else the last one."""
        told = [pod for pod in self.pods if pod.main.exit_code is not None or pod.ended]
        return (told or self.pods or (None,))[-1]

    @property
    def status(self) -> RunStatus:
        """In MLflow's words. ``startTime`` is not enough to be RUNNING: a container must run, or have run."""
        job = self.job
        if job is not None and job.ended:
            return RunStatus.FINISHED if job.complete else RunStatus.FAILED
        if self.started and not (job is not None and job.suspended):
            return RunStatus.RUNNING
        return RunStatus.SCHEDULED


def read_job(raw: Mapping[str, Any], *, deleted: bool = False) -> JobState:
    """The state of a Job from its JSON.

    Args:
        raw: of the Job.
        deleted: this is its last state.
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
    """The state of a pod from its JSON.

    Args:
        raw: of the pod.
        gone: this is its last state.
    """
    meta, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    containers = spec.get("containers") or [{}]
    name = (meta.get("annotations") or {}).get(CONTAINER_ANNOTATION) or containers[0].get("name", "")
    spec_of_main: Mapping[str, Any] = next((each for each in containers if each.get("name") == name), {})
    scheduled: Mapping[str, Any] = next(
        (each for each in status.get("conditions") or () if each["type"] == "PodScheduled"), {}
    )
    waits = scheduled.get("status") == "False"
    return PodState(
        uid=meta["uid"],
        name=meta["name"],
        created=meta.get("creationTimestamp") or "",
        phase=status.get("phase") or "Pending",
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        node=spec.get("nodeName") or "",
        main=_find(name, status.get("containerStatuses") or ()),
        init=tuple(_container(each) for each in status.get("initContainerStatuses") or ()),
        unschedulable=scheduled.get("message", "") if waits and scheduled.get("reason") == "Unschedulable" else "",
        gated=waits and scheduled.get("reason") == "SchedulingGated",
        disruption=_conditions(status).get("DisruptionTarget"),
        memory=str(((spec_of_main.get("resources") or {}).get("limits") or {}).get("memory") or ""),
        deleting="deletionTimestamp" in meta,
        gone=gone,
    )


def job_of_pod(raw: Mapping[str, Any]) -> str | None:
    """The uid of the Job that a pod belongs to, or did before it was orphaned."""
    labels = raw["metadata"].get("labels") or {}
    return next((labels[name] for name in _OWNER_LABELS if name in labels), None)


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
    ended = terminated or (raw.get("lastState") or {}).get("terminated") or {}
    return ContainerState(
        name=raw.get("name", ""),
        waiting=(waiting or {}).get("reason") or ("unknown" if waiting is not None else ""),
        running=running is not None,
        exit_code=ended.get("exitCode"),
        reason=ended.get("reason") or "",
        message=(waiting or terminated or {}).get("message") or "",
        started=running is not None or ("exitCode" in ended and ended.get("reason") not in _NOT_STARTED),
        terminated=terminated is not None,
    )
