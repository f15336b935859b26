"""Work in threads that ends when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import threading

import anyio
import pytest

from mlfleet._project.blocking import Stopped, stoppable


@pytest.mark.parametrize("how", ["task.cancel", "anyio scope"])
async def test_thread_stops_before_its_cancelled_caller_goes_on(how: str) -> None:
    began, ended = threading.Event(), threading.Event()

    def work(stop: threading.Event) -> None:
        began.set()
        stop.wait()
        ended.set()
        raise Stopped

    async def call() -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await stoppable(work)

    scopes: list[anyio.CancelScope] = []
    task = asyncio.create_task(call())
    assert await asyncio.to_thread(began.wait, 20)
    if how == "task.cancel":
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        scopes[0].cancel()
        await task
    assert ended.is_set()
