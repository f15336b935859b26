"""Statuses and outcomes of Jobs, checked against recordings of Kubernetes 1.36.2 (tests/data/kubernetes-1.36)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlfleet.backends.kubernetes.diagnosis import PendingKind, outcome, pending_reason
from mlfleet.backends.kubernetes.state import JobState, PodState, Snapshot, job_of_pod, read_job, read_pod
from mlfleet.errors import RunLost
from mlfleet.runs import FailureKind, RunStatus

DATA = Path(__file__).parents[2] / "data" / "kubernetes-1.36"


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def history(scenario: str, *, pods: bool = True) -> Iterator[tuple[float, Snapshot]]:
    """Yield the time and the snapshot after each event of both watches, in chronological order."""
    events = [(line["t"], "job", line) for line in lines("jobs.jsonl")]
    if pods:
        events += [(line["t"], "pod", line) for line in lines("pods.jsonl")]
    job: JobState | None = None
    seen: dict[str, PodState] = {}
    for time, kind, line in sorted(events, key=lambda event: event[0]):
        if line["type"] == "BOOKMARK" or line["object"]["metadata"].get("labels", {}).get("scenario") != scenario:
            continue
        deleted = line["type"] == "DELETED"
        if kind == "job":
            job = read_job(line["object"], deleted=deleted)
        else:
            pod = read_pod(line["object"], gone=deleted)
            seen[pod.uid] = pod
        assert job is not None, "the Job is created before its pods"
        yield time, Snapshot(job, tuple(sorted(seen.values(), key=lambda pod: pod.created)))


def last(scenario: str) -> Snapshot:
    return list(history(scenario))[-1][1]


def statuses(scenario: str) -> list[str]:
    """Return the statuses that `get_status` reports, without repetitions."""
    told: list[str] = []
    for _, seen in history(scenario):
        if not told or told[-1] != seen.status:
            told.append(seen.status)
    return told


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("success", ["SCHEDULED", "RUNNING", "FINISHED"]),
        ("exit7", ["SCHEDULED", "RUNNING", "FAILED"]),
        ("backoff2", ["SCHEDULED", "RUNNING", "FAILED"]),
        ("deadline", ["SCHEDULED", "RUNNING", "FAILED"]),
        ("oom", ["SCHEDULED", "RUNNING", "FAILED"]),
        ("no-image", ["SCHEDULED"]),
        ("bad-image-name", ["SCHEDULED"]),
        ("missing-secret", ["SCHEDULED"]),
        ("bad-command", ["SCHEDULED", "FAILED"]),
        ("unschedulable", ["SCHEDULED"]),
        ("suspended", ["SCHEDULED", "RUNNING", "FINISHED"]),
        ("delete-foreground", ["SCHEDULED", "RUNNING", "FAILED"]),
        ("delete-background", ["SCHEDULED", "RUNNING", "FAILED"]),
        ("delete-default", ["SCHEDULED", "RUNNING", "FAILED"]),
        ("ttl", ["SCHEDULED", "RUNNING", "FINISHED"]),
        ("podfailurepolicy", ["SCHEDULED", "RUNNING", "FAILED"]),
        ("sidecar", ["SCHEDULED", "RUNNING", "FINISHED"]),
        ("chatty", ["SCHEDULED", "RUNNING", "FINISHED"]),
    ],
)
def test_statuses_of_each_recorded_job(scenario: str, expected: list[str]) -> None:
    assert statuses(scenario) == expected


@pytest.mark.parametrize("scenario", ["success", "exit7", "backoff2", "deadline", "oom", "sidecar", "suspended"])
def test_job_has_ended_only_with_its_final_condition(scenario: str) -> None:
    """`SuccessCriteriaMet` and `FailureTarget` do not end a Job, regardless of its pods."""
    for line in lines("jobs.jsonl"):
        if line["type"] == "BOOKMARK" or line["object"]["metadata"]["name"] != scenario:
            continue
        types = {each["type"] for each in line["object"]["status"].get("conditions", []) if each["status"] == "True"}
        job = read_job(line["object"], deleted=line["type"] == "DELETED")
        assert job.ended == bool(types & {"Complete", "Failed"}), types


@pytest.mark.parametrize(
    ("scenario", "status", "code", "reason", "kind"),
    [
        ("success", "FINISHED", 0, None, None),
        ("sidecar", "FINISHED", 0, None, None),
        ("suspended", "FINISHED", 0, None, None),
        ("chatty", "FINISHED", 0, None, None),
        # The TTL's DELETED event carries the final conditions.
        ("ttl", "FINISHED", 0, None, None),
        ("exit7", "FAILED", 7, "exit code 7", "failure"),
        ("backoff2", "FAILED", 3, "exit code 3 (attempt 3 of 3)", "failure"),
        ("deadline", "FAILED", 137, "the Job's activeDeadlineSeconds ran out (DeadlineExceeded)", "timeout"),
        ("oom", "FAILED", 137, "out of memory (its limit is 12Mi)", "oom"),
        ("delete-foreground", "FAILED", 137, "the Job delete-foreground was deleted from outside", "infrastructure"),
    ],
)
def test_outcome_of_each_recorded_job(
    scenario: str, status: str, code: int, reason: str | None, kind: str | None
) -> None:
    told = outcome(last(scenario))
    assert (told.status, told.exit_code, told.reason, told.kind) == (status, code, reason, kind)


def test_outcome_names_the_failure_policy_and_the_start_error() -> None:
    told = outcome(last("podfailurepolicy"))
    assert told.exit_code == 42
    assert (told.reason or "").startswith("exit code 42, which the Job's podFailurePolicy takes for final: Container c")
    told = outcome(last("bad-command"))
    assert told.exit_code is not None
    assert "the command cannot be started" in (told.reason or "")
    assert "/no/such/binary" in (told.reason or "")


def test_outcome_without_pods_comes_from_the_job_conditions() -> None:
    for scenario, status in (("success", "FINISHED"), ("exit7", "FAILED"), ("ttl", "FINISHED")):
        seen = list(history(scenario, pods=False))[-1][1]
        assert outcome(seen).status == status


def test_a_finished_pod_does_not_end_a_job_that_may_retry() -> None:
    between = [seen for time, seen in history("backoff2") if 8.82 < time < 15]
    assert between
    for seen in between:
        assert not seen.ended
        assert seen.status is RunStatus.RUNNING
        assert pending_reason(seen) is None


@pytest.mark.parametrize(
    ("scenario", "kind", "text"),
    [
        ("no-image", PendingKind.IMAGE, "registry.invalid/none:1"),
        ("bad-image-name", PendingKind.CONFIG, "UPPER/Case::bad"),
        ("missing-secret", PendingKind.CONFIG, 'secret "nope" not found'),
        ("unschedulable", PendingKind.UNSCHEDULABLE, "0/1 nodes are available"),
    ],
)
def test_pending_reason_of_each_recorded_job(scenario: str, kind: PendingKind, text: str) -> None:
    found = pending_reason(last(scenario))
    assert found is not None
    assert found.kind is kind
    assert text in found.text
    assert found.pod.startswith(scenario)


def test_a_missing_image_keeps_one_pending_reason() -> None:
    """The pod alternates between ErrImagePull and ImagePullBackOff, which must not restart the start timeout."""
    kinds = [found.kind if (found := pending_reason(seen)) else None for _, seen in history("no-image")]
    first = kinds.index(PendingKind.IMAGE)
    assert set(kinds[first:]) == {PendingKind.IMAGE}


def test_a_suspended_job_has_no_pending_reason() -> None:
    suspended = [seen for time, seen in history("suspended") if time < 8.8 and seen.job.suspended]
    assert suspended
    assert [pending_reason(seen) for seen in suspended] == [None] * len(suspended)
    assert {seen.status for seen in suspended} == {RunStatus.SCHEDULED}


def test_a_gated_pod_has_no_pending_reason() -> None:
    raw = {
        "metadata": {"uid": "p", "name": "p"},
        "status": {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]},
    }
    assert pending_reason(Snapshot(job(), (read_pod(raw),))) is None


def test_a_job_without_pods_is_unschedulable() -> None:
    found = pending_reason(Snapshot(job(), ()))
    assert found is not None
    assert found.kind is PendingKind.UNSCHEDULABLE


def test_every_recorded_pod_belongs_to_its_job() -> None:
    uids = {line["object"]["metadata"]["uid"] for line in lines("jobs.jsonl") if line["type"] != "BOOKMARK"}
    for line in lines("pods.jsonl"):
        if line["type"] != "BOOKMARK":
            assert job_of_pod(line["object"]) in uids


def test_job_deleted_between_interim_and_final_condition_keeps_its_outcome() -> None:
    """A Job deleted when it has only `SuccessCriteriaMet` still counts as successful."""
    interim = [seen for _, seen in history("success") if seen.job.ending and not seen.job.complete]
    assert interim
    for seen in interim:
        assert seen.job is not None
        gone = Snapshot(read_deleted("success", "SuccessCriteriaMet"), seen.pods)
        assert outcome(gone).status is RunStatus.FINISHED
    assert outcome(Snapshot(read_deleted("exit7", "FailureTarget"), last("exit7").pods)).reason == "exit code 7"


def test_outcome_of_a_vanished_job_comes_from_its_finished_pod() -> None:
    for scenario, status, code in (("success", "FINISHED", 0), ("exit7", "FAILED", 7)):
        told = outcome(Snapshot(job(unseen=True, deleted=True, retries=0), last(scenario).pods))
        assert (told.status, told.exit_code) == (status, code)
    lost = outcome(Snapshot(job(unseen=True, deleted=True, retries=3), last("exit7").pods))
    assert isinstance(lost.error, RunLost), "a Job that may have tried again"
    lost = outcome(Snapshot(job(unseen=True, deleted=True), ()))
    assert isinstance(lost.error, RunLost)
    assert "ttlSecondsAfterFinished" in (lost.reason or "")


def test_outcome_names_eviction_and_preemption() -> None:
    def pod(**status: Any) -> PodState:
        main = {"name": "c", "state": {"terminated": {"exitCode": 143, "reason": "Error"}}}
        return read_pod(
            {
                "metadata": {"uid": "p", "name": "p"},
                "spec": {"nodeName": "node1", "containers": [{"name": "c"}]},
                "status": {"phase": "Failed", "containerStatuses": [main], **status},
            }
        )

    failed = read_job(
        {
            "metadata": {"uid": "u", "name": "j"},
            "spec": {"backoffLimit": 0},
            "status": {"conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]},
        }
    )
    evicted = outcome(Snapshot(failed, (pod(reason="Evicted", message="The node was low on resource: memory."),)))
    assert evicted.kind is FailureKind.PREEMPTED
    assert evicted.reason == "evicted from the node node1: The node was low on resource: memory."
    target = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "PreemptionByScheduler",
        "message": "preempted",
    }
    preempted = outcome(Snapshot(failed, (pod(conditions=[target]),)))
    assert preempted.kind is FailureKind.PREEMPTED
    assert preempted.reason == "ended by the cluster (PreemptionByScheduler): preempted"
    late = outcome(Snapshot(failed, (pod(reason="DeadlineExceeded", message="Pod was active longer than allowed"),)))
    assert (late.kind, late.reason) == (FailureKind.TIMEOUT, "DeadlineExceeded: Pod was active longer than allowed")
    killed = outcome(Snapshot(failed, (pod(),)))
    assert (killed.kind, killed.reason) == (FailureKind.FAILURE, "exit code 143 (SIGTERM)")


def job(**fields: Any) -> JobState:
    return JobState(**{"uid": "u", "name": "j", **fields})


def read_deleted(scenario: str, condition: str) -> JobState:
    for line in lines("jobs.jsonl"):
        if line["type"] == "BOOKMARK" or line["object"]["metadata"]["name"] != scenario:
            continue
        state = read_job(line["object"], deleted=True)
        if state.ending is not None and state.ending.type == condition and not (state.complete or state.failed):
            return state
    raise AssertionError(f"{scenario} never had {condition} alone")
