"""Runs by their MLflow id: the handles of `mlfleet.get` and `Fleet.get`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest

import mlfleet
from components.mlflow_server import MlflowServer
from components.projects import write_project
from fakes.scripted_server import scripted
from fakes.small_mlflow import SmallMlflow
from mlfleet import (
    FailureKind,
    Fleet,
    FleetRun,
    RunOptions,
    RunStatus,
    SubmittedRun,
    TrackedRun,
    TrackingError,
    UsageError,
    grid,
)
from mlfleet.api import close_default_fleets
from mlfleet.fleet import context_of
from mlfleet.testing import FakeTracking

LOCAL: RunOptions = {"env_manager": "local"}


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
async def fleet(tracking: FakeTracking) -> AsyncIterator[Fleet]:
    """The Fleet that submits."""
    async with Fleet(tracking=tracking, on_exit="cancel") as fleet:
        yield fleet


@pytest.fixture
async def other(tracking: FakeTracking) -> AsyncIterator[Fleet]:
    """Another Fleet, as that of another worker."""
    async with Fleet(tracking=tracking) as fleet:
        yield fleet


def patient(folder: Path) -> str:
    return write_project(folder / "demo", "seq 5; while [ ! -e ../go ]; do sleep 0.02; done; echo done")


async def tracked(fleet: Fleet, run_id: str) -> TrackedRun:
    run = await fleet.get(run_id)
    assert isinstance(run, TrackedRun)
    assert isinstance(run, SubmittedRun)
    return run


async def test_a_run_is_found_by_any_fleet_while_it_lives_and_after_its_end(
    fleet: Fleet, other: Fleet, tmp_path: Path
) -> None:
    run = await fleet.submit(patient(tmp_path), **LOCAL)
    assert await fleet.get(run.run_id) is run
    seen = await tracked(other, run.run_id)
    lines: list[str] = []
    async for line in seen.logs():
        lines.append(line)
        if line == "5":
            assert await seen.get_status() is RunStatus.RUNNING
            (tmp_path / "go").touch()
    assert lines == ["1", "2", "3", "4", "5", "done"]
    assert await seen.wait() is True
    again = await tracked(fleet, run.run_id)
    assert await again.get_status() is RunStatus.FINISHED
    await again.cancel()
    assert await again.wait() is True
    assert [line async for line in again.logs(tail=2)] == ["5", "done"]


async def test_a_run_of_another_fleet_is_cancelled(fleet: Fleet, other: Fleet, tmp_path: Path) -> None:
    run = await fleet.submit(patient(tmp_path), **LOCAL)
    await anext(run.logs())
    seen = await tracked(other, run.run_id)
    await seen.cancel(grace=0.1)
    assert seen.info.status is RunStatus.KILLED
    assert (await run.outcome()).status is RunStatus.KILLED


async def test_a_run_in_the_queue_of_another_fleet_is_cancelled(
    tracking: FakeTracking, other: Fleet, tmp_path: Path
) -> None:
    uri = patient(tmp_path)
    async with Fleet(tracking=tracking, max_concurrent=1) as fleet:
        first = await fleet.submit(uri, **LOCAL)
        waiting = await fleet.submit(uri, **LOCAL)
        await (await tracked(other, waiting.run_id)).cancel()
        assert await waiting.get_status() is RunStatus.KILLED
        assert fleet.runs == (first,)
        (tmp_path / "go").touch()
    assert [run.status for run in tracking.runs.values()] == [RunStatus.FINISHED, RunStatus.KILLED]


async def test_a_status_that_a_living_process_could_not_write_is_written_by_one_that_waits(
    tracking: FakeTracking, other: Fleet, tmp_path: Path
) -> None:
    async with Fleet(tracking=tracking, tracking_patience=0.1) as fleet:
        tracking.fail = lambda method: TrackingError("down") if method in ("update_run", "get_run") else None
        run = await fleet.submit(write_project(tmp_path / "demo", "exit 3"), **LOCAL)
        assert (await run.outcome()).tracking_error is not None
        tracking.fail = None
        seen = await tracked(other, run.run_id)
        assert await seen.get_status() is RunStatus.RUNNING  # the process may be about to write it
        context_of(other).fleet.unseen_patience = 0.1
        outcome = await seen.outcome()
        assert (outcome.status, outcome.reason, outcome.kind) == (RunStatus.FAILED, "exit code 3", FailureKind.FAILURE)


async def test_a_run_whose_code_has_set_its_status_and_goes_on_is_awaited_and_cancelled(
    fleet: Fleet, other: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    run = await fleet.submit(patient(tmp_path), **LOCAL)
    await anext(run.logs())
    await tracking.update_run(run.run_id, RunStatus.FINISHED)
    seen = await tracked(other, run.run_id)
    waiting = asyncio.create_task(seen.outcome())
    await seen.cancel(grace=0.1)
    assert fleet.runs == ()
    assert (await waiting).status is (await run.outcome()).status is RunStatus.KILLED


async def test_the_exit_code_counts_also_for_one_that_waits_elsewhere(
    fleet: Fleet, other: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    """The run's own code has set FINISHED, and its process has yet to write what the exit code says."""
    uri = write_project(tmp_path / "demo", "echo begun; while [ ! -e ../go ]; do sleep 0.02; done; exit 3")
    tracking.latency = 0.1
    run = await fleet.submit(uri, **LOCAL)
    await anext(run.logs())
    await tracking.update_run(run.run_id, RunStatus.FINISHED)
    seen = [await tracked(other, run.run_id) for _ in range(10)]
    waiting = [asyncio.create_task(each.wait()) for each in seen]
    (tmp_path / "go").touch()
    assert await asyncio.gather(*waiting) == [False] * 10


async def test_following_a_run_of_this_machine_takes_no_requests(
    fleet: Fleet, other: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    ticks = "for n in $(seq 20); do echo $n; sleep 0.05; done; while [ ! -e ../go ]; do sleep 0.02; done"
    run = await fleet.submit(write_project(tmp_path / "demo", ticks), **LOCAL)
    seen = await tracked(other, run.run_id)
    requests = []
    async for _ in seen.logs():
        requests.append(tracking.requests["get_run"])
        if len(requests) == 20:
            (tmp_path / "go").touch()
    assert requests == [requests[0]] * 20
    assert await seen.wait() is True


async def test_a_run_that_does_not_exist_is_an_error(fleet: Fleet) -> None:
    with pytest.raises(TrackingError, match="there is no run"):
        await fleet.get("0" * 32)


async def test_a_closed_fleet_gets_no_runs(tracking: FakeTracking) -> None:
    async with Fleet(tracking=tracking) as fleet:
        pass
    with pytest.raises(UsageError, match="this Fleet is not open"):
        await fleet.get("0" * 32)


async def test_a_sweep_is_cancelled_by_its_id_with_its_runs(
    fleet: Fleet, other: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", "echo {n}; sleep 600", parameters="n: string")
    async with fleet.sweep(uri, grid(n=[0, 1, 2]), max_concurrent=1, **LOCAL) as sweep:
        while not sweep.runs:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        await anext(sweep.runs[0].logs())
        seen = await tracked(other, sweep.run_id)
        assert await seen.get_status() is RunStatus.RUNNING
        await seen.cancel(grace=0.1)
        await sweep.result()
    assert {run.status for run in tracking.runs.values()} == {RunStatus.KILLED}
    assert await seen.wait() is False


WORKER = """
import asyncio, sys
import mlfleet

async def main():
    async with mlfleet.Fleet(max_concurrent=1, on_exit="cancel") as fleet:
        runs = [await fleet.submit(sys.argv[1], env_manager="local") for _ in range(3)]
        print(*[run.run_id for run in runs], flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


async def test_the_runs_of_another_process_are_found_followed_cancelled_and_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the workers of one service, which have one tracking server and one state folder."""
    async with scripted(SmallMlflow().script) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.place}")
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WORKER, patient(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert worker.stdout is not None
        try:
            first, second, third = [
                await mlfleet.get(run_id) for run_id in (await worker.stdout.readline()).decode().split()
            ]
            seen: list[tuple[int, str]] = []
            async with aclosing(first.logs(tail=1)) as lines:
                async for line in lines:
                    seen.append((line.end, line))
                    if line == "5":
                        await second.cancel()
                        assert await second.get_status() is RunStatus.KILLED
                        assert await first.get_status() is RunStatus.RUNNING
                        (tmp_path / "go").touch()
            assert seen[-2:] == [(10, "5"), (15, "done")]
            assert [await run.wait() for run in (first, second, third)] == [True, False, True]
            assert [line async for line in third.logs(start=8)] == ["5", "done"]
        finally:
            await worker.communicate(b"")  # closes its input
            await close_default_fleets()


# ---- output ---------------------------------------------------------------------------------------------------------


async def test_a_stream_of_lines_is_resumed_where_it_broke_off(fleet: Fleet, other: Fleet, tmp_path: Path) -> None:
    """As a service does with the Last-Event-ID of a client."""
    run = await fleet.submit(patient(tmp_path), **LOCAL)
    handles: list[FleetRun | TrackedRun] = [run, await tracked(other, run.run_id)]
    for handle in handles:
        async with aclosing(handle.logs()) as lines:
            seen = [await anext(lines) for _ in range(3)]
        assert seen == ["1", "2", "3"]
        assert [line async for line in handle.logs(start=seen[-1].end, follow=False)] == ["4", "5"]
        assert [line async for line in handle.logs(start=seen[-1].end, tail=1, follow=False)] == ["5"]
        assert [line async for line in handle.logs(tail=0, follow=False)] == []
    followed = asyncio.create_task(collect(handles[1], tail=1))
    (tmp_path / "go").touch()
    assert await followed == ["5", "done"]
    assert [line async for line in run.logs(start=10_000)] == []


async def test_any_number_is_a_place_in_the_output(fleet: Fleet, tmp_path: Path) -> None:
    """A service gets it from its clients. None of these fits into what the system calls the size of a file."""
    run = await fleet.submit(write_project(tmp_path / "demo", "echo 1; echo 2"), **LOCAL)
    await run.wait()
    for handle in (run, await fleet.get(run.run_id)):
        assert [line async for line in handle.logs(tail=10**30)] == ["1", "2"]
        assert [line async for line in handle.logs(start=10**18)] == []
        assert [line async for line in handle.logs(start=10**30, follow=False)] == []


async def collect(run: FleetRun | TrackedRun, *, tail: int) -> list[str]:
    return [line async for line in run.logs(tail=tail)]


@pytest.mark.parametrize(("tail", "start"), [(-1, 0), (None, -1)])
async def test_a_negative_place_is_an_error(fleet: Fleet, tmp_path: Path, tail: int | None, start: int) -> None:
    run = await fleet.submit(write_project(tmp_path / "demo", "true"), **LOCAL)
    await run.wait()
    for handle in (run, await fleet.get(run.run_id)):
        with pytest.raises(UsageError, match="is -1: give 0 or more"):
            await anext(handle.logs(tail=tail, start=start))


async def test_the_output_of_a_run_that_waits_can_be_followed(tracking: FakeTracking, tmp_path: Path) -> None:
    async with Fleet(tracking=tracking, max_concurrent=1) as fleet, Fleet(tracking=tracking) as other:
        first = await fleet.submit(patient(tmp_path), **LOCAL)
        second = await fleet.submit(first.info.tags["mlflow.source.name"], **LOCAL)
        seen = await tracked(other, second.run_id)
        assert [line async for line in seen.logs(follow=False)] == []
        followed = asyncio.create_task(collect(seen, tail=100))
        (tmp_path / "go").touch()
        assert await followed == ["1", "2", "3", "4", "5", "done"]


async def test_a_deleted_run_can_be_read_and_ended(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """Its status cannot be written any more, so that nobody must wait for that."""
    url = mlflow_server.url

    async def deleted(uri: str) -> tuple[FleetRun, TrackedRun]:
        run = await fleet.submit(uri, **LOCAL)
        assert await anext(run.logs())
        found = await tracked(other, run.run_id)
        await delete(run.run_id)
        return run, found

    async def delete(run_id: str) -> None:
        await client.post(f"{url}/api/2.0/mlflow/runs/delete", json={"run_id": run_id})

    async with (
        Fleet(tracking_uri=url, on_exit="cancel") as fleet,
        Fleet(tracking_uri=url) as other,
        httpx.AsyncClient() as client,
    ):
        run, found = await deleted(patient(tmp_path))
        reading = asyncio.create_task(collect(found, tail=100))
        waiting = asyncio.create_task(found.wait())
        (tmp_path / "go").touch()
        assert await reading == ["1", "2", "3", "4", "5", "done"]
        with pytest.raises(TrackingError, match="was deleted before its end was written: MLflow shows RUNNING"):
            await waiting
        assert await run.wait()

        run, found = await deleted(write_project(tmp_path / "endless", "echo here; exec sleep 1000"))
        await found.cancel(grace=1)
        assert not await run.wait()
        assert await found.get_status() is RunStatus.RUNNING

        context_of(other).fleet.unseen_patience = 0.1
        async with fleet.sweep(write_project(tmp_path / "sweep", "sleep 1000"), grid(n=[1]), **LOCAL) as sweep:
            found = await tracked(other, sweep.run_id)
            await delete(sweep.run_id)
            await found.cancel(grace=1)
        with pytest.raises(TrackingError, match="was deleted before its end was written: MLflow shows RUNNING"):
            await found.wait()


async def test_output_that_is_not_kept_is_an_error(fleet: Fleet, other: Fleet, tmp_path: Path) -> None:
    run = await fleet.submit(write_project(tmp_path / "demo", "true"), env_manager="local", output="inherit")
    await run.wait()
    with pytest.raises(UsageError, match=f"is not kept on this machine .*{os.sep}{run.run_id}"):
        await anext((await tracked(other, run.run_id)).logs())
