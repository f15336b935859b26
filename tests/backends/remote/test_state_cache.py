"""The shared cache of states: waiters, lists, and a feeder that ends."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from mlfleet.backends._remote.state_cache import StateCache
from mlfleet.errors import BackendError, RunLost


async def idle(watch: StateCache[int]) -> None:
    await anyio.sleep_forever()


async def test_many_waiters_of_one_key_are_woken_by_the_state_they_want() -> None:
    async with StateCache(idle, name="test") as watch:
        cell = watch.track("a")
        waiters = [asyncio.create_task(cell.until(lambda state: state >= 3)) for _ in range(100)]
        for state in (1, 2, 3, 4):
            watch.put("a", state)
            await anyio.lowlevel.checkpoint()
        assert set(await asyncio.gather(*waiters)) <= {3, 4}
        assert await cell.until(lambda state: state == 4) == 4
        watch.put("b", 1)  # nobody tracks it: nothing is kept
        assert watch.get("b") is None
        watch.untrack("a")
        assert watch.keys == ()


async def test_when_the_feeder_fails_every_waiter_is_told() -> None:
    broken = anyio.Event()

    async def feed(watch: StateCache[int]) -> None:
        await broken.wait()
        raise RunLost("the engine is gone")

    async with StateCache(feed, name="test") as watch:
        cell = watch.track("a")
        waiters = [asyncio.create_task(cell.until(lambda state: False)) for _ in range(10)]
        await anyio.lowlevel.checkpoint()
        broken.set()
        errors = await asyncio.gather(*waiters, return_exceptions=True)
        assert {type(error) for error in errors} == {RunLost}
        with pytest.raises(RunLost, match="the engine is gone"):
            await watch.track("later").until(lambda state: True)


async def test_a_fault_of_the_feeder_is_one_of_our_errors() -> None:
    async def feed(watch: StateCache[int]) -> None:
        raise KeyError("x")

    async with StateCache(feed, name="the watch of tests") as watch:
        with pytest.raises(BackendError, match="the watch of tests has failed: KeyError"):
            await watch.track("a").until(lambda state: True)


async def test_it_survives_a_stray_cancellation_and_ends_when_it_is_left() -> None:
    started: list[asyncio.Task[None] | None] = []

    async def feed(watch: StateCache[int]) -> None:
        started.append(asyncio.current_task())
        watch.put("a", len(started))
        await anyio.sleep_forever()

    async with StateCache(feed, name="test") as watch:
        cell = watch.track("a")
        await cell.until(lambda state: state == 1)
        task = started[0]
        assert task is not None
        task.cancel()  # as asyncio.run does to every task at its end
        await cell.until(lambda state: state == 2)
    assert task.done()
    with pytest.raises(BackendError, match="has ended"):
        await cell.until(lambda state: False)
