"""Sweeps that go on where an earlier one ended, was left, or was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from components.mlflow_server import MlflowServer
from components.projects import pid_is_gone, write_project
from mlfleet import Fleet, Retry, RunEvent, RunStatus, Stage, SweepResult, Timeouts, grid
from mlfleet._engine.records import RunRecord, RunRecords, tracking_key
from mlfleet.errors import UsageError
from mlfleet.runs import JobRef
from mlfleet.testing import FakeTracking

DRIVER = Path(__file__).parent.parent / "components" / "sweep_driver.py"


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
async def fleet(tracking: FakeTracking) -> AsyncIterator[Fleet]:
    async with Fleet(tracking=tracking, max_concurrent=4, timeouts=Timeouts(cancel_grace=0.5)) as fleet:
        yield fleet


def project(folder: Path, command: str) -> str:
    """A project whose runs have a folder beside it for what they write."""
    (folder / "out").mkdir()
    return write_project(folder / "demo", command, parameters="n: string")


async def all_of(fleet: Fleet, uri: str, space: Any, **options: Any) -> SweepResult:
    async with fleet.sweep(uri, space, env_manager="local", **options) as sweep:
        return await sweep.result()


async def test_finished_points_are_skipped_and_failed_ones_run_again(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = project(tmp_path, "echo {n} >> ../out/runs; test {n} -lt 3 || test -e ../out/fixed")
    first = await all_of(fleet, uri, grid(n=range(5)), name="lr")
    assert (first.status, first.counts.failed) == (RunStatus.FAILED, 2)
    (tmp_path / "out" / "fixed").touch()
    again = await all_of(fleet, uri, grid(n=range(6)), name="lr", resume=True)
    assert again.run_id == first.run_id
    assert again.status is RunStatus.FINISHED
    assert tracking.runs[again.run_id].statuses[-2:] == [RunStatus.RUNNING, RunStatus.FINISHED]
    assert [(each.earlier, each.attempts) for each in again.results] == [(True, 1)] * 3 + [(False, 2)] * 2 + [
        (False, 1)
    ]
    assert again.counts.earlier == 3
    assert sorted((tmp_path / "out" / "runs").read_text().split()) == ["0", "1", "2", "3", "3", "4", "4", "5"]
    third = await all_of(fleet, uri, grid(n=range(6)), name="lr", resume=True)
    assert {each.earlier for each in third.results} == {True}
    assert [each.attempts for each in third.results] == [1, 1, 1, 2, 2, 1]


async def test_failures_may_be_left_as_they_are(fleet: Fleet, tmp_path: Path) -> None:
    uri = project(tmp_path, "exit {n}")
    await all_of(fleet, uri, grid(n=range(2)), name="lr")
    again = await all_of(fleet, uri, grid(n=range(2)), name="lr", resume=True, retry_failed=False)
    assert [(each.status, each.earlier) for each in again.results] == [("FINISHED", True), ("FAILED", True)]
    assert [(each.reason, each.kind) for each in again.results] == [(None, None), ("exit code 1", "failure")]
    assert again.status is RunStatus.FAILED


async def test_a_point_whose_code_has_set_failed_is_a_failure_that_is_retried(
    tracking: FakeTracking, tmp_path: Path
) -> None:
    def set_failed(event: RunEvent) -> None:  # as mlflow.end_run("FAILED") in the project's code
        if event.stage is Stage.STARTED and event.run_id is not None:
            tracking.runs[event.run_id].statuses.append(RunStatus.FAILED)

    uri = project(tmp_path, "true")
    async with Fleet(tracking=tracking, on_event=set_failed) as fleet:
        retry = Retry(attempts=2, on="failure", backoff=0)
        first = await all_of(fleet, uri, grid(n=[1]), name="lr", retry=retry)
        again = await all_of(fleet, uri, grid(n=[1]), name="lr", resume=True, retry_failed=False)
    assert [(each.status, each.attempts, each.exit_code) for each in first.results] == [(RunStatus.FAILED, 2, 0)]
    assert first.status is RunStatus.FAILED
    assert [(each.status, each.earlier) for each in again.results] == [(RunStatus.FAILED, True)]


async def test_cancelled_points_run_again(fleet: Fleet, tmp_path: Path) -> None:
    uri = project(tmp_path, "test -e ../out/go || sleep 1000")
    async with fleet.sweep(uri, grid(n=range(6)), name="lr", env_manager="local") as sweep:
        while not sweep.runs:  # noqa: ASYNC110 - left as early as can be
            await anyio.sleep(0.01)
    assert sweep.stopped == "cancelled"
    (tmp_path / "out" / "go").touch()
    again = await all_of(fleet, uri, grid(n=range(6)), name="lr", resume=True, retry_failed=False)
    assert again.status is RunStatus.FINISHED
    assert again.stopped is None


async def test_equal_points_run_as_often_as_they_are_there(fleet: Fleet, tmp_path: Path) -> None:
    uri = project(tmp_path, "echo {n} >> ../out/runs")
    await all_of(fleet, uri, [{"n": 1}, {"n": 1}], name="lr")
    again = await all_of(fleet, uri, [{"n": 1}] * 3, name="lr", resume=True)
    assert [each.earlier for each in again.results] == [True, True, False]
    assert len({each.run_id for each in again.results}) == 3


async def test_points_are_recognised_in_a_grown_or_reordered_space(fleet: Fleet, tmp_path: Path) -> None:
    uri = project(tmp_path, "true")
    first = await all_of(fleet, uri, grid(n=[1, 2, 3]), name="lr")
    again = await all_of(fleet, uri, grid(n=[3, 7, 1]), name="lr", resume=True)
    assert [each.earlier for each in again.results] == [True, False, True]
    assert again.results[0].run_id == first.results[2].run_id


async def test_a_taken_name_is_an_error_that_says_how_to_go_on(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = project(tmp_path, "true")
    await all_of(fleet, uri, grid(n=[1]), name="lr")
    made = len(tracking.runs)
    with pytest.raises(UsageError, match=r"there is a sweep 'lr' already .*resume=True"):
        await all_of(fleet, uri, grid(n=[1]), name="lr")
    assert len(tracking.runs) == made
    await all_of(fleet, uri, grid(n=[1]), name="other")
    await all_of(fleet, uri, grid(n=[1]), name="lr", experiment_name="elsewhere")


async def test_resuming_an_unknown_sweep_starts_it(fleet: Fleet, tmp_path: Path) -> None:
    result = await all_of(fleet, project(tmp_path, "true"), grid(n=[1]), name="new", resume=True)
    assert result.status is RunStatus.FINISHED


async def test_a_project_that_has_changed_is_noticed(fleet: Fleet, tmp_path: Path) -> None:
    uri = project(tmp_path, "exit {n}")
    await all_of(fleet, uri, grid(n=range(2)), name="lr")
    (tmp_path / "demo" / "fix.py").write_text("pass\n")
    with pytest.raises(UsageError, match=r"the project has changed .*'lr'[\s\S]*resume='changed'[\s\S]*\.dockerignore"):
        await all_of(fleet, uri, grid(n=range(2)), name="lr", resume=True)
    again = await all_of(fleet, uri, grid(n=range(2)), name="lr", resume="changed")
    assert [(each.earlier, each.attempts) for each in again.results] == [(True, 1), (False, 2)]


async def test_two_drivers_of_one_sweep_do_not_get_in_each_others_way(fleet: Fleet, tmp_path: Path) -> None:
    uri = project(tmp_path, "sleep 1000")
    async with fleet.sweep(uri, grid(n=[1]), name="lr", env_manager="local"):
        with pytest.raises(UsageError, match="another process drives the sweep 'lr' right now"):
            await all_of(fleet, uri, grid(n=[1]), name="lr", resume=True)
        async with fleet.sweep(uri, grid(n=[1]), name="other", env_manager="local"):
            pass


async def test_a_run_that_its_driver_had_not_started_is_lost_and_runs_again(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = project(tmp_path, "true")
    first = await all_of(fleet, uri, grid(n=[0]), name="lr")
    state = Path(os.environ["MLFLEET_STATE_DIR"])
    for members in (state / "sweeps").glob("*.members"):
        members.unlink()  # so that the sweep goes by the tags
    tags = {
        name: text for name, text in tracking.runs[first.results[0].run_id or ""].tags.items() if name != JobRef.TAG
    }
    await tracking.update_run(first.results[0].run_id or "", RunStatus.FAILED)
    left = await tracking.create_run("0", name=None, tags={**tags, "mlfleet.sweep.attempt": "2"})
    dead = RunRecords()
    key = tracking_key(tracking.uri)
    await dead.add(RunRecord(run_id=left.run_id, backend="local", project="demo", tracking=key, durable=True))
    await dead.close()
    again = await all_of(fleet, uri, grid(n=[0]), name="lr", resume=True)
    assert [(each.status, each.attempts) for each in again.results] == [(RunStatus.FINISHED, 3)]
    recorded = tracking.runs[left.run_id]
    assert recorded.status is RunStatus.FAILED
    reason = "its driver ended before it was started"
    assert [recorded.tags[f"mlfleet.{name}"] for name in ("lost", "reason", "failure_kind")] == [
        reason, reason, "infrastructure",
    ]  # fmt: skip
    assert not (state / "active" / f"{left.run_id}.json").exists()


# ---- runs that somebody else has tagged -----------------------------------------------------------------------------


async def test_a_foreign_run_that_is_tagged_as_one_of_the_sweep_is_neither_awaited_nor_a_result(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = project(tmp_path, "exit {n}")
    first = await all_of(fleet, uri, grid(n=[0, 1]), name="lr")
    for result in first.results:
        assert result.run_id is not None
        tags = {**tracking.runs[result.run_id].tags, "mlfleet.ref": JobRef("local", "?").to_json()}
        for status in (RunStatus.RUNNING, RunStatus.FINISHED):
            foreign = await tracking.create_run("0", name="foreign", tags=tags)
            await tracking.update_run(foreign.run_id, status)
    again = await all_of(fleet, uri, grid(n=[0, 1]), name="lr", resume=True)
    assert [(each.status, each.earlier, each.attempts) for each in again.results] == [
        ("FINISHED", True, 1),
        ("FAILED", False, 2),
    ]
    assert again.results[0].run_id == first.results[0].run_id
    left = [run.statuses[-1] for run in tracking.runs.values() if run.name == "foreign"]
    assert left == [RunStatus.RUNNING, RunStatus.FINISHED] * 2


async def test_a_foreign_run_with_the_name_of_the_sweep_is_not_resumed(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = project(tmp_path, "true")
    first = await all_of(fleet, uri, grid(n=[0]), name="lr")
    foreign = await tracking.create_run("0", name=None, tags=tracking.runs[first.run_id].tags)
    again = await all_of(fleet, uri, grid(n=[0]), name="lr", resume=True)
    assert (again.run_id, again.counts.earlier) == (first.run_id, 1)
    assert tracking.runs[foreign.run_id].statuses == [RunStatus.RUNNING]


async def test_a_cancelled_sweep_leaves_foreign_runs_alone(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = project(tmp_path, "echo {n}; sleep 600")
    async with fleet.sweep(uri, grid(n=[0]), name="lr", env_manager="local") as sweep:
        while not sweep.runs:  # noqa: ASYNC110 - there is no event for it
            await anyio.sleep(0.01)
        (run,) = sweep.runs
        await anext(run.logs())
        tags = dict(tracking.runs[run.run_id].tags)
        foreign = await tracking.create_run("0", name=None, tags=tags)
        await (await fleet.get(sweep.run_id)).cancel(grace=0.1)
        await sweep.result()
    assert tracking.runs[run.run_id].status is RunStatus.KILLED
    assert tracking.runs[foreign.run_id].statuses == [RunStatus.RUNNING]


async def test_a_session_without_the_list_of_the_last_one_goes_by_the_tags(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine, or with a sweep of the first version."""
    uri = project(tmp_path, "true")
    here = os.environ["MLFLEET_STATE_DIR"]
    for count, state in enumerate((here, str(tmp_path / "elsewhere"), here)):
        monkeypatch.setenv("MLFLEET_STATE_DIR", state)
        result = await all_of(fleet, uri, grid(n=range(count + 1)), name="lr", resume=True)
        assert (result.counts.earlier, result.counts.finished) == (count, count + 1)


# ---- after SIGKILL --------------------------------------------------------------------------------------------------


@pytest.fixture
def killed_driver(mlflow_server: MlflowServer, tmp_path: Path) -> Iterator[tuple[str, list[int]]]:
    """A sweep of four points, two at a time, whose driver was killed while two ran; the project, and their pids."""
    uri = project(tmp_path, "echo $$ > ../out/pid-{n}; until test -e ../out/go; do sleep 0.02; done; echo through {n}")
    argv = [sys.executable, str(DRIVER), uri, mlflow_server.url, tmp_path.name, "4", "2"]
    driver = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "entered\n"
    while len(pids := [int(text) for path in (tmp_path / "out").glob("pid-*") if (text := path.read_text())]) < 2:
        if driver.poll() is not None:
            raise AssertionError(driver.stdout.read())
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert not any(pid_is_gone(pid) for pid in pids)
    yield uri, pids
    for pid in pids:
        if not pid_is_gone(pid):
            os.killpg(os.getpgid(pid), signal.SIGKILL)


@pytest.mark.timeout(120)  # the MLflow server may have to start
async def test_active_runs_are_reattached(
    killed_driver: tuple[str, list[int]], mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    uri, pids = killed_driver
    async with (
        Fleet(tracking_uri=mlflow_server.url) as fleet,
        fleet.sweep(
            uri, grid(n=range(4)), name=tmp_path.name, resume=True, max_concurrent=2, env_manager="local"
        ) as sweep,
    ):
        (tmp_path / "out" / "go").touch()
        result = await sweep.result()
        children = await fleet.tracking.search_runs(["0"], f"tags.`mlfleet.sweep.id` = '{sweep.run_id}'")
    assert result.status is RunStatus.FINISHED
    assert [(each.attempts, each.earlier) for each in result.results] == [(1, False)] * 4
    assert [child.status for child in children] == [RunStatus.FINISHED] * 4
    for each in result.results:
        assert each.run is not None
        assert [line async for line in each.run.logs()] == [f"through {each.index}"]
    assert all(pid_is_gone(pid) for pid in pids)


@pytest.mark.timeout(120)  # the MLflow server may have to start
async def test_reattached_runs_can_be_cancelled(
    killed_driver: tuple[str, list[int]], mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    uri, pids = killed_driver
    async with (
        Fleet(tracking_uri=mlflow_server.url, timeouts=Timeouts(cancel_grace=0.5)) as fleet,
        fleet.sweep(
            uri, grid(n=range(4)), name=tmp_path.name, resume=True, env_manager="local", max_concurrent=2
        ) as sweep,
    ):
        while len(sweep.runs) < 2:  # noqa: ASYNC110 - there is no event for what is taken over
            await anyio.sleep(0.01)
        await sweep.cancel()
        results = [result async for result in sweep]
    assert [result.status for result in results] == [RunStatus.KILLED] * 2
    assert all(pid_is_gone(pid) for pid in pids)


@pytest.mark.timeout(120)  # the MLflow server may have to start
@pytest.mark.parametrize("retry_failed", [True, False])
async def test_runs_that_died_with_the_driver_are_lost_and_run_again(
    killed_driver: tuple[str, list[int]], mlflow_server: MlflowServer, tmp_path: Path, retry_failed: bool
) -> None:
    uri, pids = killed_driver
    for pid in pids:
        os.killpg(os.getpgid(pid), signal.SIGKILL)
    options: dict[str, Any] = {"name": tmp_path.name, "resume": True, "retry_failed": retry_failed}
    async with (
        Fleet(tracking_uri=mlflow_server.url) as fleet,
        fleet.sweep(uri, grid(n=range(4)), env_manager="local", **options) as sweep,
    ):
        (tmp_path / "out" / "go").touch()
        result = await sweep.result()
        children = await fleet.tracking.search_runs(["0"], f"tags.`mlfleet.sweep.id` = '{sweep.run_id}'")
    assert result.status is RunStatus.FINISHED
    assert [each.attempts for each in result.results] == [2, 2, 1, 1]
    lost = [child for child in children if child.status is RunStatus.FAILED]
    assert len(lost) == 2
    assert all("its process was killed" in child.tags["mlfleet.lost"] for child in lost)


@pytest.mark.timeout(120)  # the MLflow server may have to start
async def test_runs_no_longer_in_the_space_are_awaited(
    killed_driver: tuple[str, list[int]], mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    uri, _ = killed_driver
    async with (
        Fleet(tracking_uri=mlflow_server.url) as fleet,
        fleet.sweep(uri, [{"n": 9}], name=tmp_path.name, resume=True, env_manager="local") as sweep,
    ):
        (tmp_path / "out" / "go").touch()
        result = await sweep.result()
        children = await fleet.tracking.search_runs(["0"], f"tags.`mlfleet.sweep.id` = '{sweep.run_id}'")
    assert [each.parameters for each in result.results] == [{"n": 9}]
    assert {child.params["n"]: child.status for child in children} == dict.fromkeys("019", RunStatus.FINISHED)


@pytest.mark.timeout(120)  # the MLflow server may have to start
async def test_a_run_that_was_never_started_is_not_started_by_a_driver_that_comes_too_late(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """The claim of a run: the shell that stands before a command finds that the run was given up."""
    from mlfleet.backends.base import Job
    from mlfleet.backends.local.backend import LocalBackend
    from mlfleet.errors import RunLost

    job = Job(
        run_id="a" * 32,
        experiment_id="0",
        project_name="late",
        project_dir=tmp_path,
        command="touch started",
        durable=True,
        output=tmp_path / "output.log",
    )
    async with LocalBackend() as backend:
        reference = backend.reference(job)
        assert reference is not None
        dead = JobRef(reference.backend, reference.run_id, {**reference.data, "driver_started": 1})
        with pytest.raises(RunLost, match="it was never started"):
            await backend.attach(dead)
        run = await backend.submit(job)
        assert await run.wait() is False
        with pytest.raises(RunLost, match="it was never started"):
            await backend.attach(dead)
    assert not (tmp_path / "started").exists()
