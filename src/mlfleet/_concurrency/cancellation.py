"""Work that must come to its end although its caller is cancelled, but not at any price."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from mlfleet._concurrency.threads import outlast

__all__ = ["finish", "let_end"]

T = TypeVar("T")


async def finish(work: Callable[[], Coroutine[Any, Any, T]], *, within: float) -> T:
    """Await `work`; if the caller is cancelled meanwhile, `work` still gets some time to end.

    A cancelled caller that wants the result lets `work` keep it somewhere: the cancellation is raised all the same.

    Args:
        work: what is to be done.
        within: seconds that it has from the cancellation on.
    """
    task = asyncio.ensure_future(work())
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await let_end(task, within=within)
        raise
    return task.result()


async def let_end(task: asyncio.Task[Any], *, within: float) -> None:
    """Wait for the end of `task`, whatever it is, although the caller was cancelled and may be again.

    Args:
        task: is cancelled when its time is over. Its error gives way to the cancellation of the caller.
        within: seconds that it has.
    """
    late = asyncio.get_running_loop().call_later(within, task.cancel)
    await outlast(task)
    late.cancel()
    if not task.cancelled():
        task.exception()
