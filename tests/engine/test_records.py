"""Records of active runs: what a process leaves on disk for the next one, if it dies or cannot reach tracking."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from components.projects import pid_is_gone, write_project
from mlfleet import Fleet, Outcome, RunEvent, RunStatus, grid
from mlfleet._engine.records import RunRecord, RunRecords, find_record, tracking_key
from mlfleet._sweeps import SPACE_TAG
from mlfleet.backends.base import BackendRun, Job
from mlfleet.backends.local.backend import LocalBackend
from mlfleet.errors import RunLost, TrackingError, UsageError
from mlfleet.runs import JobRef
from mlfleet.testing import FakeTracking


def records() -> list[str]:
    folder = Path(os.environ["MLFLEET_STATE_DIR"], "active")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


async def all_gone() -> None:
    while records():  # noqa: ASYNC110 - the background work of a Fleet has no event
        await anyio.sleep(0.01)


async def test_a_run_that_ends_leaves_no_record_and_makes_four_requests(tmp_path: Path) -> None:
    tracking = FakeTracking()
    async with Fleet(tracking=tracking) as fleet:
        uri = write_project(tmp_path / "demo", "echo {n}; sleep 600", parameters="n: string")
        run = await fleet.submit(uri, parameters={"n": 1}, env_manager="local")
        await anext(run.logs())
        assert f"{run.run_id}.json" in records()
        await run.cancel()
        while f"{run.run_id}.json" in records():  # noqa: ASYNC110 - it is removed soon
            await anyio.sleep(0.01)
    assert records() == []
    assert sum(tracking.requests.values()) <= 4 + tracking.requests["experiment_id"]


DIES_AFTER_A_CREATION = """
import asyncio, os, signal, sys
from mlfleet._engine.records import RunRecords
async def main():
    print(await RunRecords().begin(sys.argv[1], "0"), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


async def test_a_run_that_was_created_and_not_recorded_is_concluded_by_the_next_fleet() -> None:
    tracking = FakeTracking()
    program = [sys.executable, "-c", DIES_AFTER_A_CREATION, tracking_key(tracking.uri)]
    driver = await anyio.run_process(program, check=False)
    submission = driver.stdout.decode().strip()
    run = await tracking.create_run("0", name=None, tags={"mlfleet.submission": submission})
    other = await tracking.create_run("0", name=None, tags={"mlfleet.submission": "somebody-else.1"})
    async with Fleet(tracking=tracking):
        while tracking.runs[run.run_id].status is RunStatus.RUNNING:  # noqa: ASYNC110
            await anyio.sleep(0.01)
        await all_gone()  # the second search, after which the driver is forgotten
    assert tracking.runs[run.run_id].status is RunStatus.FAILED
    assert tracking.runs[run.run_id].tags["mlfleet.reason"] == "its driver died"
    assert tracking.runs[other.run_id].status is RunStatus.RUNNING
    assert tracking.requests["search_runs"] == 2


@pytest.mark.parametrize(("command", "status"), [("true", RunStatus.FINISHED), ("exit 3", RunStatus.FAILED)])
async def test_the_next_fleet_writes_a_status_that_could_not_be_written(
    tmp_path: Path, command: str, status: RunStatus
) -> None:
    tracking = FakeTracking()
    async with Fleet(tracking=tracking, tracking_patience=0.1) as fleet:
        tracking.fail = lambda method: TrackingError("down") if method in ("update_run", "get_run") else None
        run = await fleet.submit(write_project(tmp_path / "demo", command), env_manager="local")
        outcome = await run.outcome()
        assert (outcome.status, outcome.tracking_error is not None) == (status, True)
    assert tracking.runs[run.run_id].status is RunStatus.RUNNING
    tracking.fail = None
    async with Fleet(tracking=tracking):
        await all_gone()
    recorded = tracking.runs[run.run_id]
    assert recorded.status is status
    assert recorded.tags.get("mlfleet.reason") == (None if status is RunStatus.FINISHED else "exit code 3")


@pytest.mark.parametrize("durable", [False, True])
async def test_a_status_that_is_written_is_kept_and_the_record_is_removed(durable: bool) -> None:
    tracking = FakeTracking()
    made = await tracking.create_run("0", name=None, tags={})
    dead = RunRecords()
    await dead.add(record(made.run_id, tracking, durable=durable))
    await tracking.update_run(made.run_id, RunStatus.FINISHED)
    await dead.close()
    async with Fleet(tracking=tracking):
        await all_gone()
    assert tracking.runs[made.run_id].statuses == [RunStatus.RUNNING, RunStatus.FINISHED]


async def test_the_next_fleet_leaves_runs_of_other_stores_of_named_sweeps_and_of_living_drivers_alone() -> None:
    tracking = FakeTracking()
    left, foreign, durable, active = [(await tracking.create_run("0", name=None, tags={})).run_id for _ in range(4)]
    dead, living = RunRecords(), RunRecords()
    await dead.add(record(left, tracking))
    await dead.add(record(foreign, FakeTracking(uri="memory:other")))
    await dead.add(record(durable, tracking, durable=True))
    await living.add(record(active, tracking))
    await dead.close()
    async with Fleet(tracking=tracking):
        while tracking.runs[left].status is RunStatus.RUNNING:  # noqa: ASYNC110
            await anyio.sleep(0.01)
    assert tracking.runs[left].tags["mlfleet.reason"] == "its driver died"
    assert {tracking.runs[run_id].status for run_id in (foreign, durable, active)} == {RunStatus.RUNNING}
    await living.close()


def record(run_id: str, tracking: FakeTracking, *, durable: bool = False) -> RunRecord:
    return RunRecord(
        run_id=run_id, backend="local", project="demo", tracking=tracking_key(tracking.uri), durable=durable
    )


async def test_a_run_of_a_sweep_whose_driver_died_leaves_no_record_when_it_is_cancelled(tmp_path: Path) -> None:
    tracking = FakeTracking()
    async with LocalBackend() as backend, Fleet(tracking=tracking) as fleet:
        run = await left_by_its_driver(backend, tracking, tmp_path, "echo ready; sleep 600")
        await anext(run.logs())
        await (await fleet.get(run.run_id)).cancel(grace=1)
        assert await run.wait() is False
    assert tracking.runs[run.run_id].status is RunStatus.KILLED
    assert records() == []


async def test_a_run_whose_status_is_written_here_does_not_become_a_run_of_the_fleet(tmp_path: Path) -> None:
    tracking = FakeTracking()
    events: list[RunEvent] = []
    async with LocalBackend() as backend, Fleet(tracking=tracking, on_event=events.append) as fleet:
        run = await left_by_its_driver(backend, tracking, tmp_path, "exit 3")
        await run.wait()
        found = await fleet.get(run.run_id)
        assert await found.wait() is False
    assert (found.info.status, found.info.tags["mlfleet.reason"]) == (RunStatus.FAILED, "exit code 3")
    assert events == []
    assert records() == []


async def left_by_its_driver(backend: LocalBackend, tracking: FakeTracking, folder: Path, command: str) -> BackendRun:
    """Start a run of a named sweep, and leave the record of a driver that died."""
    made = await tracking.create_run("0", name=None, tags={})
    job = Job(
        run_id=made.run_id,
        experiment_id="0",
        project_name="demo",
        project_dir=folder,
        command=command,
        durable=True,
        output=folder / "output.log",
    )
    reference = backend.reference(job)
    assert reference is not None
    await tracking.log(made.run_id, tags={JobRef.TAG: reference.to_json()})
    dead = RunRecords()
    await dead.add(record(made.run_id, tracking, durable=True))
    await dead.close()
    return await backend.submit(job)


async def test_a_run_that_was_lost_is_lost_for_the_next_process_too() -> None:
    tracking = FakeTracking()
    made = await tracking.create_run("0", name=None, tags={})
    dead = RunRecords()
    await dead.add(record(made.run_id, tracking, durable=True))
    dead.end(made.run_id, Outcome(RunStatus.FAILED, reason="it was never started", error=RunLost("it")))
    await dead.close()
    async with Fleet(tracking=tracking) as fleet:
        outcome = await (await fleet.attach(made.run_id)).outcome()
    assert (outcome.status, str(outcome.error)) == (RunStatus.FAILED, "it was never started")
    assert isinstance(outcome.error, RunLost)


async def test_a_sweep_without_a_name_is_concluded_when_its_driver_has_died() -> None:
    tracking = FakeTracking()
    made = await tracking.create_run("0", name=None, tags={SPACE_TAG: "{}"})
    dead = RunRecords()
    await dead.add(record(made.run_id, tracking))
    await dead.close()
    async with Fleet(tracking=tracking) as fleet:
        found = await fleet.get(made.run_id)
        assert await found.wait() is False
    assert (found.info.status, found.info.tags["mlfleet.reason"]) == (RunStatus.FAILED, "its driver died")


async def test_the_end_of_a_sweep_that_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    tracking = FakeTracking()
    async with Fleet(tracking=tracking, tracking_patience=0.1) as fleet:
        uri = write_project(tmp_path / "demo", "true", parameters="n: string")
        async with fleet.sweep(uri, grid(n=[1]), env_manager="local") as sweep:
            assert f"{sweep.run_id}.json" in records()
            tracking.fail = lambda method: TrackingError("down") if method in ("update_run", "get_run") else None
            await sweep.result()
    assert f"{sweep.run_id}.json" in records()
    tracking.fail = None
    async with Fleet(tracking=tracking) as fleet:
        found = await fleet.get(sweep.run_id)
        assert await found.wait() is True
    assert tracking.runs[sweep.run_id].status is RunStatus.FINISHED


FORKING = """
import asyncio, os, time
from mlfleet._engine.records import RunRecord, RunRecords
records = RunRecords()
asyncio.run(records.add(RunRecord(run_id="1" * 32, backend="local", project="demo", tracking="")))
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
os.wait3(0)
"""


def test_a_forked_child_does_not_keep_its_parents_records_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        child = int(driver.stdout.readline())
        found = find_record("1" * 32)
        assert found is not None
        assert found.driver_lives() is True
        driver.kill()
        driver.wait()
        assert not pid_is_gone(child)
        assert found.driver_lives() is False
        os.kill(child, signal.SIGKILL)


async def test_a_state_folder_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLEET_STATE_DIR", str(tmp_path / "file"))
    async with Fleet(tracking=FakeTracking()) as fleet:
        for _ in range(2):
            run = await fleet.submit(write_project(tmp_path / "demo", "true"), env_manager="local", output="inherit")
            assert await run.wait() is True
    assert [message.partition(":")[0] for message in caplog.messages] == [
        f"runs are not recorded in {tmp_path}/file/active, so nobody can conclude them if this process dies"
    ]


async def test_a_run_whose_backend_cannot_find_its_processes_is_not_said_to_have_none() -> None:
    tracking = FakeTracking()
    async with Fleet(tracking=tracking) as fleet:
        info = await tracking.create_run("0", name=None, tags={})
        records, key = RunRecords(), tracking_key(tracking.uri)
        await records.add(RunRecord(run_id=info.run_id, backend="databricks", project="demo", tracking=key))
        with pytest.raises(UsageError, match="cannot be attached to: it has no tag"):
            await (await fleet.get(info.run_id)).cancel()
        await records.close()
    assert tracking.runs[info.run_id].status is RunStatus.RUNNING
