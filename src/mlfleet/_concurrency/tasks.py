"""An owner for tasks that outlive the call that starts them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import anyio.lowlevel

__all__ = ["TaskOwner"]


class TaskOwner:
    """Keeps tasks alive, and waits for their end.

    A task group would tie its owner to the task that entered it, and would wrap every error in a group; a Fleet is
    entered and left in different tasks by test fixtures and frameworks. The tasks given here must not raise: they
    handle their own errors.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], *, name: str, then: Callable[[], object] | None = None) -> None:
        """Start `work` as a task of this owner.

        Args:
            work: what it does.
            name: of the task.
            then: is called at its end, also if the task was cancelled before its first step (as ``asyncio.run`` does
                with all tasks at its end).
        """
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, then))

    def _ended(self, then: Callable[[], object] | None, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if then is not None:
            then()

    async def join(self) -> None:
        """Wait until every task has ended, also those that are started meanwhile. The tasks are not cancelled."""
        while self._tasks:
            await asyncio.wait(tuple(self._tasks))
            # Done callbacks run one turn of the loop after the task's end.
            await anyio.lowlevel.checkpoint()
