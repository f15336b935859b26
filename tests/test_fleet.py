"""One run and many through a Fleet: what its caller, MLflow and the machine see of it."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import AsyncIterator, Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import anyio
import pytest

import mlfleet
from components.event_loops import on_each_loop
from components.projects import pid_is_gone, write_project
from mlfleet import Fleet, FleetRun, RunEvent, RunStatus, Stage, Timeouts, grid
from mlfleet.errors import (
    ExecutionException,
    MlfleetError,
    ParameterError,
    RunCancelled,
    RunTimeout,
    TrackingError,
    UsageError,
)
from mlfleet.testing import FakeTracking
from mlfleet.tracking import RestTracking, open_tracking


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
async def fleet(tracking: FakeTracking) -> AsyncIterator[Fleet]:
    async with Fleet(tracking=tracking, max_concurrent=64, timeouts=Timeouts(cancel_grace=0.5)) as fleet:
        yield fleet


async def first_line(run: FleetRun) -> str:
    """The first line that the run prints; it runs when this returns."""
    async for line in run.logs():
        return line
    raise AssertionError("the run ended without a line of output")


async def test_a_run_gets_its_parameters_and_its_outcome_is_tracked(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = write_project(
        tmp_path / "demo",
        "echo alpha={alpha} l1={l1} run=$MLFLOW_RUN_ID uri=$MLFLOW_TRACKING_URI",
        parameters="alpha: float\nl1: {type: float, default: 0.25}",
    )
    run = await fleet.submit(
        uri, parameters={"alpha": 0.5, "note": "a b"}, run_name="first", tags={"team": "x"}, env_manager="local"
    )
    assert await run.wait() is True
    assert await run.get_status() is RunStatus.FINISHED
    assert [line async for line in run.logs()] == [f"alpha=0.5 l1=0.25 run={run.run_id} uri=memory: --note a b"]
    recorded = tracking.runs[run.run_id]
    assert recorded.params == {"alpha": "0.5", "l1": "0.25", "note": "a b"}
    assert recorded.status is RunStatus.FINISHED
    assert recorded.end_time is not None
    assert recorded.name == "first"
    expected = {
        "mlflow.source.name": uri,
        "mlflow.source.type": "PROJECT",
        "mlflow.project.entryPoint": "main",
        "mlflow.project.backend": "local",
        "team": "x",
    }
    assert expected.items() <= recorded.tags.items()
    assert "mlflow.project.env" not in recorded.tags, "the caller's own environment was not made for the run"


async def test_a_run_costs_three_requests_and_a_status_read(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", "echo {alpha}", parameters="alpha: float")
    runs = [
        await fleet.submit(uri, parameters={"alpha": n}, experiment_name="one", env_manager="local") for n in range(10)
    ]
    for run in runs:
        assert await run.wait()
    assert tracking.requests == {"experiment_id": 1, "create_run": 10, "log": 10, "get_run": 10, "update_run": 10}


async def test_a_failed_run_reports_its_exit_code_and_last_lines(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", "echo loading; echo 'no such column: price' >&2; exit 3")
    run = await fleet.submit(uri, env_manager="local")
    assert await run.wait() is False
    with pytest.raises(ExecutionException, match="failed: exit code 3") as caught:
        await run.check()
    assert caught.value.exit_code == 3
    assert caught.value.run_id == run.run_id
    assert caught.value.output == ("loading", "no such column: price")
    assert "no such column: price" in str(caught.value)
    assert str(run.output_path) in str(caught.value)
    assert tracking.runs[run.run_id].statuses[-1] is RunStatus.FAILED


async def test_any_number_of_tasks_may_wait_and_a_cancelled_one_does_not_matter(fleet: Fleet, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo ready; read line < gate")
    os.mkfifo(tmp_path / "demo" / "gate")
    run = await fleet.submit(uri, env_manager="local")
    await first_line(run)
    waiters = [asyncio.ensure_future(run.wait()) for _ in range(20)]
    await anyio.lowlevel.checkpoint()
    waiters[0].cancel()
    assert await run.get_status() is RunStatus.RUNNING
    await anyio.to_thread.run_sync((tmp_path / "demo" / "gate").write_text, "go\n")
    assert await asyncio.gather(*waiters[1:]) == [True] * 19


async def test_cancel_ends_a_process_that_ignores_it_and_its_children(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", "trap '' TERM\nsleep 1000 &\necho $$ $!\nwait; wait")
    run = await fleet.submit(uri, env_manager="local")
    pids = [int(pid) for pid in (await first_line(run)).split()]
    await asyncio.gather(run.cancel(), run.cancel())
    assert [pid_is_gone(pid) for pid in pids] == [True, True]
    assert await run.wait() is False
    assert tracking.runs[run.run_id].status is RunStatus.KILLED
    await run.cancel()
    with pytest.raises(RunCancelled):
        await run.check()


@pytest.mark.parametrize("grace", [math.nan, -1, math.inf, "5"])
async def test_a_wrong_grace_is_an_error_and_cancels_nothing(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path, grace: Any
) -> None:
    uri = write_project(tmp_path / "demo", "sleep 1000")
    run = await fleet.submit(uri, env_manager="local")
    async with (
        Fleet(tracking=tracking) as other,
        fleet.sweep(uri, grid(x=[1]), env_manager="local") as sweep,
    ):
        for handle in (run, await other.get(run.run_id), sweep):
            with pytest.raises(UsageError, match=f"^grace is {grace!r}: give seconds, 0 or more, or None$"):
                await handle.cancel(grace=grace)
        assert not (await run.get_status()).is_terminal
        assert not sweep.status.is_terminal
        await sweep.cancel(grace=0)
    await run.cancel(grace=0)


@pytest.mark.parametrize(
    ("take", "error"),
    [
        (lambda: Timeouts(run=math.nan), "Timeouts: run is nan: give seconds, 0 or more, or None"),
        (lambda: Timeouts(queue="5"), "Timeouts: queue is '5': give"),  # type: ignore[arg-type]
        (lambda: Timeouts(cancel_grace=10**400), "Timeouts: cancel_grace is 1000"),
        (lambda: Timeouts(cancel_grace=math.inf), "Timeouts: cancel_grace is inf: give seconds, 0 or more$"),
        (lambda: Fleet(tracking_patience=math.nan), "tracking_patience is nan"),
        (lambda: setattr(Fleet(tracking=FakeTracking()), "tracking_patience", -1), "tracking_patience is -1"),
        (lambda: open_tracking("http://127.0.0.1", retry_for=math.nan), "retry_for is nan"),
        (lambda: open_tracking("sqlite:///x.db", retry_for=-1), "retry_for is -1"),
        (lambda: RestTracking("http://127.0.0.1", timeout=math.nan), "timeout is nan"),
    ],
)
def test_wrong_seconds_are_an_error_where_they_are_given(take: Callable[[], object], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        take()


async def test_seconds_may_be_any_real_number(tracking: FakeTracking, tmp_path: Path) -> None:
    timeouts = Timeouts(run=Fraction(1, 10), cancel_grace=Fraction(0))  # type: ignore[arg-type] # as numpy's numbers are
    async with Fleet(tracking=tracking, timeouts=timeouts) as fleet:
        run = await fleet.submit(write_project(tmp_path / "demo", "sleep 1000"), env_manager="local")
        assert (await run.outcome()).reason == "the run timeout of 0.1 s ran out"


async def test_cancel_after_the_end_changes_nothing(fleet: Fleet, tracking: FakeTracking, tmp_path: Path) -> None:
    run = await fleet.submit(write_project(tmp_path / "demo", "true"), env_manager="local")
    await run.wait()
    await run.cancel()
    assert await run.get_status() is RunStatus.FINISHED
    assert tracking.runs[run.run_id].statuses == [RunStatus.RUNNING, RunStatus.FINISHED]


async def test_cancel_in_the_queue_never_starts_the_command(tracking: FakeTracking, tmp_path: Path) -> None:
    blocker = write_project(tmp_path / "blocker", "echo ready; sleep 1000")
    waiting = write_project(tmp_path / "waiting", "touch started")
    async with Fleet(tracking=tracking, max_concurrent=1) as fleet:
        first = await fleet.submit(blocker, env_manager="local")
        await first_line(first)
        second = await fleet.submit(waiting, env_manager="local")
        assert await second.get_status() is RunStatus.SCHEDULED
        await second.cancel()
        assert tracking.runs[second.run_id].status is RunStatus.KILLED
        await first.cancel()
    assert not (tmp_path / "waiting" / "started").exists()


async def test_leaving_the_fleet_waits_for_its_runs(tracking: FakeTracking, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "sleep 0.2; touch {name}", parameters="name: string")
    async with Fleet(tracking=tracking, max_concurrent=2) as fleet:
        for name in "abcde":
            await fleet.submit(uri, parameters={"name": name}, env_manager="local")
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["MLproject", *"abcde"]
    assert {run.status for run in tracking.runs.values()} == {RunStatus.FINISHED}


async def test_leaving_a_fleet_for_services_cancels_its_runs(tracking: FakeTracking, tmp_path: Path) -> None:
    async with Fleet(tracking=tracking, on_exit="cancel") as fleet:
        run = await fleet.submit(write_project(tmp_path / "demo", "echo $$; sleep 600"), env_manager="local")
        pid = int(await first_line(run))
    assert pid_is_gone(pid)
    assert tracking.runs[run.run_id].status is RunStatus.KILLED


def test_an_unknown_way_to_leave_a_fleet_is_a_mistake() -> None:
    with pytest.raises(UsageError, match=r"^on_exit is 'stop': give 'wait' or 'cancel'$"):
        Fleet(on_exit="stop")  # type: ignore[arg-type]


async def test_leaving_the_fleet_by_an_error_cancels_its_runs(tracking: FakeTracking, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo $$; sleep 1000")
    pids: list[int] = []

    async def work() -> None:
        async with Fleet(tracking=tracking) as fleet:
            pids.append(int(await first_line(await fleet.submit(uri, env_manager="local"))))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()
    assert pid_is_gone(pids[0])
    assert [run.status for run in tracking.runs.values()] == [RunStatus.KILLED]


async def test_a_cancelled_fleet_cancels_its_runs(tracking: FakeTracking, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo $$; sleep 1000")
    pids: list[int] = []

    async def work() -> None:
        async with Fleet(tracking=tracking) as fleet:
            pids.append(int(await first_line(await fleet.submit(uri, env_manager="local"))))
            running.set()

    running = anyio.Event()
    task = asyncio.ensure_future(work())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pid_is_gone(pids[0])
    assert [run.status for run in tracking.runs.values()] == [RunStatus.KILLED]


async def test_a_cancelled_submit_starts_nothing(tmp_path: Path) -> None:
    reached = anyio.Event()

    class SlowTracking(FakeTracking):
        async def _request(self, method: str) -> None:
            if method == "create_run":
                reached.set()
                await anyio.sleep_forever()
            await super()._request(method)

    tracking = SlowTracking()
    uri = write_project(tmp_path / "demo", "touch started")
    async with Fleet(tracking=tracking) as fleet:
        task = asyncio.ensure_future(fleet.submit(uri, env_manager="local"))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert fleet.runs == ()
    assert tracking.runs == {}
    assert not (tmp_path / "demo" / "started").exists()


async def test_no_more_runs_at_once_than_allowed(tracking: FakeTracking, tmp_path: Path) -> None:
    # Each run lists who is there with it; a directory is made and removed atomically.
    uri = write_project(
        tmp_path / "demo", "mkdir here/$MLFLOW_RUN_ID; ls here | wc -l; sleep 0.05; rmdir here/$MLFLOW_RUN_ID"
    )
    (tmp_path / "demo" / "here").mkdir()
    async with Fleet(tracking=tracking, max_concurrent=3) as fleet:
        runs = [await fleet.submit(uri, env_manager="local") for _ in range(12)]
    counts = [int(await first_line(run)) for run in runs]
    assert max(counts) <= 3


@pytest.mark.parametrize("stage", ["queue", "run"])
async def test_a_timeout_ends_its_stage_and_says_which(tracking: FakeTracking, tmp_path: Path, stage: str) -> None:
    uri = write_project(tmp_path / "demo", "echo $$; sleep 1000")
    timeouts = Timeouts(**{stage: 0.3})
    async with Fleet(tracking=tracking, max_concurrent=1) as fleet:
        first = await fleet.submit(uri, timeouts=timeouts if stage == "run" else None, env_manager="local")
        pid = int(await first_line(first))
        run = first if stage == "run" else await fleet.submit(uri, timeouts=timeouts, env_manager="local")
        with pytest.raises(RunTimeout, match=f"the {stage} timeout of 0.3 s ran out") as caught:
            await run.check()
        assert (caught.value.stage, caught.value.seconds) == (stage, 0.3)
        assert tracking.runs[run.run_id].status is RunStatus.FAILED
        await first.cancel()
    assert pid_is_gone(pid)


@pytest.mark.slow
async def test_the_setup_timeout_ends_a_build(tracking: FakeTracking, tmp_path: Path) -> None:
    # A package whose build never ends.
    package = tmp_path / "demo" / "slow"
    package.mkdir(parents=True)
    (package / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\nbuild-backend = 'slow'\nbackend-path = ['.']\n"
    )
    (package / "slow.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)\n"
    )
    uri = write_project(tmp_path / "demo", "true", extra="python_env: python_env.yaml\n")
    (tmp_path / "demo" / "python_env.yaml").write_text("dependencies:\n  - ./slow\n")
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.submit(uri, timeouts=Timeouts(setup=8))
        with pytest.raises(RunTimeout, match="the setup timeout of 8 s ran out"):
            await run.check()
    pid = tmp_path / "pid"
    assert not pid.exists() or pid_is_gone(int(pid.read_text()))


MISTAKES: list[tuple[dict[str, object], str]] = [
    ({"entry_point": "mian"}, "main"),
    ({"parameters": {}}, "alpha"),
    ({"parameters": {"alpha": "high"}}, "alpha"),
    ({"backend": "slurn"}, "slurn"),
    ({"env_manager": "poetry"}, "poetry"),
    ({"env_manager": "conda"}, "conda"),
    ({"version": "main"}, "Git"),
    ({"backend_config": {"queue": "x"}}, "queue"),
    ({"backend_config": "missing.json"}, "missing.json"),
    ({"backend_config": 5}, "backend_config"),
    ({"experiment_name": "a", "experiment_id": "1"}, "experiment"),
    ({"parameters": ["alpha"]}, "parameters"),
    # What an argument of a program becomes that is not UTF-8, and what no database takes.
    ({"run_name": "\udcff"}, r"run_name is '\\udcff': give a text without NUL"),
    ({"experiment_name": "a\0"}, "experiment_name is"),
    ({"parent_run_id": "\udcff"}, "parent_run_id is"),
    ({"storage_dir": "a\0"}, "storage_dir is"),
    ({"tags": {"a": "\udcff"}}, "the tag 'a' is"),
    ({"tags": {"a\0": "b"}}, "the name of a tag is"),
    ({"entry_point": "\udcff"}, "there is no entry point"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[str(mistake[0]) for mistake in MISTAKES])
async def test_a_mistake_is_found_before_anything_exists(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    uri = write_project(tmp_path / "demo", "echo {alpha}", parameters="alpha: float")
    with pytest.raises(MlfleetError, match=message):
        await fleet.submit(uri, **{"parameters": {"alpha": 1}, "env_manager": "local", **arguments})  # type: ignore[arg-type]
    assert tracking.requests == {}


async def test_the_callers_mappings_are_not_changed(fleet: Fleet, tmp_path: Path) -> None:
    parameters, config, tags = {"alpha": 0.5}, dict[str, object](), {"a": "b"}
    uri = write_project(tmp_path / "demo", "echo {alpha}", parameters="alpha: float")
    run = await fleet.submit(uri, parameters=parameters, backend_config=config, tags=tags, env_manager="local")
    await run.wait()
    assert (parameters, config, tags) == ({"alpha": 0.5}, {}, {"a": "b"})


async def test_tracking_that_does_not_answer_at_the_end_does_not_hide_how_the_run_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = FakeTracking(fail=lambda method: TrackingError("gone away") if method == "update_run" else None)
    uri = write_project(tmp_path / "demo", "exit {code}", parameters="code: float")
    async with Fleet(tracking=tracking, tracking_patience=0.2) as fleet:
        good = await fleet.submit(uri, parameters={"code": 0}, env_manager="local")
        bad = await fleet.submit(uri, parameters={"code": 4}, env_manager="local")
        assert await good.wait() is True
        with pytest.raises(ExecutionException, match=r"exit code 4[\s\S]*gone away"):
            await bad.check()
    assert f"the run {good.run_id} is FINISHED" in caplog.text


async def test_a_run_is_not_started_without_tracking(tmp_path: Path) -> None:
    tracking = FakeTracking(fail=lambda method: TrackingError("connection refused"))
    async with Fleet(tracking=tracking) as fleet:
        with pytest.raises(TrackingError, match="connection refused"):
            await fleet.submit(write_project(tmp_path / "demo", "touch started"), env_manager="local")
    assert not (tmp_path / "demo" / "started").exists()


@pytest.mark.parametrize(
    ("code", "tracked", "status", "reason"),
    [
        (0, RunStatus.FAILED, RunStatus.FAILED, "its code set the status FAILED in MLflow and ended with exit code 0"),
        (0, RunStatus.KILLED, RunStatus.KILLED, "cancelled by another process"),
        (3, RunStatus.FINISHED, RunStatus.FAILED, "exit code 3"),
        (3, RunStatus.FAILED, RunStatus.FAILED, "exit code 3"),
        (0, RunStatus.FINISHED, RunStatus.FINISHED, None),
    ],
)
async def test_the_worse_of_exit_code_and_tracked_status_counts(
    tracking: FakeTracking, tmp_path: Path, code: int, tracked: RunStatus, status: RunStatus, reason: str | None
) -> None:
    uri = write_project(tmp_path / "demo", f"echo ready; read line < gate; exit {code}")
    os.mkfifo(tmp_path / "demo" / "gate")
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.submit(uri, env_manager="local")
        await first_line(run)
        await tracking.update_run(run.run_id, tracked)  # as mlflow.end_run(tracked) in the project's code
        await anyio.to_thread.run_sync((tmp_path / "demo" / "gate").write_text, "go\n")
        outcome = await run.outcome()
    assert (outcome.status, outcome.reason, outcome.exit_code) == (status, reason, code)
    assert await run.get_status() is status
    assert tracking.runs[run.run_id].status is status
    assert tracking.runs[run.run_id].statuses[1:] == list(dict.fromkeys([tracked, status])), "nothing written twice"


async def test_a_run_that_is_cancelled_after_its_code_has_finished_it_is_killed(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    run = await fleet.submit(write_project(tmp_path / "demo", "echo ready; sleep 1000"), env_manager="local")
    await first_line(run)
    await tracking.update_run(run.run_id, RunStatus.FINISHED)
    await run.cancel()
    assert await run.get_status() is RunStatus.KILLED
    assert tracking.runs[run.run_id].status is RunStatus.KILLED


@pytest.mark.parametrize(
    ("command", "tags"),
    [
        ("exit 3", {"mlfleet.reason": "exit code 3", "mlfleet.failure_kind": "failure"}),
        (
            "kill -9 $$",
            {
                "mlfleet.reason": "killed by signal SIGKILL (the machine may have run out of memory)",
                "mlfleet.failure_kind": "oom",
            },
        ),
        ("sleep 60", {"mlfleet.reason": "the run timeout of 0.2 s ran out", "mlfleet.failure_kind": "timeout"}),
        ("true", {}),
    ],
)
async def test_why_a_run_failed_is_told_by_its_tags_before_its_status(
    tracking: FakeTracking, tmp_path: Path, command: str, tags: dict[str, str]
) -> None:
    at_the_end = {}

    def look(method: str) -> None:
        if method == "update_run":
            [recorded] = tracking.runs.values()
            at_the_end.update(recorded.tags)

    tracking.fail = look
    timeouts = Timeouts(run=0.2 if "sleep" in command else None, cancel_grace=0)
    async with Fleet(tracking=tracking, timeouts=timeouts) as fleet:
        await (await fleet.submit(write_project(tmp_path / "demo", command), env_manager="local")).wait()
    assert tags.items() <= at_the_end.items()
    assert ("mlfleet.reason" in at_the_end, "mlfleet.failure_kind" in at_the_end) == (bool(tags), bool(tags))
    assert tracking.requests == {"create_run": 1, "get_run": 1, "update_run": 1, **({"log": 1} if tags else {})}


async def test_a_failure_that_the_code_in_the_run_wrote_first_gets_its_reason(
    tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", "echo ready; read line < gate; exit 4")
    os.mkfifo(tmp_path / "demo" / "gate")
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.submit(uri, env_manager="local")
        await first_line(run)
        await tracking.update_run(run.run_id, RunStatus.FAILED)  # as mlflow.start_run() does on an exception
        await anyio.to_thread.run_sync((tmp_path / "demo" / "gate").write_text, "go\n")
        assert await run.wait() is False
    assert tracking.runs[run.run_id].tags["mlfleet.reason"] == "exit code 4"


async def test_a_cancelled_run_has_no_reason(fleet: Fleet, tracking: FakeTracking, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo $$; exec sleep 60")
    here, elsewhere = [await fleet.submit(uri, env_manager="local") for _ in range(2)]
    pid = int(await first_line(elsewhere))
    await here.cancel()
    await tracking.update_run(elsewhere.run_id, RunStatus.KILLED)  # as `mlfleet cancel` does before it ends the command
    os.kill(pid, signal.SIGTERM)
    assert (await elsewhere.outcome()).status is RunStatus.KILLED
    for run in (here, elsewhere):
        assert not {"mlfleet.reason", "mlfleet.failure_kind"} & tracking.runs[run.run_id].tags.keys()


async def test_the_status_is_written_though_the_tags_of_a_failure_cannot_be(
    tracking: FakeTracking, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracking.fail = lambda method: TrackingError("no tags today") if method == "log" else None
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.submit(write_project(tmp_path / "demo", "exit 3"), env_manager="local")
        assert (await run.outcome()).tracking_error is None
    assert tracking.runs[run.run_id].status is RunStatus.FAILED
    assert "mlfleet.reason, mlfleet.failure_kind of the run" in caplog.text
    assert "no tags today" in caplog.text


async def test_a_run_used_again_loses_the_reason_of_its_earlier_failure(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", "exit {code}", parameters="code: int")
    first = await fleet.submit(uri, parameters={"code": 3}, env_manager="local")
    await first.wait()
    tracking.runs[first.run_id].params.clear()
    again = await fleet.submit(uri, parameters={"code": 0}, run_id=first.run_id, env_manager="local")
    assert await again.wait()
    tags = tracking.runs[first.run_id].tags
    assert (tags["mlfleet.reason"], tags["mlfleet.failure_kind"]) == ("", "")


async def test_an_existing_run_is_used_again(tracking: FakeTracking, tmp_path: Path) -> None:
    existing = await tracking.create_run("0", name="mine", tags={})
    await tracking.update_run(existing.run_id, RunStatus.FAILED)
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.submit(write_project(tmp_path / "demo", "true"), run_id=existing.run_id, env_manager="local")
        assert await run.wait()
    assert run.run_id == existing.run_id
    assert list(tracking.runs) == [existing.run_id]
    assert tracking.runs[run.run_id].statuses[1:] == [RunStatus.FAILED, RunStatus.RUNNING, RunStatus.FINISHED]
    assert tracking.runs[run.run_id].tags["mlflow.source.type"] == "PROJECT"


async def test_events_report_the_stages_in_order(tracking: FakeTracking, tmp_path: Path) -> None:
    events: list[RunEvent] = []
    async with Fleet(tracking=tracking, on_event=events.append) as fleet:
        run = await fleet.submit(write_project(tmp_path / "demo", "true"), env_manager="local")
    assert [event.stage for event in events] == [
        Stage.FETCHING,
        Stage.QUEUED,
        Stage.PREPARING,
        Stage.STARTING,
        Stage.STARTED,
        Stage.FINISHED,
    ]
    assert events[-1].run_id == run.run_id
    assert events[-1].status is RunStatus.FINISHED


async def test_what_an_async_callback_does_is_awaited_in_the_order_of_the_events(
    tracking: FakeTracking, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log: list[tuple[str, Stage]] = []

    async def react(event: RunEvent) -> None:
        log.append(("begin", event.stage))
        await anyio.sleep(0.01)
        log.append(("end", event.stage))
        if event.stage is Stage.QUEUED:
            raise ValueError("a fault of the callback")

    async with Fleet(tracking=tracking, on_event=react) as fleet:
        await fleet.submit(write_project(tmp_path / "demo", "true"), env_manager="local")
    stages = [Stage.FETCHING, Stage.QUEUED, Stage.PREPARING, Stage.STARTING, Stage.STARTED, Stage.FINISHED]
    assert log == [(word, stage) for stage in stages for word in ("begin", "end")]
    assert [record.message.partition(" for ")[0] for record in caplog.records] == ["on_event failed"]


def test_the_end_of_the_loop_ends_what_an_async_callback_does(tmp_path: Path) -> None:
    ended: list[Stage] = []

    async def react(event: RunEvent) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(event.stage)

    async def main() -> None:
        async with Fleet(tracking=FakeTracking(), on_event=react) as fleet:
            await (await fleet.submit(write_project(tmp_path / "demo", "true"), env_manager="local")).wait()
            ready.set()

    async def wait() -> None:
        tasks.append(asyncio.create_task(main()))
        await ready.wait()

    ready = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []
    asyncio.run(wait())
    assert ended == [Stage.FETCHING]
    assert tasks[0].cancelled()


async def test_the_output_can_be_logged_as_an_artifact(tracking: FakeTracking, tmp_path: Path) -> None:
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.submit(
            write_project(tmp_path / "demo", "echo hello; exit 1"), log_output=True, env_manager="local"
        )
        await run.wait()
    assert tracking.runs[run.run_id].artifacts == {"output.log": b"hello\n"}


async def test_a_fleet_that_is_not_open_says_so(tracking: FakeTracking, tmp_path: Path) -> None:
    fleet = Fleet(tracking=tracking)
    uri = write_project(tmp_path / "demo", "true")
    with pytest.raises(UsageError, match="async with"):
        await fleet.submit(uri, env_manager="local")
    async with fleet:
        pass
    with pytest.raises(UsageError, match="async with"):
        await fleet.submit(uri, env_manager="local")
    with pytest.raises(UsageError, match="used once"):
        await fleet.__aenter__()


async def test_hundreds_of_runs_each_get_their_own_parameters(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", "echo {n}", parameters="n: string")
    runs = await asyncio.gather(*(fleet.submit(uri, parameters={"n": n}, env_manager="local") for n in range(200)))
    assert await asyncio.gather(*(run.wait() for run in runs)) == [True] * 200
    assert [[line async for line in run.logs()] for run in runs] == [[str(n)] for n in range(200)]
    assert {run.status for run in tracking.runs.values()} == {RunStatus.FINISHED}


async def test_run_async_raises_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(ParameterError, match="alpha"):
        await mlfleet.run_async(
            write_project(tmp_path / "one", "echo {alpha}", parameters="alpha: float"), env_manager="local"
        )
    with pytest.raises(ExecutionException, match="exit code 9") as caught:
        await mlfleet.run_async(write_project(tmp_path / "two", "echo bye; exit 9"), env_manager="local")
    assert caught.value.output == ("bye",)
    run = await mlfleet.run_async(write_project(tmp_path / "three", "true"), env_manager="local")
    assert await run.get_status() is RunStatus.FINISHED


def test_a_loop_that_ends_in_the_middle_leaves_nothing_running(tmp_path: Path) -> None:
    """``asyncio.run`` cancels all tasks at its end, also those of runs whose first step is still to come."""
    pids = tmp_path / "pids"
    pids.mkdir()
    uri = write_project(tmp_path / "demo", f"touch {pids}/$$; sleep 1000")
    tracking = FakeTracking()

    async def main() -> None:
        await mlfleet.Fleet(tracking=tracking).__aenter__()  # never left: as if its owner had forgotten it
        fleet = await Fleet(tracking=tracking, max_concurrent=4).__aenter__()
        await first_line(
            await fleet.submit(write_project(tmp_path / "one", "echo ready; sleep 1000"), env_manager="local")
        )
        tasks.extend(asyncio.ensure_future(fleet.submit(uri, env_manager="local")) for _ in range(30))
        for _ in range(25):
            await anyio.lowlevel.checkpoint()

    tasks: list[asyncio.Future[FleetRun]] = []
    asyncio.run(main())
    assert [pid.name for pid in pids.iterdir() if not pid_is_gone(int(pid.name))] == []
    assert {run.status for run in tracking.runs.values()} == {RunStatus.KILLED}


@on_each_loop
async def test_runs_end_and_are_cancelled_on_every_event_loop(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo $$; exec sleep {seconds}", parameters="seconds: float")
    async with Fleet(tracking=FakeTracking()) as fleet:
        short, long, longer = [
            await fleet.submit(uri, parameters={"seconds": seconds}, env_manager="local") for seconds in (0, 600, 601)
        ]
        pids = [int(await anext(run.logs())) for run in (long, longer)]
        assert await short.wait()
        await long.cancel()
        await longer.cancel(grace=0)
        for run, pid in zip((long, longer), pids, strict=True):
            outcome = await run.outcome()
            assert (outcome.status, outcome.reason, outcome.error) == (RunStatus.KILLED, "cancelled", None)
            assert pid_is_gone(pid)
        events = fleet.events()
        async with fleet.sweep(uri, grid(seconds=[602]), env_manager="local") as sweep:
            async for event in events:
                if event.stage is Stage.STARTED:
                    break
            await sweep.cancel(grace=0)
            assert [result.status async for result in sweep] == [RunStatus.KILLED]


async def test_the_status_is_known_at_the_end_of_the_logs(tmp_path: Path) -> None:
    async with Fleet(tracking=FakeTracking(latency=0.1)) as fleet:
        run = await fleet.submit(write_project(tmp_path / "demo", "echo said; exit 3"), env_manager="local")
        assert [line async for line in run.logs()] == ["said"]
        assert await run.get_status() is RunStatus.FAILED
