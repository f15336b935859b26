"""The part that is the same in every backend whose runs outlive this process: its owner, its runs and its closing."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Self, cast

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.threads import FILES, LOGINS
from mlfleet.backends._remote.owner import describe_this_process, owner_lives
from mlfleet.backends._remote.run import SupervisedRun, SupervisedRuns
from mlfleet.backends.base import Backend, BackendRun, Config, Presence
from mlfleet.runs import JobRef

__all__ = ["RemoteBackend"]


class RemoteBackend(Backend[Config], ABC):
    """A backend that submits jobs to a service, where they go on when this process dies.

    Leaving it ends the runs that it submitted, and then closes what `_stack` holds. Runs that it attached to go on.
    """

    hides_environment: ClassVar[bool] = True
    needs_login: ClassVar[bool] = True

    def __init__(self) -> None:
        self._runs = SupervisedRuns()
        self._stack = AsyncExitStack()
        self._this_process: Mapping[str, Any] = {}
        self._selected: Config | None = None

    async def __aenter__(self) -> Self:
        self._this_process = await FILES.run(describe_this_process)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async def close() -> None:
            await self._runs.close()
            await self._stack.aclose()

        await complete(close, restart=True)

    def select_service(self, config: Mapping[str, Any], tracking_uri: str) -> None:
        """Select where `list_runs` and `prune` look; see `Backend.select_service`."""
        self._selected = self.configure(config)

    async def _selected_config(self) -> Config:
        """Return the configuration by which `list_runs` and `prune` find their service."""
        if self._selected is None:
            await LOGINS.run(partial(self.select_service, {}, ""))
        return cast("Config", self._selected)

    def detach(self, run: BackendRun) -> None:
        """Stop watching a run, which goes on."""
        if isinstance(run, SupervisedRun):
            run.detach()

    async def is_abandoned(self, ref: JobRef) -> bool:
        """Return True if the run has ended or is gone, and so is the process that submitted it on this machine."""
        if await FILES.run(partial(owner_lives, ref.data.get("owner"))) is not False:
            return False
        return await self.presence(ref) is not Presence.ACTIVE
