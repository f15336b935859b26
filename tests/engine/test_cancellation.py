"""A run's life is cancelled at every await of every task in it, and then once more: nothing must be left."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from components.event_loops import LOOPS
from components.projects import pid_is_gone, write_project
from fakes.scripted_server import ScriptedServer, scripted
from fakes.small_mlflow import SmallMlflow
from mlfleet import (
    Fleet,
    FleetRun,
    RunCancelled,
    RunStatus,
    Stage,
    Timeouts,
    UsageError,
    grid,
    run_async,
    submit,
)
from mlfleet.api import close_default_fleets
from mlfleet.testing import FakeTracking

Life = Callable[[FakeTracking, str], Awaitable[None]]

_MOST = 2000  # suspensions of the longest life, about ten times as many as there are
_SHORT_GRACE = Timeouts(cancel_grace=0.2)


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


@dataclass
class Server:
    """A part of MLflow's API, served by a thread whose suspensions do not count."""

    mlflow: SmallMlflow
    listener: ScriptedServer
    portal: BlockingPortal

    @property
    def uri(self) -> str:
        return f"http://{self.listener.place}"

    def wait_for_disconnection(self) -> None:
        """Wait until all clients have closed their connections."""

        async def wait() -> None:
            async with asyncio.timeout(10):
                await self.listener.done()

        self.portal.call(wait)


@contextmanager
def tracking_server() -> Iterator[Server]:
    mlflow = SmallMlflow()
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(scripted(mlflow.script)) as listener,
    ):
        yield Server(mlflow, listener, portal)


async def one_run(tracking: FakeTracking, uri: str) -> None:
    async with Fleet(tracking=tracking, timeouts=_SHORT_GRACE) as fleet:
        run = await fleet.submit(uri, experiment_name="one", env_manager="local")
        await run.wait()


async def one_run_within_timeouts(tracking: FakeTracking, uri: str) -> None:
    async with asyncio.timeout(60), asyncio.timeout(60):
        await one_run(tracking, uri)


async def small_sweep(tracking: FakeTracking, uri: str) -> None:
    async with (
        Fleet(tracking=tracking, timeouts=_SHORT_GRACE) as fleet,
        fleet.sweep(uri, grid(n=[1, 2]), name="lr", resume=True, env_manager="local") as sweep,
    ):
        await sweep.result()


async def one_call(tracking: FakeTracking, uri: str) -> None:
    """A run of the default Fleet, which has its own client of the server at the URI of the tracking."""
    try:
        await run_async(uri, experiment_id="0", env_manager="local", tracking_uri=tracking.uri, timeouts=_SHORT_GRACE)
    finally:
        await close_default_fleets()


async def attached_run(tracking: FakeTracking, uri: str) -> None:
    """A durable run of a sweep that a second Fleet attaches to, and waits for."""
    go = Path(uri).with_name("go")
    go.unlink(missing_ok=True)
    async with (
        Fleet(tracking=tracking, timeouts=_SHORT_GRACE) as fleet,
        fleet.sweep(uri, grid(n=[1]), name="lr", parameters={"go": go}, env_manager="local") as sweep,
    ):
        events = (event async for event in fleet.events())
        started = await anext(event async for event in events if event.stage is Stage.STARTED)
        async with Fleet(tracking=tracking, timeouts=_SHORT_GRACE) as second:
            assert started.run_id is not None
            attached = await second.attach(started.run_id)
            go.touch()
            await attached.wait()
        await sweep.result()


async def run_without_room(tracking: FakeTracking, uri: str) -> None:
    """A run that waits until another one has left room for it in the queue."""
    async with Fleet(tracking=tracking, max_concurrent=1, max_queued=0, timeouts=_SHORT_GRACE) as fleet:
        await fleet.submit(uri, env_manager="local")
        run = await fleet.submit(uri, env_manager="local", wait=True)
        await run.wait()


async def cancelled_at(
    life: Life, uri: str, folder: Path, server: Server, at: int, again: int, *, by_scope: bool
) -> bool:
    """Live a life, and cancel it after some suspensions, and again some later. Return False if it ended before.

    Args:
        life: The life to cancel.
        uri: The project.
        folder: The folder in which the runs note their pids.
        server: The tracking server of lives that use one.
        at: The number of suspensions before the first cancellation.
        again: The number of further suspensions before the second one.
        by_scope: The first cancellation is that of an anyio scope around the life; else both are native ones.
    """
    tracking = OpenedTracking(uri=server.uri)
    server.mlflow.runs.clear()
    loop = asyncio.get_running_loop()
    count = 0
    before = asyncio.all_tasks()
    scope = anyio.CancelScope()

    def suspended() -> None:
        nonlocal count
        count += 1
        if count == at and by_scope:
            loop.call_soon(scope.cancel)
        elif count in (at, at + again):
            loop.call_soon(task.cancel)

    async def main() -> None:
        with scope:
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
    assert [status for status in server.mlflow.statuses if not RunStatus(status).is_terminal] == [], where
    pids = [int(path.name) for path in folder.iterdir()]
    assert [pid for pid in pids if not pid_is_gone(pid)] == [], where
    if not task.cancelled():
        task.result()
        if not scope.cancelled_caught:
            statuses = {*(run.status for run in tracking.runs.values()), *server.mlflow.statuses}
            assert statuses == {RunStatus.FINISHED}, where
    return count >= at


def check(
    loop: str, life: Life, tmp_path: Path, step: int, again: int, first: int = 1, *, by_scope: bool = False
) -> None:
    folder = tmp_path / "pids"
    folder.mkdir()
    uri = write_project(
        tmp_path / "demo",
        f"touch {folder}/$$; until [ -e '{{go}}' ]; do sleep 0.01; done; sleep 0.01",
        parameters="n: {type: float, default: 0}\ngo: {type: string, default: /}",
    )
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with tracking_server() as server, asyncio.Runner(loop_factory=factory) as runner:
        for at in itertools.count(first, step):
            assert at < _MOST
            has_reached = runner.run(cancelled_at(life, uri, folder, server, at, again, by_scope=by_scope))
            server.wait_for_disconnection()
            if not has_reached:
                break


LIVES = [one_run, small_sweep, one_call, attached_run]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("again", [1, 4])
@pytest.mark.parametrize("life", LIVES)
def test_two_cancellations_at_some_awaits_leave_nothing(tmp_path: Path, loop: str, life: Life, again: int) -> None:
    check(loop, life, tmp_path, step=13, again=again, first=1 + again)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("life", LIVES)
def test_a_cancelled_scope_and_a_native_cancellation_leave_nothing(tmp_path: Path, loop: str, life: Life) -> None:
    check(loop, life, tmp_path, step=13, again=3, by_scope=True)


def test_cancellations_of_a_submit_that_waits_leave_nothing(tmp_path: Path) -> None:
    check("asyncio", run_without_room, tmp_path, step=9, again=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("again", [1, 2, 5, 11])
@pytest.mark.parametrize("life", [*LIVES, one_run_within_timeouts])
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


def test_closing_the_default_fleets_ends_a_run_that_is_being_submitted(tmp_path: Path) -> None:
    stubborn = write_project(tmp_path / "stubborn", "trap '' TERM; echo here; while :; do sleep 0.1; done")
    endless = write_project(tmp_path / "endless", "sleep 1000")

    async def main(server: Server) -> None:
        async def submitted(uri: str) -> FleetRun:
            return await submit(
                uri,
                experiment_id="0",
                env_manager="local",
                tracking_uri=server.uri,
                timeouts=Timeouts(cancel_grace=1),
            )

        run = await submitted(stubborn)
        assert await anext(run.logs()) == "here"
        submitting = asyncio.create_task(submitted(endless))
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await close_default_fleets()
        with pytest.raises((RunCancelled, UsageError)):
            await (await submitting).check()

    with tracking_server() as server, asyncio.Runner() as runner:
        runner.run(main(server))
        assert set(server.mlflow.statuses) == {RunStatus.KILLED}
