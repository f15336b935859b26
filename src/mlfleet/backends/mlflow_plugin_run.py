"""The handle of a run that a blocking plugin of mlflow made."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import anyio

from mlfleet._concurrency.tasks import TaskOwner
from mlfleet._concurrency.threads import PLUGIN_QUESTIONS
from mlfleet.backends._remote.run import AwaitedRun
from mlfleet.errors import BackendError
from mlfleet.runs import FailureKind, Outcome, RunStatus

__all__ = ["BlockingHandle", "PluginRun"]

_log = logging.getLogger("mlfleet.plugins")
_CONFIRMS = 10.0  # seconds beyond the grace that a plugin has to tell the end of a run it was told to cancel
# The numbers of mlflow's own statuses, which some plugins give rather than their names.
_NUMBERS = {
    1: RunStatus.RUNNING,
    2: RunStatus.SCHEDULED,
    3: RunStatus.FINISHED,
    4: RunStatus.FAILED,
    5: RunStatus.KILLED,
}

T = TypeVar("T")


class BlockingHandle(Protocol):
    """What a plugin's ``run`` gives: the handle of mlflow (mlflow/projects/submitted_run.py)."""

    @property
    def run_id(self) -> Any:
        """The MLflow run that it logs to."""
        ...

    def wait(self) -> Any:
        """Block until the end; true if it was a good one."""
        ...

    def cancel(self) -> Any:
        """End the run."""
        ...

    def get_status(self) -> Any:
        """A name or a number of mlflow's statuses."""
        ...


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a call into the plugin gave, or how it failed."""

    value: Any = None
    error: BaseException | None = None


class PluginRun(AwaitedRun):
    """Waits for the plugin's handle in a thread of the run's own, for a wait that is queued would see no end.

    Plugins give no exit code.

    Args:
        run_id: of the Fleet's MLflow run.
        handle: the plugin's.
        plugin: its name.
        grace: seconds that a cancelled run has for its end.
        tasks: the owner of the task that cancels.
    """

    def __init__(self, run_id: str, handle: BlockingHandle, plugin: str, grace: float, tasks: TaskOwner) -> None:
        super().__init__(run_id)
        self._handle = handle
        self._plugin = plugin
        self._grace = grace
        self._tasks = tasks
        self._stopping = False
        self._patience = anyio.CancelScope(deadline=math.inf)
        self._callbacks: list[Callable[[], None]] = []
        self._ended = self._in_own_thread(handle.wait)
        self._ended.add_done_callback(self._when_ended)

    @property
    def second_run(self) -> str | None:
        """The id of the MLflow run that the plugin made, if it did not take the Fleet's."""
        its = self._handle.run_id
        return None if its is None or str(its) == self._run_id else str(its)

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Have `callback` called at the end of the run, which must not be yet."""
        self._callbacks.append(callback)

    async def started(self) -> None:
        """Plugins do not tell when the command begins: what they took counts as started."""

    async def cancel(self, *, grace: float | None = None) -> None:
        """Have the plugin cancel the run, and wait for what its ``wait`` says.

        It gets the grace and ten seconds more. After that the run is FAILED, with a reason that says that it may still
        go on: nobody but the plugin could end it.
        """
        # A task of the backend does the work, so that it is done although this caller is cancelled.
        if self._outcome is None:
            deadline = anyio.current_time() + (self._grace if grace is None else grace) + _CONFIRMS
            self._patience.deadline = min(self._patience.deadline, deadline)
        if self._outcome is None and not self._stopping:
            self._stopping = True
            self._tasks.start(self._stop(), name=f"mlfleet cancel of {self._plugin}", then=self._give_up)
        await self._done.wait()

    async def get_status(self) -> RunStatus:
        """What the plugin says, until it has said that the run has ended.

        Raises:
            BackendError: it cannot tell.
        """
        if self._outcome is not None:
            return self._outcome.status
        try:
            status = _status(await PLUGIN_QUESTIONS.run(self._handle.get_status))
        except Exception as error:
            text = f"the plugin {self._plugin!r} cannot tell the status of its run: {_told(error)}"
            raise BackendError(text, backend=self._plugin) from error
        return RunStatus.RUNNING if status is None or status.is_terminal else status

    async def logs(self, *, follow: bool = True) -> AsyncIterator[str]:
        """Nothing: plugins keep the output to themselves, or let it go where that of this process goes.

        Args:
            follow: wait for the end all the same.
        """
        if follow:
            await self._done.wait()
        nothing: tuple[str, ...] = ()
        for line in nothing:
            yield line

    # ---- its end ----------------------------------------------------------------------------------------------------

    def _in_own_thread(self, function: Callable[[], Any]) -> asyncio.Future[_Answer]:
        """Call `function` in a daemon thread: one that hangs holds up neither others nor the end of this process."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_Answer] = loop.create_future()

        def call() -> None:
            try:
                given = _Answer(function())
            except BaseException as error:
                given = _Answer(error=error)
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(_set, answer, given)

        threading.Thread(target=call, name=f"mlfleet plugin {self._plugin}", daemon=True).start()
        return answer

    def _when_ended(self, ended: asyncio.Future[_Answer]) -> None:
        if not self._stopping and not ended.cancelled():
            self._finish(self._seen(ended.result()))

    async def _stop(self) -> None:
        cancelled = self._in_own_thread(self._handle.cancel)
        with self._patience:
            await asyncio.wait([cancelled, self._ended])
        failed = cancelled.result().error if cancelled.done() else None
        if failed is not None:
            _log.warning("the plugin %r failed to cancel the run %s: %s", self._plugin, self._run_id, _told(failed))
        if not self._ended.done():
            self._finish(self._still_there(failed))
            return
        answer = self._ended.result()
        well = answer.error is None and bool(answer.value)
        confirmed = failed is None or answer.error is None
        self._finish(Outcome(RunStatus.KILLED, reason="cancelled") if confirmed and not well else self._seen(answer))

    def _give_up(self) -> None:
        """The task that cancels was torn at the end of the loop."""
        self._finish(self._still_there(None))

    def _finish(self, outcome: Outcome) -> None:
        if self._outcome is not None:
            return
        self._outcome = outcome
        self._done.set()
        for callback in self._callbacks:
            callback()

    def _seen(self, answer: _Answer) -> Outcome:
        if answer.error is not None:
            error = BackendError(
                f"the plugin {self._plugin!r} lost the run while it waited: {_told(answer.error)}", backend=self._plugin
            )
            error.__cause__ = answer.error
            return Outcome(RunStatus.FAILED, reason=str(error), error=error)
        if answer.value:
            return Outcome(RunStatus.FINISHED)
        return Outcome(RunStatus.FAILED, reason=f"the plugin {self._plugin!r} says that it failed")

    def _still_there(self, failed: BaseException | None) -> Outcome:
        why = (
            f"cancelling failed: {_told(failed)}"
            if failed is not None
            else "it was cancelled, but has not ended in time"
        )
        error = BackendError(f"the run may still go on at the plugin {self._plugin!r}: {why}", backend=self._plugin)
        error.__cause__ = failed
        return Outcome(RunStatus.FAILED, reason=str(error), error=error, cause=FailureKind.INFRASTRUCTURE)


def _set(answer: asyncio.Future[_Answer], given: _Answer) -> None:
    if not answer.done():
        answer.set_result(given)


def _status(told: object) -> RunStatus | None:
    """What a plugin means; None: nothing that is known."""
    if isinstance(told, int):
        return _NUMBERS.get(told)
    try:
        return RunStatus(str(told))
    except ValueError:
        return None


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
