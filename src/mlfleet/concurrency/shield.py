"""Work that must come to its end although its caller is cancelled, but not at any price."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

__all__ = ["finish"]

T = TypeVar("T")


async def finish(work: Callable[[], Awaitable[T]], *, within: float) -> T:
    """Await `work`; if the caller is cancelled meanwhile, `work` still gets some time to end.

    A cancelled caller that wants the result lets `work` keep it somewhere: the cancellation is raised all the same.

    Args:
        work: what is to be done.
        within: seconds that it has from the cancellation on.
    """
    scope = anyio.CancelScope(shield=True)
    ended = anyio.Event()
    results: list[T] = []
    errors: list[Exception] = []

    async def shielded() -> None:
        try:
            with scope:
                results.append(await work())
        except Exception as error:
            errors.append(error)  # raised below, rather than in a group
        finally:
            ended.set()

    async with anyio.create_task_group() as group:
        group.start_soon(shielded)
        try:
            await ended.wait()
        except anyio.get_cancelled_exc_class():
            scope.deadline = anyio.current_time() + within
            raise
    if errors:
        raise errors[0]
    return results[0]
