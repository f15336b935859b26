"""Handles of runs elsewhere: one task sees a run to its end, and any number of others may wait for that."""

from __future__ import annotations

import asyncio
import signal
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import anyio
from anyio.abc import TaskGroup

from mlfleet._concurrency.cancellation import complete, wait_done
from mlfleet._concurrency.grace import StopRequest
from mlfleet._concurrency.tasks import TaskOwner
from mlfleet._concurrency.threads import FILES
from mlfleet._run_log import get_logger
from mlfleet._text.lines import last_lines
from mlfleet.backends._output import FileOutput
from mlfleet.errors import BackendError, MlfleetError, RunLost
from mlfleet.runs import DEFAULT_CANCEL_GRACE, Outcome, RunStatus

__all__ = ["AwaitedRun", "SupervisedRun", "SupervisedRuns", "exit_text", "tasks_beside"]

_log = get_logger("mlfleet.backends")


@asynccontextmanager
async def tasks_beside(*works: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[TaskGroup]:
    """Run coroutine functions beside a block, and cancel them at its end. Yields their group, which takes more.

    Raises:
        MlfleetError: The first error of the block or of one of them, which cancels the others.
    """
    try:
        async with anyio.create_task_group() as group:
            for work in works:
                group.start_soon(work)
            yield group
            group.cancel_scope.cancel()
    except* MlfleetError as errors:
        raise errors.exceptions[0] from None


def exit_text(code: int) -> str:
    """Return the text for an exit code, with the signal that codes above 128 stand for: ``exit code 137 (SIGKILL)``."""
    with suppress(ValueError):
        return f"exit code {code} ({signal.Signals(code - 128).name})"
    return f"exit code {code}"


class SupervisedRuns:
    """The runs of a backend that have not ended, and the tasks that supervise them."""

    def __init__(self) -> None:
        self._runs: set[SupervisedRun] = set()
        self._tasks = TaskOwner()

    def start(self, run: SupervisedRun, *, name: str, then: Callable[[], Awaitable[None]] | None = None) -> None:
        """Supervise a run in a task of its own.

        Args:
            run: The handle.
            name: The name of the task.
            then: A coroutine function to call after the run's end.
        """
        self._runs.add(run)
        self._tasks.start(self._supervise(run, then), name=name)

    async def _supervise(self, run: SupervisedRun, then: Callable[[], Awaitable[None]] | None) -> None:
        try:
            await run.supervise()
        finally:
            self._runs.discard(run)
            if then is not None:
                await then()

    async def close(self) -> None:
        """Cancel the runs that were submitted here, leave the others alone, and return when no task is left.

        The caller must call it in `mlfleet._concurrency.cancellation.complete`.
        """
        async with anyio.create_task_group() as group:
            for run in tuple(self._runs):
                if run.submitted:
                    group.start_soon(run.cancel)
                else:
                    run.detach()
        await self._tasks.join()


class AwaitedRun:
    """A handle that any number of tasks may wait for.

    A subclass sets `_outcome` and then `_done`.

    Args:
        run_id: The id of the MLflow run.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        # Not anyio.Event, which makes one asyncio.Event more for each run.
        self._done = asyncio.Event()
        self._outcome: Outcome | None = None

    @property
    def run_id(self) -> str:
        """The id of the MLflow run."""
        return self._run_id

    async def wait(self) -> bool:
        """Wait until the run has ended and its output is here. Return True if it finished well."""
        return (await self.outcome()).status is RunStatus.FINISHED

    async def outcome(self) -> Outcome:
        """Wait like `wait`, and return the outcome."""
        await self._done.wait()
        assert self._outcome is not None  # noqa: S101 - set before the event
        return self._outcome


class SupervisedRun(AwaitedRun, FileOutput):
    """The handle of a run that one task supervises: the backend starts `supervise` once and owns the task.

    Args:
        run_id: The id of the MLflow run.
        output: The file for the run's output; None: it goes to the output of this process.
        submitted: True if this process submitted the run: then it does not outlive its backend.
        grace: Seconds between the request to stop and the end by force, for calls of `cancel` that name none.
        ended_as: The terminal status of a run that had ended before there was this handle, so that `get_status` knows
            it at once; None if it goes on. The outcome comes later, with the output.

    Attributes:
        submitted: The argument `submitted`.
    """

    backend: ClassVar[str]
    """The name of the backend."""

    noun: ClassVar[str]
    """The backend's word for a run, such as ``container``."""

    def __init__(
        self,
        run_id: str,
        output: Path | None,
        *,
        submitted: bool,
        grace: float = DEFAULT_CANCEL_GRACE,
        ended_as: RunStatus | None = None,
    ) -> None:
        super().__init__(run_id)
        self._ended_as = ended_as
        self.submitted = submitted
        self._output = output
        self._stop_request = StopRequest(grace)
        self._task: asyncio.Task[None] | None = None
        self._detached = False

    # ---- the handle -------------------------------------------------------------------------------------------------

    async def cancel(self, *, grace: float | None = None) -> None:
        """Request the end of the run and wait for it. A cancelled call has requested it all the same.

        Args:
            grace: Seconds between the request and the end by force; None: the grace that the run was submitted with.
        """
        # The run's own task does the work, so that a cancelled caller cannot interrupt it.
        self._begin_stop(grace)
        await self._done.wait()

    async def get_status(self) -> RunStatus:
        """Return SCHEDULED or RUNNING, and a terminal status only once the output is complete.

        A run that had ended before it was attached to has its terminal status at once.
        """
        if self._outcome is not None:
            return self._outcome.status
        return self._ended_as or await self._active_status()

    async def _active_status(self) -> RunStatus:
        """Return the status of a run that has no terminal one yet."""
        return RunStatus.RUNNING

    def _output_file(self) -> Path | None:
        return self._output

    async def _output_ended(self) -> object:
        return await self._done.wait()

    # ---- its task ---------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Stop supervising the run and leave it alone, unless it has ended. Waiters get an outcome with `RunLost`."""
        if self._outcome is None:
            self._detached = True
            if self._task is not None:
                self._task.cancel()

    async def supervise(self) -> None:
        """Supervise the run until it has ended, and set its outcome."""
        self._task = task = asyncio.current_task()
        while self._outcome is None and not self._detached:
            try:
                self._outcome = await self._live()
            except MlfleetError as error:
                await self._end_by(error)
            except Exception as error:
                # Waiters must not hang because of a fault of ours, or a full disk.
                _log.exception("the supervision of the run %s ended by an unexpected error", self.run_id)
                text = f"this process cannot look after the {self.noun} any more: {type(error).__name__}: {error}"
                await self._end_by(BackendError(text, backend=self.backend))
            except asyncio.CancelledError:
                # asyncio.run cancels every task at its end. Who has the handle then cancels the run, or lets go of it.
                # Without uncancel() a task group that fails later would cancel this task again (Python 3.13).
                while task is not None and task.uncancel():
                    pass
        if self._outcome is None:
            lost = RunLost(f"this process does not look after the {self.noun} any more", backend=self.backend)
            self._outcome = Outcome(RunStatus.FAILED, reason=str(lost), error=lost)
        try:
            # Again if it was cancelled itself, as by asyncio.run.
            await complete(self._tidy, restart=True)
        finally:
            self._done.set()

    async def _end_by(self, error: MlfleetError) -> None:
        failing = asyncio.ensure_future(self._fail(error))
        await wait_done(failing)
        failing.result()

    async def _fail(self, error: MlfleetError) -> None:
        await self._abandon()
        seen = await self._last_lines()
        self._outcome = Outcome(RunStatus.FAILED, reason=str(error), error=error, output=seen)

    async def _last_lines(self) -> tuple[str, ...]:
        return () if self._output is None else await FILES.run(partial(last_lines, self._output))

    def _begin_stop(self, grace: float | None) -> None:
        """Request that the task ends the run; see `StopRequest`."""
        self._stop_request.request(grace)

    @abstractmethod
    async def _live(self) -> Outcome:
        """Wait for the end of the run, and end it when requested. Called again after a cancellation of the task."""

    async def _abandon(self) -> None:
        """Do not let the run go on unseen, after an error because of which it is not watched any more."""

    @abstractmethod
    async def _tidy(self) -> None:
        """Release what the run holds in this process. Called in a task of its own; again if that is cancelled."""
