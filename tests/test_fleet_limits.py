"""The limits of a Fleet: its queue, the groups of runs, and what is counted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from components.projects import write_project
from mlfleet import Fleet, FleetCounts, FleetFull, FleetRun, RunEvent, RunStatus, Stage, grid
from mlfleet.errors import UsageError
from mlfleet.testing import FakeTracking


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A project whose runs go on until they are cancelled."""
    return write_project(tmp_path / "demo", "echo ready; exec sleep 1000")


async def begin(fleet: Fleet, uri: str, group: str | None = None) -> FleetRun:
    """Submit a run and return when its command runs."""
    run = await fleet.submit(uri, group=group, env_manager="local")
    async for _ in run.logs():
        return run
    raise AssertionError("the run ended without a line of output")


async def test_a_full_queue_refuses_a_run_before_anything_exists(tracking: FakeTracking, uri: str) -> None:
    events: list[RunEvent] = []
    async with Fleet(
        tracking=tracking, max_concurrent=1, max_queued=1, on_exit="cancel", on_event=events.append
    ) as fleet:
        first = await begin(fleet, uri)
        second = await fleet.submit(uri, env_manager="local")
        assert fleet.counts == FleetCounts(queued=1, running=1)
        fetched = [event.stage for event in events].count(Stage.FETCHING)
        with pytest.raises(FleetFull, match="the queue of the Fleet has 1 of at most 1 runs: submit") as caught:
            await fleet.submit(uri, env_manager="local")
        assert (caught.value.queued, caught.value.limit) == (1, 1)
        assert list(tracking.runs) == [first.run_id, second.run_id]
        assert [event.stage for event in events].count(Stage.FETCHING) == fetched, "nor was its project looked at"
        await second.cancel()
        assert fleet.counts == FleetCounts(running=1)
        await fleet.submit(uri, env_manager="local")
    assert fleet.counts == FleetCounts()


async def test_a_submit_may_wait_for_room_in_the_queue(tracking: FakeTracking, uri: str) -> None:
    async with Fleet(tracking=tracking, max_concurrent=1, max_queued=0, on_exit="cancel") as fleet:
        first = await begin(fleet, uri)  # the queue has no room at all, and it can start at once
        waiting = [
            asyncio.create_task(fleet.submit(uri, run_name=f"run {n}", wait=True, env_manager="local"))
            for n in range(3)
        ]
        _, pending = await asyncio.wait(waiting, timeout=0.3)
        assert len(pending) == 3
        assert len(tracking.runs) == 1
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        with pytest.raises(FleetFull):
            await fleet.submit(uri, env_manager="local")
        await first.cancel()
        second = await waiting[1]
        await second.cancel()
        third = await waiting[2]
        assert [run.name for run in tracking.runs.values()] == ["run-1", "run 1", "run 2"]
        assert fleet.runs == (third,)


async def test_a_submit_that_waits_for_room_ends_with_the_fleet(tracking: FakeTracking, uri: str) -> None:
    async with Fleet(tracking=tracking, max_concurrent=1, max_queued=0, on_exit="cancel") as fleet:
        await begin(fleet, uri)
        waiting = asyncio.create_task(fleet.submit(uri, wait=True, env_manager="local"))
        await asyncio.wait([waiting], timeout=0.3)
    with pytest.raises(UsageError, match="the Fleet was closed before there was room in its queue"):
        await waiting
    assert [run.status for run in tracking.runs.values()] == [RunStatus.KILLED]


async def test_a_run_that_ends_makes_room_whatever_ended_it(tmp_path: Path, uri: str) -> None:
    errors = [OSError("the store is broken")]
    tracking = FakeTracking(fail=lambda method: errors.pop() if errors and method == "create_run" else None)
    async with Fleet(tracking=tracking, max_concurrent=1, max_queued=0, on_exit="cancel") as fleet:
        with pytest.raises(OSError, match="broken"):
            await fleet.submit(uri, env_manager="local")
        run = await fleet.submit(uri, env_manager="local")
        await run.cancel()
        broken = await fleet.submit(write_project(tmp_path / "broken", "exit 3"), env_manager="local")
        assert await broken.wait() is False
        cancelled = asyncio.create_task(fleet.submit(uri, env_manager="local"))
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert fleet.counts == FleetCounts()
        await begin(fleet, uri)


@pytest.mark.parametrize("limit", [1, {"red": 1, "blue": 1}])
async def test_a_group_has_no_more_runs_past_the_queue_than_its_limit(
    tracking: FakeTracking, uri: str, limit: int | dict[str, int]
) -> None:
    async with Fleet(tracking=tracking, max_concurrent=8, group_limit=limit, on_exit="cancel") as fleet:
        first = await begin(fleet, uri, "red")
        second = await fleet.submit(uri, group="red", env_manager="local")
        await begin(fleet, uri, "blue")
        for _ in range(2):
            await begin(fleet, uri)  # runs without a group have no limit
        red, blue = FleetCounts(queued=1, running=1), FleetCounts(running=1)
        assert fleet.counts == FleetCounts(queued=1, running=4, groups={"red": red, "blue": blue})
        await first.cancel()
        async for _ in second.logs():
            break
        assert fleet.counts.groups == {"red": blue, "blue": blue}


async def test_groups_take_turns_however_many_runs_each_has(tracking: FakeTracking, tmp_path: Path, uri: str) -> None:
    started: list[str | None] = []

    def note(event: RunEvent) -> None:
        if event.stage is Stage.STARTED:
            started.append(event.run_name)

    short = write_project(tmp_path / "short", "true")
    async with Fleet(tracking=tracking, max_concurrent=1, on_event=note) as fleet:
        first = await begin(fleet, uri)
        for name in ("red 1", "red 2", "red 3", "blue 1", "green 1", "blue 2"):
            await fleet.submit(short, group=name.split()[0], run_name=name, env_manager="local")
        await first.cancel()
    assert started[1:] == ["red 1", "blue 1", "green 1", "red 2", "blue 2", "red 3"]


async def test_a_group_leaves_room_in_the_queue_to_others(tracking: FakeTracking, uri: str) -> None:
    async with Fleet(tracking=tracking, max_concurrent=1, max_queued=4, on_exit="cancel") as fleet:
        first = await begin(fleet, uri, "red")

        async def fill(group: str) -> str:
            try:
                while True:
                    await fleet.submit(uri, group=group, env_manager="local")
            except FleetFull as error:
                return str(error).removeprefix("the queue of the Fleet has ").partition(":")[0]

        others = "which must leave room to others"
        assert await fill("red") == f"2 of at most 4 runs, 2 of them of the group 'red', {others}"
        waiting = asyncio.create_task(fleet.submit(uri, group="red", wait=True, env_manager="local"))
        assert await fill("blue") == f"3 of at most 4 runs, 1 of them of the group 'blue', {others}"
        assert await fill("green") == "4 of at most 4 runs"
        _, pending = await asyncio.wait([waiting], timeout=0.3)
        assert pending
        await first.cancel()
        assert {group: counts.queued for group, counts in fleet.counts.groups.items() if counts.queued}["blue"] == 1
        await fleet.cancel()
        await (await waiting).cancel()
        assert fleet.counts == FleetCounts()


async def test_sweeps_count_in_the_limits_and_are_not_refused(tracking: FakeTracking, tmp_path: Path) -> None:
    short = write_project(tmp_path / "short", "true")
    async with Fleet(tracking=tracking, max_concurrent=4, max_queued=0, group_limit=1) as fleet:
        async with fleet.sweep(short, grid(n=[1, 2, 3]), group="red", max_concurrent=3, env_manager="local") as sweep:
            async for _ in sweep:
                assert fleet.counts.groups.get("red", FleetCounts()).running <= 1
        assert sweep.counts.finished == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_queued": -1}, "max_queued is -1: give a whole number, 0 or more, or None"),
        ({"max_concurrent": 5 / 2}, "max_concurrent is 2.5: give a whole number, 1 or more, or None"),
        ({"max_concurrent": "4"}, "max_concurrent is '4': give a whole number, 1 or more, or None"),
        ({"group_limit": 0}, "group_limit is 0: give a whole number, 1 or more"),
        ({"group_limit": {"red": 0}}, "group_limit is {'red': 0}: give a whole number, 1 or more"),
        ({"group_limit": "4"}, "group_limit is '4': give a whole number, 1 or more"),
    ],
)
def test_wrong_limits_are_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Fleet(tracking=FakeTracking(), **options)  # type: ignore[arg-type]


async def test_a_wrong_group_is_a_mistake(tracking: FakeTracking, uri: str) -> None:
    async with Fleet(tracking=tracking) as fleet:
        with pytest.raises(UsageError, match="group is '': give the name of a group, or None"):
            await fleet.submit(uri, group="")
        with pytest.raises(UsageError, match=r"group is '.ud800': give a text without NUL and with valid UTF-8 only"):
            await fleet.submit(uri, group="\ud800")  # exporters of traces cannot send it, nor what they send with it
        with pytest.raises(UsageError, match="a detached run does not count in a Fleet"):
            await fleet.submit(uri, group="red", detach=True)


async def seen_as(tracking: FakeTracking, run: FleetRun, status: RunStatus) -> None:
    """Wait until MLflow shows a status of a run."""
    while tracking.runs[run.run_id].status is not status:  # noqa: ASYNC110 - a FakeTracking tells nobody
        await asyncio.sleep(0.01)


async def test_a_run_that_waits_in_the_queue_is_scheduled(tracking: FakeTracking, tmp_path: Path, uri: str) -> None:
    short = write_project(tmp_path / "short", "true")
    async with Fleet(tracking=tracking, max_concurrent=1) as fleet:
        first = await begin(fleet, uri)
        second, third, fourth = [await fleet.submit(short, env_manager="local") for _ in range(3)]
        await seen_as(tracking, second, RunStatus.SCHEDULED)
        await seen_as(tracking, third, RunStatus.SCHEDULED)
        assert await second.get_status() is RunStatus.SCHEDULED
        tracking.runs[third.run_id].statuses.append(RunStatus.KILLED)  # as another process cancels it
        await first.cancel()
        assert await second.wait()
        assert (await third.outcome()).reason == "cancelled by another process"
        assert third.stage is Stage.FINISHED
        assert Stage.PREPARING not in third.times, "it never began"
        assert await fourth.wait()
    running, scheduled, finished = RunStatus.RUNNING, RunStatus.SCHEDULED, RunStatus.FINISHED
    assert tracking.runs[first.run_id].statuses == [running, RunStatus.KILLED]
    assert tracking.runs[second.run_id].statuses == [running, scheduled, running, finished]
    assert set(tracking.runs[third.run_id].statuses) == {running, scheduled, RunStatus.KILLED}
