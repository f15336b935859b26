"""The meaning of a Databricks run's states. Pure.

Version 2.2 of the API returns ``status``, and for older clients ``state``, too:
https://docs.databricks.com/api/workspace/jobs/getrun
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mlfleet.runs import FailureKind, RunStatus

__all__ = ["LOST", "Phase", "State", "read_state"]

_WAITING = frozenset({"QUEUED", "PENDING", "BLOCKED", "WAITING", "WAITING_FOR_RETRY"})
_ENDED = frozenset({"TERMINATED", "SKIPPED", "INTERNAL_ERROR"})
_CANCELLED = frozenset({"CANCELED", "UPSTREAM_CANCELED", "USER_CANCELED"})
# Failures that the run's own code did not cause.
_INFRASTRUCTURE = frozenset(
    {
        "CLOUD_FAILURE", "CLUSTER_ERROR", "CLUSTER_REQUEST_LIMIT_EXCEEDED", "DRIVER_ERROR",
        "MAXIMUM_CONCURRENT_RUNS_REACHED", "MAX_CONCURRENT_RUNS_EXCEEDED", "MAX_JOB_QUEUE_SIZE_EXCEEDED",
        "MAX_SPARK_CONTEXTS_EXCEEDED", "REPOSITORY_CHECKOUT_FAILED", "SKIPPED", "STORAGE_ACCESS_ERROR",
        "WORKSPACE_RUN_LIMIT_EXCEEDED",
    }
)  # fmt: skip
# Failures that the next attempt would have again, and for which it would start a cluster again.
_CERTAIN = frozenset(
    {
        "BUDGET_POLICY_LIMIT_EXCEEDED", "DISABLED", "EXCLUDED", "FEATURE_DISABLED", "INVALID_CLUSTER_REQUEST",
        "INVALID_RUN_CONFIGURATION", "LIBRARY_INSTALLATION_ERROR", "RESOURCE_NOT_FOUND", "UNAUTHORIZED_ERROR",
        "UPSTREAM_FAILED",
    }
)  # fmt: skip


class Phase(StrEnum):
    """The progress of a run; LOST: Databricks does not know the run any more."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A snapshot of a run's state.

    Attributes:
        phase: The progress of the run.
        life: Databricks' own word for it, such as ``TERMINATED``.
        status: The final status; None before the end.
        reason: The reason of a bad end, in a few words; None: it has not ended, or ended well.
        cause: The kind of failure; None: the run's own code failed, or the kind is unknown.
        start_time: Milliseconds since the epoch by the workspace's clock; 0 if unknown.
        task_run_id: The id of the last attempt of the task, for runs/get-output.
        job_id: The id of the job that Databricks makes for the run.
        page_url: The URL of the run's page; empty if unknown.
    """

    phase: Phase
    life: str = "PENDING"
    status: RunStatus | None = None
    reason: str | None = None
    cause: FailureKind | None = None
    start_time: int = 0
    task_run_id: int | None = None
    job_id: int | None = None
    page_url: str = ""

    @property
    def is_terminal(self) -> bool:
        """True if the state cannot change any more."""
        return self.phase in (Phase.ENDED, Phase.LOST)


LOST = State(phase=Phase.LOST, life="GONE")


def read_state(run: Mapping[str, Any]) -> State:
    """Return the state of a run from an entry of ``runs/get`` or ``runs/list``."""
    status: Mapping[str, Any] = run.get("status") or {}
    state: Mapping[str, Any] = run.get("state") or {}
    life = str(status.get("state") or state.get("life_cycle_state") or "PENDING")
    task = _last_attempt(run.get("tasks") or [])
    phase = Phase.ENDED if life in _ENDED else Phase.WAITING if life in _WAITING else Phase.RUNNING
    ended = _ended(life, status, state, task) if phase is Phase.ENDED else (None, None, None)
    return State(
        phase=phase,
        life=life,
        status=ended[0],
        reason=ended[1],
        cause=ended[2],
        start_time=int(run.get("start_time") or 0),
        task_run_id=int(task["run_id"]) if task.get("run_id") else None,
        job_id=run.get("job_id"),
        page_url=str(run.get("run_page_url") or ""),
    )


def _last_attempt(tasks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the last attempt of a run's only task; an empty mapping if the entry shows no tasks, as in a list."""
    numbered = enumerate(tasks)
    return max(numbered, key=lambda each: (int(each[1].get("attempt_number") or 0), each[0]), default=(0, {}))[1]


def _ended(
    life: str, status: Mapping[str, Any], state: Mapping[str, Any], task: Mapping[str, Any]
) -> tuple[RunStatus, str | None, FailureKind | None]:
    details: Mapping[str, Any] = status.get("termination_details") or {}
    life = str(state.get("life_cycle_state") or life)
    code = str(details.get("code") or "")
    # Only result_state shows a time-out, so it counts first; a skipped run or an internal error may not have one.
    result = str(state.get("result_state") or code or ("" if life == "TERMINATED" else life))
    # The run only repeats that its task failed: the task's own message says why.
    task_message = str((task.get("state") or {}).get("state_message") or "")
    message = " ".join((task_message or str(details.get("message") or state.get("state_message") or "")).split())
    if result == "SUCCESS":
        return RunStatus.FINISHED, None, None
    reason = ": ".join(part for part in (code or result or life, message) if part)
    if result in _CANCELLED:
        return RunStatus.KILLED, reason, None
    return RunStatus.FAILED, reason, _cause(result, code, str(details.get("type") or ""), life)


def _cause(result: str, code: str, kind: str, life: str) -> FailureKind | None:
    if result == "TIMEDOUT":
        return FailureKind.TIMEOUT
    if {result, code} & _CERTAIN:
        return FailureKind.FAILURE
    if kind == "CLOUD_FAILURE" or {result, code} & _INFRASTRUCTURE:
        return FailureKind.INFRASTRUCTURE
    # INTERNAL_ERROR with the result FAILED is often just a user's code that failed.
    return FailureKind.INFRASTRUCTURE if "INTERNAL_ERROR" in (result, kind) or life == "SKIPPED" else None
