"""A run's life is cancelled at every await of every task in it, and then once more: nothing must be left."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Self

import anyio
import pytest

from components.event_loops import LOOPS
from components.projects import pid_is_gone, write_project
from mlfleet import Fleet, RunStatus, Timeouts, grid
from mlfleet.testing import FakeTracking

Life = Callable[[FakeTracking, str], Awaitable[None]]

_MOST = 2000  # suspensions of the longest life, about ten times as many as there are


class Counted(Coroutine[Any, Any, Any]):
    """A coroutine that counts its suspensions, for `asyncio.Task`."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], suspended: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._suspended = suspended

    def send(self, value: Any) -> Any:
        result = self._coroutine.send(value)
        self._suspended()
        return result

    def throw(self, *error: Any) -> Any:
        result = self._coroutine.throw(*error)
        self._suspended()
        return result

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Any:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coroutine, name)


class OpenedTracking(FakeTracking):
    """A `FakeTracking` that knows how often it is open."""

    open_count = 0

    async def __aenter__(self) -> Self:
        await anyio.lowlevel.checkpoint()
        self.open_count += 1
        return self

    async def __aexit__(self, *error: object) -> None:
        await anyio.lowlevel.checkpoint()
        self.open_count -= 1


async def one_run(tracking: FakeTracking, uri: str) -> None:
    async with Fleet(tracking=tracking, timeouts=Timeouts(cancel_grace=0.2)) as fleet:
        run = await fleet.submit(uri, experiment_name="one", env_manager="local")
        await run.wait()


async def one_run_within_timeouts(tracking: FakeTracking, uri: str) -> None:
    async with asyncio.timeout(60), asyncio.timeout(60):
        await one_run(tracking, uri)


async def small_sweep(tracking: FakeTracking, uri: str) -> None:
    async with (
        Fleet(tracking=tracking, timeouts=Timeouts(cancel_grace=0.2)) as fleet,
        fleet.sweep(uri, grid(n=[1, 2]), name="lr", resume=True, env_manager="local") as sweep,
    ):
        await sweep.result()


async def cancelled_at(life: Life, uri: str, folder: Path, at: int, again: int) -> bool:
    """Live a life, and cancel it after some suspensions, and again some later. Return False if it ended before."""
    tracking = OpenedTracking()
    loop = asyncio.get_running_loop()
    count = 0
    before = asyncio.all_tasks()

    def suspended() -> None:
        nonlocal count
        count += 1
        if count in (at, at + again):
            loop.call_soon(task.cancel)

    async def main() -> None:
        await life(tracking, uri)

    def count_suspensions(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(Counted(coroutine, suspended), loop=loop, **options)

    loop.set_task_factory(count_suspensions)
    try:
        task = loop.create_task(main())
        async with asyncio.timeout(20):
            await asyncio.wait([task])
    finally:
        loop.set_task_factory(None)
    where = f"cancelled after {at} and {again} more suspensions"
    for _ in range(3):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() - before == set(), where
    assert tracking.open_count == 0, where
    for run in tracking.runs.values():
        assert run.status.is_terminal, where
        assert run.end_time is not None, where
    pids = [int(path.name) for path in folder.iterdir()]
    assert [pid for pid in pids if not pid_is_gone(pid)] == [], where
    if not task.cancelled():
        task.result()
        assert {run.status for run in tracking.runs.values()} == {RunStatus.FINISHED}, where
    return count >= at


def check(loop: str, life: Life, tmp_path: Path, step: int, again: int, first: int = 1) -> None:
    folder = tmp_path / "pids"
    folder.mkdir()
    uri = write_project(tmp_path / "demo", f"touch {folder}/$$; sleep 0.01", parameters="n: {type: float, default: 0}")
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        for at in itertools.count(first, step):
            assert at < _MOST
            if not runner.run(cancelled_at(life, uri, folder, at, again)):
                break


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("again", [1, 4])
@pytest.mark.parametrize("life", [one_run, small_sweep])
def test_two_cancellations_at_some_awaits_leave_nothing(tmp_path: Path, loop: str, life: Life, again: int) -> None:
    check(loop, life, tmp_path, step=13, again=again, first=1 + again)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("again", [1, 2, 5, 11])
@pytest.mark.parametrize("life", [one_run, one_run_within_timeouts, small_sweep])
def test_two_cancellations_at_every_await_leave_nothing(tmp_path: Path, loop: str, life: Life, again: int) -> None:
    check(loop, life, tmp_path, step=1, again=again)


@pytest.mark.parametrize("seconds", [0, 0.001, 0.002, 0.004])
async def test_a_fleet_that_is_cancelled_while_it_opens_leaves_nothing(seconds: float) -> None:
    before = asyncio.all_tasks()
    tracking = OpenedTracking()
    for _ in range(10):
        with anyio.move_on_after(seconds):
            async with Fleet(tracking=tracking):
                await anyio.sleep_forever()
    await anyio.lowlevel.checkpoint()
    assert asyncio.all_tasks() == before
    assert tracking.open_count == 0
