"""Waiting and cleaning up that no cancellation of the caller interrupts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio

__all__ = ["complete", "wait_done"]

T = TypeVar("T")


async def wait_done(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait until `future` is done, also when the calling task is cancelled, however often.

    An anyio shield holds back the cancellation of anyio scopes, but not ``task.cancel()`` (asyncio's native
    cancellation, which ``asyncio.timeout`` and ``asyncio.run`` use). This function holds back both.

    Args:
        future: The future or task to wait for. Its result and its error are left to the caller.

    Returns:
        The last cancellation that arrived meanwhile. The caller must raise it when its own work is done.
    """
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = error
    return cancelled


async def complete(
    work: Callable[[], Coroutine[Any, Any, T]], *, limit: float | None = None, restart: bool = False
) -> T:
    """Run `work` in a task of its own and wait for its end, however often the caller is cancelled.

    Args:
        work: The coroutine function to run.
        limit: Seconds that the work may still take after the first cancellation of the caller; then it is cancelled,
            too. None: no limit.
        restart: Begin the work again if it was cancelled together with the caller, as ``asyncio.run`` and some servers
            do when they cancel all tasks of the loop at its end. The work must allow for being done twice.

    Returns:
        The result of the work. It is lost if the caller was cancelled: store it from inside `work` if it is needed.

    Raises:
        asyncio.CancelledError: The caller was cancelled. Raised after the end of the work; an error of the work is its
            ``__cause__``.
    """
    cancelled: asyncio.CancelledError | None = None
    while True:
        task = asyncio.ensure_future(work())
        with anyio.CancelScope(shield=True):
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled, again = error, restart
            else:
                again = False
        if not task.done():
            timer = None if limit is None else asyncio.get_running_loop().call_later(limit, task.cancel)
            await wait_done(task)
            if timer is not None:
                timer.cancel()
        if not (again and task.cancelled()):
            break
    if cancelled is None:
        return task.result()
    if not task.cancelled() and (failure := task.exception()) is not None:
        raise cancelled from failure
    raise cancelled
