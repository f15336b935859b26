"""Sweeps on this machine: what the caller, MLflow and the machine see of them."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import mlfleet
from components.projects import pid_is_gone, write_project
from mlfleet import (
    FailureKind,
    Fleet,
    PointResult,
    Resources,
    Retry,
    RunEvent,
    RunStatus,
    Stage,
    SweepResult,
    Timeouts,
    grid,
)
from mlfleet.errors import ExecutionException, MlfleetError, TrackingError, UsageError
from mlfleet.testing import FakeTracking


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
async def fleet(tracking: FakeTracking) -> AsyncIterator[Fleet]:
    async with Fleet(tracking=tracking, max_concurrent=8, timeouts=Timeouts(cancel_grace=0.5)) as fleet:
        yield fleet


def project(folder: Path, command: str, parameters: str = "n: string") -> str:
    return write_project(folder / "demo", command, parameters=parameters)


async def all_of(fleet: Fleet, uri: str, space: Any, **options: Any) -> SweepResult:
    async with fleet.sweep(uri, space, env_manager="local", **options) as sweep:
        return await sweep.result()


async def started(events: AsyncIterator[RunEvent], count: int) -> None:
    """Returns when so many runs have started."""
    async for event in events:
        count -= event.stage is Stage.STARTED
        if count == 0:
            return


async def test_every_point_gives_a_result_and_failed_ones_are_results(fleet: Fleet, tmp_path: Path) -> None:
    uri = project(tmp_path, "echo {n}; test {n} != 3 || exit 4", "n: string\nfixed: string")
    points = [{"n": n} for n in range(6)]
    results: list[PointResult] = []
    async with fleet.sweep(uri, points, parameters={"fixed": "x"}, env_manager="local") as sweep:
        async for result in sweep:
            results.append(result)
            assert result.point is points[result.index]
            assert result.parameters == {"fixed": "x", **points[result.index]}
    assert sorted(result.index for result in results) == list(range(6))
    failed = [result for result in results if result.status is not RunStatus.FINISHED]
    assert [(each.index, each.status, each.exit_code) for each in failed] == [(3, RunStatus.FAILED, 4)]
    assert (failed[0].reason, failed[0].kind, failed[0].attempts) == ("exit code 4", FailureKind.FAILURE, 1)
    assert failed[0].run is not None
    assert [line async for line in failed[0].run.logs()] == ["3"]
    counts = sweep.counts
    assert (counts.total, counts.finished, counts.failed, counts.running) == (6, 5, 1, 0)


async def test_in_mlflow_a_sweep_is_a_run_with_children(fleet: Fleet, tracking: FakeTracking, tmp_path: Path) -> None:
    uri = project(tmp_path, "test {n} = 1")
    async with fleet.sweep(
        uri, grid(n=[1, 2]), name="lr", env_manager="local", experiment_name="e", tags={"team": "x"}
    ) as sweep:
        async for _ in sweep:
            assert tracking.runs[sweep.run_id].status is RunStatus.RUNNING
        parent = tracking.runs[sweep.run_id]
        assert parent.status is RunStatus.FAILED  # before the block is left
    children = [run for run in tracking.runs.values() if run is not parent]
    assert parent.name == "lr"
    assert parent.tags["mlfleet.sweep.name"] == "lr"
    assert json.loads(parent.tags["mlfleet.sweep.space"]) == {"grid": {"n": [1, 2]}}
    assert json.loads(parent.tags["mlfleet.sweep.counts"]) == {"finished": 1, "failed": 1, "killed": 0}
    assert "mlflow.parentRunId" not in parent.tags
    assert sorted(run.name for run in children) == ["lr-0", "lr-1"]
    assert len({run.tags["mlfleet.sweep.point"] for run in children}) == 2
    for run in children:
        assert run.tags["mlflow.parentRunId"] == run.tags["mlfleet.sweep.id"] == parent.run_id
        assert run.tags["team"] == parent.tags["team"] == "x"
        assert run.experiment_id == parent.experiment_id == tracking.experiments["e"]
        assert run.params == {"n": str(int(run.tags["mlfleet.sweep.index"]) + 1)}
        assert run.status.is_terminal


async def test_runs_are_made_only_when_they_can_start_and_points_pulled_only_then(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = project(tmp_path, "read line < gate")
    os.mkfifo(tmp_path / "demo" / "gate")
    pulled = 0

    def endless() -> Iterator[dict[str, int]]:
        nonlocal pulled
        while True:
            yield {"n": (pulled := pulled + 1)}

    events = fleet.events()
    async with fleet.sweep(uri, endless(), max_concurrent=3, env_manager="local") as sweep:
        await started(events, 3)
        assert len(tracking.runs) == 4  # and the parent
        assert pulled == 3
        assert sweep.counts.total is None
        assert sweep.counts.running == len(sweep.runs) == 3
    assert sorted(run.status for run in tracking.runs.values()) == [RunStatus.KILLED] * 4


async def test_leaving_early_leaves_nothing_running(fleet: Fleet, tracking: FakeTracking, tmp_path: Path) -> None:
    uri = project(tmp_path, "echo $$ >> pids; test {n} = 0 || sleep 1000")
    async with fleet.sweep(uri, grid(n=range(100)), max_concurrent=4, env_manager="local") as sweep:
        async for result in sweep:
            assert result.index == 0
            break
    assert all(pid_is_gone(int(pid)) for pid in (tmp_path / "demo" / "pids").read_text().split())
    statuses = [run.status for run in tracking.runs.values()]
    assert statuses[0] is RunStatus.KILLED
    assert statuses.count(RunStatus.FINISHED) == 1
    assert {*statuses} == {RunStatus.KILLED, RunStatus.FINISHED}
    assert len(statuses) < 10


@pytest.mark.parametrize("how", ["error", "cancelled"])
async def test_leaving_by_an_error_or_a_cancellation_cancels_too(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path, how: str
) -> None:
    uri = project(tmp_path, "echo $$ >> pids; test {n} = 0 || sleep 1000")

    async def work() -> None:
        async with fleet.sweep(uri, grid(n=range(9)), max_concurrent=4, env_manager="local") as sweep:
            async for _ in sweep:
                if how == "error":
                    raise ZeroDivisionError
                task.cancel()

    task = asyncio.ensure_future(work())
    with pytest.raises(ZeroDivisionError if how == "error" else asyncio.CancelledError):
        await task
    assert all(pid_is_gone(int(pid)) for pid in (tmp_path / "demo" / "pids").read_text().split())
    assert next(iter(tracking.runs.values())).status is RunStatus.KILLED
    assert all(run.status.is_terminal for run in tracking.runs.values())


async def test_cancel_gives_the_results_of_the_cancelled(fleet: Fleet, tracking: FakeTracking, tmp_path: Path) -> None:
    uri = project(tmp_path, "trap '' TERM; echo ready; while :; do sleep 1; done")
    events = fleet.events()
    async with fleet.sweep(uri, grid(n=range(50)), max_concurrent=3, env_manager="local") as sweep:
        await started(events, 3)
        for run in sweep.runs:
            async for _ in run.logs():
                break
        await asyncio.gather(sweep.cancel(), sweep.cancel(grace=0))
        assert tracking.runs[sweep.run_id].status is RunStatus.KILLED
        results = [result async for result in sweep]
    assert [result.status for result in results] == [RunStatus.KILLED] * 3
    assert (await sweep.result(results)).stopped == "cancelled"


async def test_on_failure_stop_ends_the_sweep_at_the_first_failure(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = project(tmp_path, "test {n} != 0 || exit 3; sleep 1000")
    result = await all_of(fleet, uri, grid(n=range(50)), max_concurrent=3, on_failure="stop")
    assert result.status is RunStatus.FAILED
    assert result.stopped == "1 of at most 1 points failed; the last one: exit code 3"
    assert {each.status for each in result.results} == {RunStatus.FAILED, RunStatus.KILLED}
    assert len(result.results) <= 4
    assert tracking.runs[result.run_id].tags["mlfleet.sweep.stopped"] == result.stopped
    with pytest.raises(ExecutionException, match=r"is FAILED[\s\S]*stopped: 1 of at most 1[\s\S]*point 0"):
        result.check()


async def test_max_failures_lets_some_fail(fleet: Fleet, tmp_path: Path) -> None:
    uri = project(tmp_path, "exit {n}")
    result = await all_of(
        fleet, uri, [{"n": n % 2} for n in range(20)], max_concurrent=1, max_failures=3, give_up_after=None
    )
    assert [each.status == "FAILED" for each in result.results] == [False, True] * 3


async def test_a_sweep_whose_first_runs_fail_gives_up_and_says_why(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = project(tmp_path, "echo 'no module named torch' >&2; exit 1")
    result = await all_of(fleet, uri, grid(n=range(1000)), give_up_after=5, max_concurrent=1)
    assert result.stopped == "the first 5 runs all failed before they got going; the last one: exit code 1"
    assert len(result.results) == 5
    assert result.status is RunStatus.FAILED
    result = await all_of(fleet, uri, grid(n=range(20)), give_up_after=None)
    assert len(result.results) == 20
    assert result.stopped is None


async def test_one_good_run_is_enough_to_go_on(fleet: Fleet, tmp_path: Path) -> None:
    uri = project(tmp_path, "test {n} = 1")
    result = await all_of(fleet, uri, grid(n=range(20)), give_up_after=3, max_concurrent=1)
    assert (result.counts.finished, result.counts.failed) == (1, 19)


async def test_failures_are_tried_again_with_the_same_parameters(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    # The first two attempts at each point fail: a file counts them.
    uri = project(tmp_path, "echo >> attempts-{n}; test $(wc -l < attempts-{n}) -gt 2")
    events = fleet.events()
    result = await all_of(fleet, uri, grid(n=range(3)), retry=Retry(attempts=3, backoff=0.01), name="again")
    assert result.status is RunStatus.FINISHED
    assert [each.attempts for each in result.results] == [3, 3, 3]
    assert result.counts.retries == 6
    children = [run for run in tracking.runs.values() if run.tags.get("mlfleet.sweep.index") == "1"]
    assert [run.tags["mlfleet.sweep.attempt"] for run in children] == ["1", "2", "3"]
    assert [run.tags.get("mlfleet.sweep.retry_reason") for run in children] == [None, "exit code 1", "exit code 1"]
    assert [run.status for run in children] == [RunStatus.FAILED, RunStatus.FAILED, RunStatus.FINISHED]
    assert [run.params for run in children] == [{"n": "1"}] * 3
    assert {run.tags["mlfleet.sweep.point"] for run in children} == {children[0].tags["mlfleet.sweep.point"]}
    seen: list[RunEvent] = []
    async for event in events:
        seen.append(event)
        if sum(event.stage is Stage.FINISHED for event in seen) == 9:
            break
    retried = [event for event in seen if event.stage is Stage.RETRIED and event.index == 1]
    assert [(event.attempt, event.detail) for event in retried] == [(1, "exit code 1"), (2, "exit code 1")]
    assert {event.sweep_id for event in seen if event.run_id} == {result.run_id}


KINDS = [
    ("exit 1", {}, FailureKind.FAILURE),
    ("kill -KILL $$", {}, FailureKind.OOM),
    ("bash -c 'kill -KILL $$'; exit $?", {}, FailureKind.OOM),
    ("sleep 1000", {"timeout": 0.2}, FailureKind.TIMEOUT),
]


@pytest.mark.parametrize(
    ("command", "options", "kind"), KINDS, ids=[f"{kind}-{n}" for n, (*_, kind) in enumerate(KINDS)]
)
async def test_only_the_chosen_kinds_of_failure_are_tried_again(
    fleet: Fleet, tmp_path: Path, command: str, options: dict[str, Any], kind: FailureKind
) -> None:
    uri = project(tmp_path, command)
    others = set(FailureKind) - {kind}
    result = await all_of(fleet, uri, [{"n": 0}], retry=Retry(attempts=2, on=others, backoff=0), **options)
    assert [(each.kind, each.attempts) for each in result.results] == [(kind, 1)]
    result = await all_of(fleet, uri, [{"n": 0}], retry=Retry(attempts=2, on={kind.value}, backoff=0), **options)
    assert [(each.kind, each.attempts) for each in result.results] == [(kind, 2)]


async def test_an_environment_that_cannot_be_built_is_infrastructure(fleet: Fleet, tmp_path: Path) -> None:
    package = tmp_path / "demo" / "broken"
    package.mkdir(parents=True)
    (package / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\nbuild-backend = 'broken'\nbackend-path = ['.']\n"
    )
    (package / "broken.py").write_text("raise SystemExit('this package cannot be built')\n")
    uri = write_project(tmp_path / "demo", "true", extra="python_env: python_env.yaml\n")
    (tmp_path / "demo" / "python_env.yaml").write_text("dependencies:\n  - ./broken\n")
    async with fleet.sweep(uri, [{}, {}], give_up_after=2) as sweep:
        results = [result async for result in sweep]
    assert [result.kind for result in results] == [FailureKind.INFRASTRUCTURE] * 2
    assert sweep.stopped is not None
    assert "the first 2 runs all failed" in sweep.stopped


async def test_a_tracking_server_that_falls_away_is_tried_again(tmp_path: Path) -> None:
    down = 2

    def fail(method: str) -> Exception | None:
        nonlocal down
        if method == "create_run" and fake.requests["create_run"] > 1 and down:
            down -= 1
            return TrackingError("connection refused")
        return None

    fake = FakeTracking(fail=fail)
    async with Fleet(tracking=fake) as fleet:
        uri = project(tmp_path, "true")
        result = await all_of(fleet, uri, [{"n": 1}], retry=Retry(attempts=3, on={"infrastructure"}, backoff=0))
    assert [(each.status, each.attempts) for each in result.results] == [(RunStatus.FINISHED, 3)]


async def test_a_point_with_wrong_parameters_fails_alone_and_only_once(fleet: Fleet, tmp_path: Path) -> None:
    uri = project(tmp_path, "true", "n: float")
    result = await all_of(fleet, uri, [{"n": 1}, {"n": "many"}, {"n": 2}], retry=Retry(attempts=3, backoff=0))
    assert [each.status for each in result.results] == ["FINISHED", "FAILED", "FINISHED"]
    assert "many" in str(result.results[1].reason)
    assert (result.results[1].run_id, result.results[1].attempts) == (None, 1)


MISTAKES: list[tuple[object, dict[str, Any], str]] = [
    ([{"n": 1}], {"entry_point": "mian"}, "main"),
    ([{}], {}, "n"),
    ([], {}, "the space of the sweep has no points"),
    ("abc", {}, "the space of the sweep is 'abc'"),
    ({"n": [1]}, {}, r"the space of the sweep is \{"),
    ([5], {}, "point 0 of the space is 5"),
    ([{"n": 1}], {"max_concurrent": 0}, "max_concurrent is 0"),
    ([{"n": 1}], {"on_failure": "explode"}, "on_failure is 'explode'"),
    ([{"n": 1}], {"resume": True}, "resume needs the name"),
    ([{"n": 1}], {"name": "it's"}, "the sweep's name"),
    ([{"n": 1}], {"run_id": "a"}, "run_id cannot be given"),
    ([{"n": 1}], {"timeout": 1, "timeouts": Timeouts()}, "both timeout and timeouts"),
    ([{"n": 1}], {"resources": Resources(cpus=10**6)}, "can never start on this machine"),
    ([{"n": 1}], {"resources": Resources(gpus=64)}, "64 GPUs are requested"),
    ([{"n": 1}], {"backend": "slurn"}, "slurn"),
    ([{"n": 1}], {"name": "\udcff"}, "the sweep's name is"),
]


@pytest.mark.parametrize(("space", "options", "message"), MISTAKES, ids=[message for *_, message in MISTAKES])
async def test_a_mistake_is_found_before_anything_exists(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path, space: Any, options: dict[str, Any], message: str
) -> None:
    uri = project(tmp_path, "echo {n}")
    with pytest.raises(MlfleetError, match=message):
        await all_of(fleet, uri, space, **options)
    assert tracking.requests == {}


async def test_a_state_folder_that_cannot_be_written_is_named(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").touch()  # a file in the place of the folder
    monkeypatch.setenv("MLFLEET_STATE_DIR", str(tmp_path / "state"))
    uri = project(tmp_path, "echo {n}")
    with pytest.raises(
        UsageError, match=r"sweep 'lr' cannot be written in .*state/sweeps: Not a dir.* MLFLEET_STATE_DIR"
    ):
        await all_of(fleet, uri, grid(n=[1]), name="lr")
    assert tracking.runs == {}
    monkeypatch.setenv("MLFLEET_STATE_DIR", str(tmp_path / "other"))
    (tmp_path / "other" / "sweeps").mkdir(parents=True)
    (tmp_path / "other" / "runs").touch()
    (failed,) = (await all_of(fleet, uri, grid(n=[1]), name="lr", retry=Retry(attempts=1))).results
    assert failed.reason is not None
    assert re.fullmatch(rf"the folder of the run, {tmp_path}/other/runs/\w+, cannot be made: Not a .*", failed.reason)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attempts": 0}, "attempts is 0"),
        ({"on": ["oops"]}, "'oops'.*infrastructure"),
        ({"backoff": -1}, "backoff is -1"),
        ({"max_backoff": "1"}, "max_backoff is '1'"),
    ],
)
def test_a_wrong_retry_is_reported(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Retry(**arguments)


async def test_an_error_in_a_space_ends_the_sweep_and_is_reported(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = project(tmp_path, "sleep 1000")

    def broken() -> Iterator[dict[str, int]]:
        yield {"n": 1}
        raise LookupError("no more ideas")

    with pytest.raises(LookupError, match="no more ideas"):
        await all_of(fleet, uri, broken())
    parent, child = tracking.runs.values()
    assert (parent.status, child.status) == (RunStatus.FAILED, RunStatus.KILLED)
    assert parent.tags["mlfleet.sweep.stopped"] == "LookupError: no more ideas"


async def test_an_asynchronous_space_sees_every_result_before_it_decides(fleet: Fleet, tmp_path: Path) -> None:
    uri = project(tmp_path, "exit {n}")
    known: dict[int, RunStatus] = {}
    seen_at: list[int] = []

    async def search() -> AsyncIterator[dict[str, int]]:
        for n in range(6):
            seen_at.append(len(known))
            yield {"n": n % 2}

    async with fleet.sweep(uri, search(), max_concurrent=1, env_manager="local") as sweep:
        async for result in sweep:
            await anyio.sleep(0.01)  # a consumer with something to do
            known[result.index] = result.status
    assert seen_at == [0, 1, 2, 3, 4, 5]


async def test_pause_resume_and_resize(fleet: Fleet, tracking: FakeTracking, tmp_path: Path) -> None:
    uri = project(tmp_path, "mkdir -p here/{n}; ls here | wc -l > most-{n}; sleep 0.05; rmdir here/{n}")
    async with fleet.sweep(uri, grid(n=range(30)), max_concurrent=1, env_manager="local") as sweep:
        results = [await anext(sweep)]
        sweep.pause()
        with anyio.move_on_after(1):  # one more may have been under way, but not all of them
            while True:
                results.append(await anext(sweep))
        assert len(results) == sweep.counts.ended <= 2
        assert sweep.counts.running == 0
        sweep.resize(4)
        sweep.resume()
        results += [result async for result in sweep]
    assert len(results) == 30
    most = [int((tmp_path / "demo" / f"most-{n}").read_text()) for n in range(30)]
    assert most[0] == 1
    assert 2 <= max(most) <= 4
    with pytest.raises(UsageError, match="give 1 or more"):
        sweep.resize(0)


async def test_unread_results_pause_the_sweep_to_bound_memory(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = project(tmp_path, "true", "n: float")
    bad = ({"n": "no number"} if n else {"n": 0} for n in range(100_000))
    async with fleet.sweep(uri, bad, max_concurrent=4, give_up_after=None, env_manager="local") as sweep:
        before = -1
        while sweep.counts.ended > before:
            before = sweep.counts.ended
            await anyio.sleep(0.3)
        assert before < 1000


async def test_runs_wait_for_resources_and_see_only_their_own_gpus(
    tracking: FakeTracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-b")
    uri = project(tmp_path, "mkdir gpu-$CUDA_VISIBLE_DEVICES; sleep 0.02; rmdir gpu-$CUDA_VISIBLE_DEVICES; "
                            "echo $CUDA_VISIBLE_DEVICES")  # fmt: skip
    async with Fleet(tracking=tracking, resources=Resources(cpus=16, gpus=2)) as fleet:
        result = await all_of(fleet, uri, grid(n=range(12)), resources=Resources(cpus=1, gpus=1))
        assert result.status is RunStatus.FINISHED  # or mkdir would have failed
        seen = {line for each in result.results if each.run async for line in each.run.logs()}
        assert seen == {"3", "GPU-b"}
        uri = project(tmp_path, 'echo "<$CUDA_VISIBLE_DEVICES>"')
        none = await all_of(fleet, uri, [{"n": 0}], resources=Resources())
        assert none.results[0].run is not None
        assert [line async for line in none.results[0].run.logs()] == ["<>"]


async def test_the_best_by_a_metric(fleet: Fleet, tracking: FakeTracking, tmp_path: Path) -> None:
    class Scoring(FakeTracking):
        """As if the project's code logged the metric ``loss``."""

        async def log(self, run_id: str, **what: Any) -> None:
            await super().log(run_id, **what)
            if "n" in (params := what.get("params") or {}):
                self.runs[run_id].metrics["loss"] = abs(float(params["n"]) - 3)

    uri = project(tmp_path, "test {n} != 3")
    async with Fleet(tracking=Scoring()) as scored:
        result = await all_of(scored, uri, grid(n=range(6)))
    assert result.best("loss").index == 2  # 3 would be better, and failed
    assert result.best("loss", "max").index == 0
    with pytest.raises(UsageError, match="'accuracy'; the metrics are: loss"):
        result.best("accuracy")
    rows = result.rows()
    assert rows[5]["params.n"] == 5
    assert rows[5]["metrics.loss"] == 2.0
    assert rows[3]["status"] == "FAILED"
    pandas = pytest.importorskip("pandas")
    assert isinstance(result.to_pandas(), pandas.DataFrame)


def test_the_blocking_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    uri = project(tmp_path, "test {n} -lt 2")
    result = mlfleet.sweep(uri, grid(n=range(3)), env_manager="local", name="blocking")
    assert [each.status for each in result.results] == ["FINISHED", "FINISHED", "FAILED"]
    again = mlfleet.sweep(uri, grid(n=range(4)), env_manager="local", name="blocking", resume=True)
    assert again.run_id == result.run_id
    assert [(each.earlier, each.attempts) for each in again.results] == [(True, 1), (True, 1), (False, 2), (False, 1)]


async def test_a_reader_of_events_needs_room_for_one(fleet: Fleet) -> None:
    with pytest.raises(UsageError, match="buffer is 0: give 1 or more"):
        fleet.events(buffer=0)


async def test_several_readers_of_events_and_one_that_sleeps(fleet: Fleet, tmp_path: Path) -> None:
    uri = project(tmp_path, "true")
    early, lazy = fleet.events(), fleet.events(buffer=5)
    await all_of(fleet, uri, grid(n=range(10)))
    late = fleet.events()
    await all_of(fleet, uri, grid(n=[10]))

    async def read(events: AsyncIterator[RunEvent], last: int) -> list[RunEvent]:
        seen: list[RunEvent] = []
        async for event in events:
            seen.append(event)
            if event.stage is Stage.FINISHED and sum(each.stage is Stage.FINISHED for each in seen) == last:
                break
        return seen

    everything = await read(early, 11)
    stages = [event.stage for event in everything if event.index == 10 or (event.index == 0 and event.sweep_id)]
    assert stages[-1] is Stage.FINISHED
    assert {event.stage for event in everything} >= {
        Stage.FETCHING, Stage.QUEUED, Stage.PREPARING, Stage.STARTING, Stage.STARTED, Stage.FINISHED
    }  # fmt: skip
    assert [event.time for event in everything] == sorted(event.time for event in everything)
    assert not any(event.lost for event in everything)
    assert [event.stage for event in await read(late, 1)][-1] is Stage.FINISHED
    few = await read(lazy, 1)
    assert len(few) == 5
    assert few[0].lost == len(everything) - 5
    assert [event.lost for event in few[1:]] == [0] * 4


async def test_a_fleet_that_is_left_ends_the_sweep_of_another_task_before_it_closes_tracking(tmp_path: Path) -> None:
    tracking = FakeTracking()
    uri = write_project(tmp_path / "demo", "sleep 600", parameters="x: float")

    async def go_through(fleet: Fleet) -> list[RunStatus]:
        async with fleet.sweep(uri, grid(x=[1, 2]), env_manager="local") as sweep:
            return [result.status async for result in sweep]

    fleet = Fleet(tracking=tracking)
    with anyio.CancelScope() as scope:
        async with fleet:
            events = fleet.events()
            other = asyncio.create_task(go_through(fleet))
            for _ in range(2):
                await anext(event async for event in events if event.stage is Stage.STARTED)
            scope.cancel()
            await anyio.sleep_forever()
    assert [run.status for run in tracking.runs.values()] == [RunStatus.KILLED] * 3
    assert await other == [RunStatus.KILLED] * 2
