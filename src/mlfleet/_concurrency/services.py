"""An owner for clients and watchers that many tasks share."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from typing import Any

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.tasks import TaskOwner

__all__ = ["ServiceOwner"]

logger = logging.getLogger("mlfleet.fleet")


class ServiceOwner:
    """Keeps async context managers open, each in a task of its own, until all of them are closed.

    Who opens first and who closes last need not be the same task, which libraries with task groups inside insist on.

    Args:
        users: the tasks that need the services. ``asyncio.run`` cancels every task at its end; the services then stay
            open until these have cleaned up.
    """

    def __init__(self, users: TaskOwner) -> None:
        self._users = users
        self._opened: dict[int, asyncio.Future[None]] = {}
        self._stop = asyncio.Event()
        self._tasks = TaskOwner()

    async def open(self, service: AbstractAsyncContextManager[Any]) -> None:
        """Enter `service`, unless that was done before. An error of entering it is everybody's who asks."""
        opened = self._opened.get(id(service))
        if opened is None:
            opened = self._opened[id(service)] = asyncio.get_running_loop().create_future()
            # Cancelling it is nothing to a future that is done.
            self._tasks.start(self._hold(service, opened), name=f"mlfleet {type(service).__name__}", then=opened.cancel)
        if opened.done():
            opened.result()
        else:
            await asyncio.shield(opened)

    async def close(self) -> None:
        """Leave all of them."""
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
