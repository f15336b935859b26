"""The backends' handles of runs that are read here and supervised elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from mlfleet.backends.base import Backend, BackendRun
from mlfleet.runs import JobRef

__all__ = ["SharedHandles"]


@dataclass(slots=True)
class _Shared:
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    handle: BackendRun | None = None
    users: int = 0


class SharedHandles:
    """The handles of runs, one for all who read the output of a run, or wait for its outcome, at the same time.

    A handle has a task that watches its run. Without an end it would watch it for each reader that ever was.

    Args:
        backend: Returns the open backend of a name.
    """

    def __init__(self, backend: Callable[[str], Awaitable[Backend]]) -> None:
        self._backend = backend
        self._shared: dict[str, _Shared] = {}

    @asynccontextmanager
    async def use(self, reference: JobRef) -> AsyncIterator[BackendRun]:
        """Attach to a run. When its last user leaves, and it has not ended, it is left alone again.

        Raises:
            RunLost: The backend does not have the run.
            BackendError: The backend cannot be asked.
        """
        backend = await self._backend(reference.backend)
        shared = self._shared.setdefault(reference.run_id, _Shared())
        shared.users += 1
        try:
            async with shared.lock:
                if shared.handle is None:
                    shared.handle = await backend.attach(reference)
            yield shared.handle
        finally:
            shared.users -= 1
            if not shared.users:
                del self._shared[reference.run_id]
                if shared.handle is not None:
                    backend.detach(shared.handle)
