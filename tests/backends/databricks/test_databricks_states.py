"""The meaning of each state of a Databricks run; the Databricks SDK lists the states."""

from __future__ import annotations

from typing import Any

import pytest
from databricks.sdk.service import jobs

from mlfleet.backends.databricks.states import Phase, read_state
from mlfleet.runs import FailureKind, RunStatus

LIVES = [each.value for each in jobs.RunLifeCycleState]
RESULTS = [each.value for each in jobs.RunResultState]
CODES = [each.value for each in jobs.TerminationCodeCode]
ENDED = {"TERMINATED", "SKIPPED", "INTERNAL_ERROR"}
CANCELLED = {"CANCELED", "UPSTREAM_CANCELED", "USER_CANCELED"}


def expected(result: str | None) -> RunStatus:
    if result == "SUCCESS":
        return RunStatus.FINISHED
    return RunStatus.KILLED if result in CANCELLED else RunStatus.FAILED


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("result", [None, *RESULTS])
def test_every_pair_of_life_cycle_and_result_state(life: str, result: str | None) -> None:
    state = read_state({"state": {"life_cycle_state": life, "result_state": result, "state_message": "so it is"}})
    assert state.is_terminal == (life in ENDED)
    if not state.is_terminal:
        assert state.status is None
        return
    assert state.status is expected(result)
    if state.status is not RunStatus.FINISHED:
        assert "so it is" in (state.reason or "")
        assert (result or (life if life != "TERMINATED" else "so it is")) in (state.reason or "")


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("legacy", [True, False])
def test_every_termination_code(code: str, legacy: bool) -> None:
    details = {"code": code, "type": "CLIENT_ERROR", "message": "so it is"}
    run: dict[str, Any] = {"status": {"state": "TERMINATED", "termination_details": details}}
    if legacy:
        run["state"] = {"life_cycle_state": "TERMINATED", "result_state": None}
    state = read_state(run)
    assert state.phase is Phase.ENDED
    assert state.status is expected(code)
    assert state.reason == (None if code == "SUCCESS" else f"{code}: so it is")


@pytest.mark.parametrize("state", [each.value for each in jobs.RunLifecycleStateV2State])
def test_status_wins_over_the_older_state(state: str) -> None:
    seen = read_state({"status": {"state": state}, "state": {"life_cycle_state": "RUNNING"}})
    assert seen.is_terminal == (state == "TERMINATED")
    assert (seen.phase is Phase.WAITING) == (state in ("BLOCKED", "PENDING", "QUEUED", "WAITING"))


@pytest.mark.parametrize(
    ("run", "cause"),
    [
        ({"state": {"life_cycle_state": "TERMINATED", "result_state": "TIMEDOUT"}}, FailureKind.TIMEOUT),
        ({"state": {"life_cycle_state": "TERMINATED", "result_state": "FAILED"}}, None),
        ({"state": {"life_cycle_state": "INTERNAL_ERROR", "result_state": "FAILED"}}, None),
        ({"state": {"life_cycle_state": "INTERNAL_ERROR"}}, FailureKind.INFRASTRUCTURE),
        ({"state": {"life_cycle_state": "SKIPPED"}}, FailureKind.INFRASTRUCTURE),
        ({"state": {"life_cycle_state": "SKIPPED", "result_state": "EXCLUDED"}}, FailureKind.FAILURE),
        ({"state": {"life_cycle_state": "TERMINATED", "result_state": "DISABLED"}}, FailureKind.FAILURE),
        ({"state": {"life_cycle_state": "TERMINATED", "result_state": "UPSTREAM_FAILED"}}, FailureKind.FAILURE),
        (
            {"status": {"state": "TERMINATED", "termination_details": {"code": "X", "type": "CLOUD_FAILURE"}}},
            FailureKind.INFRASTRUCTURE,
        ),
    ],
)
def test_failure_kind_of_each_run(run: dict[str, Any], cause: FailureKind | None) -> None:
    assert read_state(run).cause is cause


@pytest.mark.parametrize(
    "code",
    [
        "DISABLED", "EXCLUDED", "FEATURE_DISABLED", "INVALID_CLUSTER_REQUEST", "INVALID_RUN_CONFIGURATION",
        "LIBRARY_INSTALLATION_ERROR", "RESOURCE_NOT_FOUND", "UNAUTHORIZED_ERROR", "UPSTREAM_FAILED",
    ],
)  # fmt: skip
@pytest.mark.parametrize("life", ["TERMINATED", "INTERNAL_ERROR", "SKIPPED"])
def test_failures_that_would_happen_again_are_not_of_the_infrastructure(code: str, life: str) -> None:
    details = {"code": code, "type": "INTERNAL_ERROR", "message": "so it is"}
    run = {
        "status": {"state": "TERMINATED", "termination_details": details},
        "state": {"life_cycle_state": life, "result_state": None},
    }
    assert read_state(run).cause is FailureKind.FAILURE


@pytest.mark.parametrize("run", [{}, {"state": None, "status": None}, {"state": {"life_cycle_state": "BRAND_NEW"}}])
def test_unknown_states_are_not_terminal(run: dict[str, Any]) -> None:
    assert not read_state(run).is_terminal


def test_run_and_task_ids_are_read_from_the_response() -> None:
    state = read_state({"run_id": 1, "job_id": 3, "tasks": [{"run_id": 2}], "run_page_url": "https://x"})
    assert (state.task_run_id, state.job_id, state.page_url) == (2, 3, "https://x")


@pytest.mark.parametrize("numbers", [(0, 1, 2), (2, 0, 1), (None, None, None)])
def test_the_last_attempt_of_the_task_counts(numbers: tuple[int | None, ...]) -> None:
    tasks = [
        {"run_id": 7 + index, "attempt_number": number, "state": {"state_message": f"attempt {index}"}}
        for index, number in enumerate(numbers)
    ]
    state = read_state({"tasks": tasks, "state": {"life_cycle_state": "TERMINATED", "result_state": "FAILED"}})
    last = numbers.index(2) if 2 in numbers else 2
    assert (state.task_run_id, state.reason) == (7 + last, f"FAILED: attempt {last}")
