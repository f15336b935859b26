"""Blocking work in threads, and waiting that a cancellation cannot tear."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

__all__ = ["Threads", "outlast"]

V = TypeVar("V")
_unlimited: RunVar[anyio.CapacityLimiter] = RunVar("mlfleet unlimited")


async def outlast(future: asyncio.Future[V]) -> asyncio.CancelledError | None:
    """Wait until `future` is done, also when the calling task is cancelled, however often.

    An anyio scope's shield holds off that scope's own cancellation, but not ``task.cancel()``; this holds off both.

    Returns:
        The cancellation that came meanwhile, which the caller raises when its work is done.
    """
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = error
    return cancelled


class Threads:
    """Up to `count` threads of each event loop for one kind of blocking work, so that no other kind can starve it."""

    def __init__(self, name: str, count: int) -> None:
        self._count = count
        self._slots: RunVar[asyncio.Semaphore] = RunVar(f"mlfleet {name}")

    async def __call__(self, function: Callable[[], V], *, undo: Callable[[V], Awaitable[None]] | None = None) -> V:
        """Call `function` in a thread.

        A call that is cancelled before a thread took it does not happen. One that a thread is busy with is awaited
        first, since it cannot be stopped.

        Args:
            function: the blocking work.
            undo: takes back a result that nobody will get any more. Must not be torn by a cancellation itself.
        """
        slots = self._slots.get(None)
        if slots is None:
            slots = asyncio.Semaphore(self._count)
            self._slots.set(slots)
        # Not anyio's limiter: of 500 calls at the same time, waiting there would cost each ten times as much.
        async with slots:
            return await _in_thread(_Call(function, asyncio.get_running_loop()), undo)


async def _in_thread(call: _Call[V], undo: Callable[[V], Awaitable[None]] | None) -> V:
    unlimited = _unlimited.get(None)
    if unlimited is None:
        unlimited = anyio.CapacityLimiter(math.inf)
        _unlimited.set(unlimited)
    try:
        await anyio.to_thread.run_sync(call.run, limiter=unlimited)
    except asyncio.CancelledError:
        if not call.withdraw():
            await outlast(call.done)
            if call.done.exception() is None and undo is not None:
                await undo(call.done.result())
        raise
    return call.done.result()


class _Call(Generic[V]):
    """A call for a thread that can be withdrawn until the thread takes it."""

    def __init__(self, function: Callable[[], V], loop: asyncio.AbstractEventLoop) -> None:
        self._function = function
        self._loop = loop
        self._taken = threading.Lock()
        self.done: asyncio.Future[V] = loop.create_future()

    def run(self) -> None:
        if not self._taken.acquire(blocking=False):
            return
        try:
            result = self._function()
        except BaseException as error:
            self._loop.call_soon_threadsafe(self.done.set_exception, error)
        else:
            self._loop.call_soon_threadsafe(self.done.set_result, result)

    def withdraw(self) -> bool:
        """Keep any thread from taking the call. False: one has taken it."""
        return self._taken.acquire(blocking=False)
