"""The grace of something that is asked to stop, possibly several times."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from mlfleet._concurrency.grace import StopRequest


async def test_nothing_is_requested_at_first() -> None:
    stop = StopRequest(10)
    assert not stop.is_requested
    assert stop.deadline is None
    assert stop.remaining is None
    with anyio.move_on_after(0.01) as scope:
        await stop.expired()
    assert scope.cancelled_caught


async def test_a_request_without_a_grace_gets_the_default_one() -> None:
    stop = StopRequest(10)
    now = asyncio.get_running_loop().time()
    assert stop.request()
    assert stop.is_requested
    assert stop.deadline == pytest.approx(now + 10, abs=1)


async def test_a_longer_grace_changes_nothing() -> None:
    stop = StopRequest(10)
    assert stop.request(100)
    deadline = stop.deadline
    assert not stop.request(200)
    assert stop.deadline == deadline
    assert stop.request()  # the default one, which is shorter
    assert stop.remaining is not None
    assert stop.remaining <= 10


async def test_a_shorter_grace_wakes_waiters() -> None:
    stop = StopRequest(1000)
    async with anyio.create_task_group() as group:
        group.start_soon(stop.requested)
        group.start_soon(stop.expired)
        await anyio.wait_all_tasks_blocked()
        stop.request()
        await anyio.wait_all_tasks_blocked()
        stop.request(0)
    assert stop.remaining == 0


async def test_a_request_may_come_from_a_callback_of_the_loop() -> None:
    stop = StopRequest(1000)
    asyncio.get_running_loop().call_soon(stop.request, 0)
    await stop.expired()
