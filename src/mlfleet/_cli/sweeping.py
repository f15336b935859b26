"""The work of ``mlfleet sweep``: one sweep in a Fleet of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup

from mlfleet._cli.sweep_best import Best
from mlfleet._signals import Interrupts
from mlfleet._sweeps import PointResult, Sweep, SweepCounts
from mlfleet.errors import MlfleetError
from mlfleet.fleet import Fleet
from mlfleet.runs import RunEvent
from mlfleet.spaces import Points

__all__ = ["SweepCommand", "SweepView"]


class SweepView(Protocol):
    """Shows a sweep while it goes on."""

    def begin(self) -> None:
        """The sweep is being prepared."""
        ...

    def follow(self, event: RunEvent) -> None:
        """Something has happened; must not block."""
        ...

    def entered(self, sweep: Sweep) -> None:
        """The sweep has begun."""
        ...

    def ended(self, result: PointResult, output: Sequence[str]) -> None:
        """A point has its result; of one that failed, the last lines of its output."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    async def keep_up(self) -> None:
        """Show all of that; runs until it is cancelled."""
        ...

    async def close(self) -> None:
        """Show what is left, and nothing more."""
        ...


@dataclass(slots=True, kw_only=True)
class SweepCommand:
    """One call of ``mlfleet sweep``, and how it went.

    Attributes:
        uri: of the project.
        space: its points.
        options: other arguments of `Fleet.sweep`.
        jobs: how many runs at once; None: as many as the Fleet lets run.
        tracking_uri: to use; None is the default.
        tracking: what was used, without credentials; None if it could not be opened.
        sweep: the handle; None if it did not begin.
        best: of its results.
        error: why it did not end well; failed points are none.
    """

    uri: str
    space: Points
    options: Mapping[str, Any]
    jobs: int | None = None
    tracking_uri: str | None = None
    tracking: str | None = None
    sweep: Sweep | None = None
    best: Best = field(default_factory=lambda: Best(None))
    error: MlfleetError | None = None

    @property
    def counts(self) -> SweepCounts:
        """How the points ended."""
        return self.sweep.counts if self.sweep is not None else SweepCounts()

    async def execute(self, view: SweepView, interrupts: Interrupts) -> None:
        """Do it and keep how it went. When this returns, nothing of the sweep goes on."""
        async with AsyncExitStack() as stack:
            showing = await stack.enter_async_context(anyio.create_task_group())
            stack.push_async_callback(_stop, showing, view)
            showing.start_soon(view.keep_up)
            view.begin()
            # Inside of the view: what is stopped by an interrupt is seen to stop.
            with interrupts.scope:
                try:
                    await self._sweep(view, interrupts)
                except MlfleetError as error:
                    self.error = error
            await self._take_rest(view)

    async def _sweep(self, view: SweepView, interrupts: Interrupts) -> None:
        async with Fleet(tracking_uri=self.tracking_uri, max_concurrent=self.jobs, on_event=view.follow) as fleet:
            interrupts.fleet = fleet
            self.tracking = fleet.tracking.uri
            async with fleet.sweep(self.uri, self.space, max_concurrent=self.jobs, **self.options) as sweep:
                self.sweep = sweep
                view.entered(sweep)
                async for result in sweep:
                    await self._keep(result, view)

    async def _take_rest(self, view: SweepView) -> None:
        """Results that came after an interrupt."""
        if self.sweep is None:
            return
        try:
            async for result in self.sweep:
                await self._keep(result, view)
        except MlfleetError as error:
            self.error = error

    async def _keep(self, result: PointResult, view: SweepView) -> None:
        self.best.add(result)
        view.ended(result, () if result.run is None else (await result.run.outcome()).output)


async def _stop(showing: TaskGroup, view: SweepView) -> None:
    showing.cancel_scope.cancel()
    with anyio.CancelScope(shield=True):
        await view.close()
