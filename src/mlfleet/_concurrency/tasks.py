"""Owners of tasks and of services that outlive the call that starts them."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel

from mlfleet._concurrency.cancellation import complete
from mlfleet._run_log import get_logger

__all__ = ["ServiceOwner", "TaskOwner"]

logger = get_logger("mlfleet.fleet")


class TaskOwner:
    """Keeps tasks alive, and waits for their end.

    A task group would tie its owner to the task that entered it, and would wrap every error in a group; a Fleet is
    entered and left in different tasks by test fixtures and frameworks. The tasks given here must not raise: they
    handle their own errors.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self,
        work: Coroutine[Any, Any, None],
        *,
        name: str,
        then: Callable[[], object] | None = None,
        context: contextvars.Context | None = None,
    ) -> None:
        """Start `work` as a task of this owner.

        Args:
            work: The coroutine to run.
            name: The name of the task.
            then: Called at the end of the task, also if the task was cancelled before its first step (as
                ``asyncio.run`` does with all tasks at its end). Default: nothing is called.
            context: The context variables of the task; None: a copy of the present ones.
        """
        task = asyncio.get_running_loop().create_task(work, name=name, context=context)
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
            # Done callbacks run one iteration of the loop after the task's end.
            await anyio.lowlevel.checkpoint()


class ServiceOwner:
    """Keeps async context managers open until all of them are closed.

    Each is entered and exited in one dedicated task, as anyio's task groups inside of them require.

    Args:
        users: The tasks that need the services. ``asyncio.run`` cancels every task at its end; the services then stay
            open until these have cleaned up.
    """

    def __init__(self, users: TaskOwner) -> None:
        self._users = users
        self._context = contextvars.copy_context()
        self._opened: dict[int, asyncio.Future[None]] = {}
        self._stop = anyio.Event()
        self._tasks = TaskOwner()

    async def open(self, service: AbstractAsyncContextManager[Any]) -> None:
        """Enter a service, unless that was done before. If entering it fails, all callers get the error."""
        opened = self._opened.get(id(service))
        if opened is None:
            opened = self._opened[id(service)] = asyncio.get_running_loop().create_future()
            # Cancelling a future that is done changes nothing.
            name = f"mlfleet {type(service).__name__}"
            # Not the context of the run that happens to need it first.
            context = self._context.copy()
            self._tasks.start(self._hold(service, opened), name=name, then=opened.cancel, context=context)
        if opened.done():
            opened.result()
        else:
            await asyncio.shield(opened)

    def forget(self, service: AbstractAsyncContextManager[Any]) -> None:
        """Forget a service that could not be entered, and is used no more."""
        self._opened.pop(id(service), None)

    async def close(self) -> None:
        """Exit all services and wait for that. Their errors are logged."""
        self._stop.set()
        await self._tasks.join()

    async def _hold(self, service: AbstractAsyncContextManager[Any], opened: asyncio.Future[None]) -> None:
        try:
            async with service:
                opened.set_result(None)
                try:
                    await self._stop.wait()
                except asyncio.CancelledError:
                    await complete(self._users.join, restart=True)
                    raise
        except Exception as error:
            if opened.done():
                logger.exception("%s could not be closed", type(service).__name__)
            else:
                opened.set_exception(error)
