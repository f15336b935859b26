"""Blocking work in threads that ends early when its caller is cancelled: hashing, copying, unpacking."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from mlfleet._concurrency.cancellation import wait_done
from mlfleet._concurrency.threads import PROJECTS

__all__ = ["Stopped", "stoppable"]

V = TypeVar("V")


class Stopped(Exception):
    """Blocking work was asked to stop. It never leaves this package."""


async def stoppable(work: Callable[[threading.Event], V]) -> V:
    """Call `work` in a thread with an event that is set when the caller is cancelled.

    `work` checks the event between small pieces and raises `Stopped`. A cancelled caller waits for the thread's end, so
    that it may then remove what the thread has written.
    """
    stop = threading.Event()
    task = asyncio.ensure_future(PROJECTS.run(lambda: work(stop)))
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        stop.set()
        await wait_done(task)
        if not task.cancelled():
            task.exception()  # retrieved, or asyncio logs it as never retrieved
        raise
    return task.result()
