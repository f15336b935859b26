"""What handles of runs elsewhere have in common: one task sees a run to its end, and anybody may wait for that."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import anyio

from mlfleet._concurrency.cancellation import wait_done
from mlfleet._concurrency.tasks import TaskOwner
from mlfleet._concurrency.threads import FILES
from mlfleet._text.lines import follow_file, last_lines
from mlfleet.errors import MlfleetError, RunLost
from mlfleet.runs import Outcome, RunStatus

__all__ = ["AwaitedRun", "SupervisedRun", "SupervisedRuns"]


class SupervisedRuns:
    """The runs of a backend that have not ended, and their tasks."""

    def __init__(self) -> None:
        self._runs: set[SupervisedRun] = set()
        self._tasks = TaskOwner()

    def start(self, run: SupervisedRun, *, name: str, then: Callable[[], Awaitable[None]] | None = None) -> None:
        """See a run to its end in a task of its own.

        Args:
            run: the handle.
            name: of the task.
            then: what is to be done after its end.
        """
        self._runs.add(run)
        self._tasks.start(self._look_after(run, then), name=name)

    async def _look_after(self, run: SupervisedRun, then: Callable[[], Awaitable[None]] | None) -> None:
        try:
            await run.supervise()
        finally:
            self._runs.discard(run)
            if then is not None:
                await then()

    async def close(self) -> None:
        """Cancel the runs that were submitted here and leave the others alone; returns when no task is left.

        To be shielded by the caller.
        """
        async with anyio.create_task_group() as group:
            for run in tuple(self._runs):
                if run.submitted:
                    group.start_soon(run.cancel)
                else:
                    run.detach()
        await self._tasks.join()


class AwaitedRun:
    """A handle that any number of tasks may wait for: `_outcome` is set, and then `_done`.

    Args:
        run_id: of the MLflow run.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        # Not anyio's: hundreds of runs wait at the same time.
        self._done = asyncio.Event()
        self._outcome: Outcome | None = None

    @property
    def run_id(self) -> str:
        """The id of the MLflow run."""
        return self._run_id

    async def wait(self) -> bool:
        """Wait until it has ended and its output is here; True if it finished well."""
        return (await self.outcome()).status is RunStatus.FINISHED

    async def outcome(self) -> Outcome:
        """Wait like `wait`, and tell how it ended."""
        await self._done.wait()
        assert self._outcome is not None  # noqa: S101 - set before the event
        return self._outcome


class SupervisedRun(AwaitedRun, ABC):
    """A handle. `supervise` is started once by the backend, which owns its task.

    Args:
        run_id: of the MLflow run.
        output: the file for the run's output; None: it goes to the output of this process.
        submitted: whether it was submitted here: then it does not outlive its backend.

    Attributes:
        submitted: likewise.
    """

    backend: ClassVar[str]
    """The name of the backend."""

    noun: ClassVar[str]
    """What the run is there."""

    def __init__(self, run_id: str, output: Path | None, *, submitted: bool) -> None:
        super().__init__(run_id)
        self.submitted = submitted
        self._output = output
        self._task: asyncio.Task[None] | None = None
        self._detached = False

    # ---- the handle -------------------------------------------------------------------------------------------------

    async def cancel(self, *, grace: float | None = None) -> None:
        """Have it ended, and wait for that. A cancelled call has begun it all the same.

        Args:
            grace: seconds between the request and the end by force; None: as the run was submitted with.
        """
        # The run's own task does the work.
        self._begin_stop(grace)
        await self._done.wait()

    async def logs(self, *, follow: bool = True) -> AsyncIterator[str]:
        """The lines of its output; none if it goes to the output of this process."""
        if self._output is None:
            return
        async for line in follow_file(self._output, self._done.wait if follow else None):
            yield line

    # ---- its task ---------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Leave the run alone from now on; who waits is told that its end is not known."""
        self._detached = True
        if self._task is not None and self._outcome is None:
            self._task.cancel()

    async def supervise(self) -> None:
        """See the run to its end."""
        self._task = task = asyncio.current_task()
        while self._outcome is None and not self._detached:
            try:
                self._outcome = await self._live()
            except MlfleetError as error:
                failing = asyncio.ensure_future(self._fail(error))
                await wait_done(failing)
                failing.result()
            except asyncio.CancelledError:
                if not self._detached:
                    # asyncio.run cancels every task at its end: then the run has to end, too.
                    self._begin_stop(None)
                # Taken note of: else a task group that fails later would cancel this task again (Python 3.13).
                while task is not None and task.uncancel():
                    pass
        if self._outcome is None:
            lost = RunLost(f"this process does not look after the {self.noun} any more", backend=self.backend)
            self._outcome = Outcome(RunStatus.FAILED, reason=str(lost), error=lost)
        await self._tidy()
        self._done.set()

    async def _fail(self, error: MlfleetError) -> None:
        await self._abandon()
        seen = await self._last_lines()
        self._outcome = Outcome(RunStatus.FAILED, reason=str(error), error=error, output=seen)

    async def _last_lines(self) -> tuple[str, ...]:
        return () if self._output is None else await FILES.run(partial(last_lines, self._output))

    @abstractmethod
    def _begin_stop(self, grace: float | None) -> None:
        """Have the task end the run, in `grace` seconds; of several calls the shortest counts."""

    @abstractmethod
    async def _live(self) -> Outcome:
        """All of the run's life, or the rest of it after a cancellation of the task."""

    async def _abandon(self) -> None:
        """Nobody looks any more, for an error: see to it that the run does not go on unseen."""

    @abstractmethod
    async def _tidy(self) -> None:
        """Give back what the run holds here. Must not be torn by a cancellation."""
