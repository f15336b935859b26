"""Runs of one Fleet that different tracking servers and stores have."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Self

import pytest

from components.projects import write_project
from components.scripts import Script
from fakes.scripted_server import scripted
from fakes.small_mlflow import SmallMlflow
from mlfleet import Fleet, FleetRun, RunStatus, TrackedRun
from mlfleet.errors import TrackingError, UsageError
from mlfleet.fleet import context_of
from mlfleet.testing import FakeTracking


class OpenedTracking(FakeTracking):
    """A `FakeTracking` that counts how often it was opened and closed, and fails to open on demand."""

    opened = 0
    closed = 0
    is_broken = False

    async def __aenter__(self) -> Self:
        if self.is_broken:
            raise TrackingError("the store cannot be opened", uri=self.uri)
        self.opened += 1
        return self

    async def __aexit__(self, *error: object) -> None:
        self.closed += 1


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return write_project(tmp_path / "demo", "echo $MLFLOW_TRACKING_URI")


async def lines(run: FleetRun) -> list[str]:
    return [line async for line in run.logs()]


async def test_an_empty_uri_is_none(tracking: FakeTracking, uri: str) -> None:
    """As that of a tenant who has no server."""
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.submit(uri, tracking_uri="", env_manager="local")
        assert await lines(run) == ["memory:"]


async def test_a_run_is_tracked_where_its_submit_says(tracking: FakeTracking, uri: str) -> None:
    other = OpenedTracking(uri="memory:other")
    async with Fleet(tracking=tracking) as fleet:
        own = await fleet.submit(uri, env_manager="local")
        runs = await asyncio.gather(
            *(fleet.submit(uri, tracking=other, experiment_name="one", env_manager="local") for _ in range(3))
        )
        assert await lines(own) == ["memory:"]
        assert [await lines(run) for run in runs] == [["memory:other"]] * 3
        assert list(tracking.runs) == [own.run_id]
        assert {run.run_id for run in runs} == {*other.runs}
        assert [run.status for run in other.runs.values()] == [RunStatus.FINISHED] * 3
        assert other.requests["experiment_id"] == 1
        assert (other.opened, other.closed) == (1, 0)
        with pytest.raises(UsageError, match="both tracking and tracking_uri are given: give one of them"):
            await fleet.submit(uri, tracking=other, tracking_uri="http://127.0.0.1:1")
    assert (other.opened, other.closed) == (1, 1)


async def test_a_tracking_that_could_not_be_opened_is_tried_again(tracking: FakeTracking, uri: str) -> None:
    other = OpenedTracking(uri="memory:other")
    other.is_broken = True
    async with Fleet(tracking=tracking) as fleet:
        submits = [fleet.submit(uri, tracking=other, env_manager="local") for _ in range(2)]
        errors = await asyncio.gather(*submits, return_exceptions=True)
        assert [str(error) for error in errors] == ["the store cannot be opened"] * 2
        other.is_broken = False
        run = await fleet.submit(uri, tracking=other, env_manager="local")
        assert await run.wait()
    assert list(other.runs) == [run.run_id]
    assert not tracking.runs


async def test_runs_elsewhere_are_found_and_ended_there(tracking: FakeTracking, tmp_path: Path, uri: str) -> None:
    endless = write_project(tmp_path / "endless", "echo ready; exec sleep 1000")
    mlflow = SmallMlflow()
    async with scripted(mlflow.script) as server, Fleet(tracking=tracking, on_exit="cancel") as fleet:
        there = f"http://{server.place}"
        ended = await fleet.submit(uri, tracking_uri=there, experiment_id="0", env_manager="local")
        assert await lines(ended) == [there]
        await fleet.join()
        found = await fleet.get(ended.run_id, tracking_uri=there)
        assert isinstance(found, TrackedRun)
        assert await found.get_status() is RunStatus.FINISHED
        active = await fleet.submit(endless, tracking_uri=there, experiment_id="0", env_manager="local")
        async for _ in active.logs():
            break
        assert await fleet.get(active.run_id) is active
        async with Fleet(tracking=tracking) as second:
            await (await second.submit(uri, tracking_uri=there, experiment_id="0", env_manager="local")).wait()
            by_record = await second.get(active.run_id)  # its record says which of the open servers has it
            assert isinstance(by_record, TrackedRun)
            assert await by_record.get_status() is RunStatus.RUNNING
        with pytest.raises(TrackingError, match="is not open: use it, or a handle of the Fleet that has it, inside"):
            await by_record.get_status()
        await context_of(fleet).fleet.write_killed()
        assert mlflow.runs[active.run_id]["info"]["status"] == "KILLED"
    assert sorted(mlflow.statuses) == ["FINISHED", "FINISHED", "KILLED"]
    assert not tracking.runs


async def test_a_detached_run_is_tracked_where_its_submit_says(tracking: FakeTracking, uri: str) -> None:
    mlflow = SmallMlflow()
    async with scripted(mlflow.script) as server, Fleet(tracking=tracking) as fleet:
        there = f"http://{server.place}"
        run = await fleet.submit(uri, tracking_uri=there, experiment_id="0", detach=True, env_manager="local")
        assert await run.wait()
        with pytest.raises(UsageError, match="give the Fleet a tracking_uri, or submit the run without detach"):
            await fleet.submit(uri, detach=True)
    assert mlflow.statuses == ["FINISHED"]


DRIVER = """
import asyncio, os, mlfleet
from mlfleet.testing import FakeTracking
async def main():
    async with mlfleet.Fleet(tracking=FakeTracking()) as fleet:
        uri = os.environ["MLFLOW_TRACKING_URI"]
        run = await fleet.submit("endless", tracking_uri=uri, experiment_id="0", env_manager="local")
        async for line in run.logs():
            print(run.run_id, flush=True)
asyncio.run(main())
"""


async def test_a_run_elsewhere_whose_driver_died_is_concluded_there(tracking: FakeTracking, tmp_path: Path) -> None:
    write_project(tmp_path / "endless", "echo ready; exec sleep 1000")
    mlflow = SmallMlflow()
    async with scripted(mlflow.script) as server:
        there = f"http://{server.place}"

        def kill() -> str:
            with Script(tmp_path, DRIVER, there) as script:
                run_id = script.line().strip()
                script.process.kill()
                return run_id

        run_id = await asyncio.to_thread(kill)
        async with Fleet(tracking=tracking) as fleet:
            assert await (await fleet.get(run_id, tracking_uri=there)).wait() is False
    assert mlflow.statuses == ["FAILED"]
