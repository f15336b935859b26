"""The handle of a run that this Fleet does not supervise: another process does, did, or the run has ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.threads import FILES
from mlfleet._engine.attach import read_reference, tracked_outcome
from mlfleet._engine.conclude import Driver, Verdict, conclude, find_processes, judge, take_over, write_end
from mlfleet._engine.records import RunRecord, ask_to_cancel, find_record, look_up, remove_record
from mlfleet._paths import run_folder
from mlfleet._text.lines import LogLine
from mlfleet._text.plain import short
from mlfleet.backends._output import FileOutput, find_start, read_bytes, read_lines
from mlfleet.backends.base import BackendRun
from mlfleet.errors import BackendError, MlfleetError, RunLost, TrackingError, UsageError
from mlfleet.runs import REASON_TAG, JobRef, Outcome, RunStatus, check_seconds
from mlfleet.tracking.base import RunInfo, failure_tags
from mlfleet.tracking.links import run_url

if TYPE_CHECKING:
    from mlfleet._engine.context import RunContext

__all__ = ["DRIVER_PATIENCE", "LONGEST_PAUSE", "SHORTEST_PAUSE", "TrackedRun", "tracked_output"]

SHORTEST_PAUSE, LONGEST_PAUSE = 0.2, 2.0  # seconds between two looks
_PAUSE_HERE = 0.5
_PAUSE_ELSEWHERE = 5.0  # seconds between two looks at a run whose driver cannot be seen
DRIVER_PATIENCE = 5.0  # seconds in which a driver must write the end of a run, or see that its sweep was cancelled


class TrackedRun:
    """The handle of a run that is known by its MLflow id. It satisfies `SubmittedRun`.

    `mlfleet.get` and `Fleet.get` return it for runs that another process supervises, for those that nobody supervises
    any more, and for those that have ended. It holds nothing and starts nothing in the background. If the process that
    should write the status of the run is gone, the methods write it when the run is over, and so may wait for tracking.
    """

    __slots__ = ("_context", "_info")

    def __init__(self, context: RunContext, info: RunInfo) -> None:
        self._context = context
        self._info = info

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.run_id} {self._info.status}>"

    def _repr_html_(self) -> str:
        from mlfleet._text.html import link, run_block, values

        info = self._info
        return run_block(
            info.name,
            info.status,
            [
                ("reason", info.tags.get(REASON_TAG)),
                ("MLflow run", link(info.run_id, run_url(self._context.tracking.uri, info.experiment_id, info.run_id))),
                ("parameters", values((key, short(value)) for key, value in info.params.items())),
                ("metrics", values((key, short(value)) for key, value in info.metrics.items())),
            ],
        )

    @property
    def run_id(self) -> str:
        """The id of the MLflow run."""
        return self._info.run_id

    @property
    def info(self) -> RunInfo:
        """The MLflow run as it was when a method of this handle asked for it last, with its tags."""
        return self._info

    async def get_status(self) -> RunStatus:
        """Return the status that the run has in MLflow now.

        Raises:
            MlfleetError: Tracking or the backend cannot be reached.
        """
        await self._look()
        return self._info.status

    async def wait(self) -> bool:
        """Wait until the run has ended and its status is written. Return True if it finished well."""
        return (await self.outcome()).status is RunStatus.FINISHED

    async def outcome(self) -> Outcome:
        """Wait like `wait`, and return the outcome of the run as MLflow has it: without exit code and output.

        Any number of tasks may wait. A cancelled call leaves the run as it is.

        Raises:
            UsageError: The run is a sweep with a name that no process drives any more.
            TrackingError: The run was deleted before its status was written, and no process here supervises it.
            MlfleetError: Tracking or the backend cannot be reached.
        """
        await self._let_end()
        if not self._info.status.is_terminal:
            text = f"the run {self.run_id} was deleted before its end was written: MLflow shows {self._info.status}"
            raise TrackingError(text, uri=self._context.tracking.uri, code="INVALID_STATE")
        return tracked_outcome(self._info)

    async def cancel(self, *, grace: float | None = None) -> None:
        """End the run. Return once nothing of it runs any more and its status is written (KILLED).

        The process that supervises the run, if it lives, sees a cancelled run. A run that has ended keeps its status.
        So does one that was deleted. For a sweep all of its runs are ended. A cancelled call raises when that is done.

        Args:
            grace: Seconds between the request to stop and the end by force; None: the grace that the run was submitted
                with.

        Raises:
            UsageError: The command of the run has not begun, and the process that prepares it cannot be asked to cancel
                it. Or the grace is negative or not a finite number.
            BackendError: The run is not where it should be, or its end was not confirmed.
            ExceptionGroup: The run is a sweep, and some of its runs could not be cancelled.
            MlfleetError: Tracking cannot be reached.
        """
        grace = check_seconds("grace", grace, or_none=True, is_finite=True)
        await complete(partial(self._cancel, grace))

    async def logs(
        self, *, follow: bool = True, tail: int | None = None, start: int = 0
    ) -> AsyncGenerator[LogLine, None]:
        """Read the lines of the run's output.

        Args:
            follow: Go on until the run has ended; False gives what there is now.
            tail: The largest number of lines from before this call: older ones are left out. None: no limit.
            start: The offset in bytes to begin at. `LogLine.end` of the last line that was read continues there, also
                with another handle in another process.

        Raises:
            UsageError: The output is not kept on this machine, or an argument is negative.
            MlfleetError: Tracking or the backend cannot be reached.
        """
        async with (
            self._output(follow=follow) as handle,
            aclosing(read_lines(handle, follow=follow, tail=tail, start=start)) as lines,
        ):
            async for line in lines:
                yield line

    # ---- looking ----------------------------------------------------------------------------------------------------

    async def _refresh(self) -> RunInfo:
        self._info = await self._context.tracking.get_run(self.run_id)
        return self._info

    async def _look(self) -> Driver:
        """Refresh the MLflow run, and write its status if its driver is gone and it is over.

        Returns:
            The state of the driver; UNSEEN if the run has ended.
        """
        info = await self._refresh()
        if info.status.is_terminal:
            return Driver.UNSEEN
        verdict = await judge(self._context, info, elsewhere=False)
        if verdict.is_left and not info.deleted:
            await conclude(self._context, info, verdict)
            await self._refresh()
        return verdict.driver

    async def _let_end(self) -> None:
        """Wait until the run is over, and conclude it if that is left to do."""
        while (verdict := await self._ended()) is not None:
            await conclude(self._context, self._info, verdict)

    async def _ended(self) -> Verdict | None:
        """Wait until the run is over.

        Returns:
            How the run has to be concluded here; None if its status is written, or cannot be since the run was deleted.
        """
        pause, watch, about_to_write = SHORTEST_PAUSE, _Watch(self._context), 0.0
        while True:
            record = await FILES.run(partial(_live_record, self.run_id))
            if record is not None and record.outcome is not None:
                about_to_write += pause
            if record is not None and about_to_write < min(DRIVER_PATIENCE, self._context.fleet.unseen_patience):
                longest = _PAUSE_HERE  # no requests as long as a process of this machine supervises the run
            elif (await self._refresh()).status.is_terminal or self._info.deleted:
                return None
            elif (verdict := await watch.look(self._info)) is not None:
                return verdict
            else:
                longest = LONGEST_PAUSE
            await anyio.sleep(pause)
            pause = min(pause * 1.5, longest)

    # ---- output -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _output(self, *, follow: bool) -> AsyncIterator[BackendRun | FileOutput]:
        """Return a handle to read the output from. Leaving the context writes the status if that is left to do."""
        info = await self._refresh()
        reference = read_reference(info) if JobRef.TAG in info.tags else None
        async with AsyncExitStack() as stack:
            handle = None
            if reference is not None and not info.status.is_terminal:
                handle = await self._attach(reference, stack, follow=follow)
            if handle is None:
                yield await self._kept_output(is_expected=follow and reference is not None)
                if not info.status.is_terminal:
                    await self._look()
                return
            yield handle
            if follow or (await handle.get_status()).is_terminal:
                outcome = await handle.outcome()
                # Not before: a reader may leave at any time, and its process must not count as the driver then.
                is_mine = await take_over(self._context, self.run_id)
                await self._settle(outcome, patience=0 if is_mine else DRIVER_PATIENCE)

    async def _kept_output(self, *, is_expected: bool) -> FileOutput:
        """Return the output that is kept in the folder of the run on this machine, or will be.

        Raises:
            UsageError: It is not kept there.
        """
        path = run_folder(self.run_id) / "output.log"
        record = await FILES.run(partial(find_record, self.run_id))
        if not is_expected and not (record is not None and record.captured) and not await FILES.run(path.exists):
            raise UsageError(
                f"the output of the run {self.run_id} is not kept on this machine ({path}). A run that `mlfleet run` "
                "prints keeps none; --log-output stores it with MLflow"
            )
        return _KeptOutput(path, self)

    async def _attach(self, reference: JobRef, stack: AsyncExitStack, *, follow: bool) -> BackendRun | None:
        """Return the backend's handle of a run elsewhere; None if its output is on this machine, or there is none yet.

        Args:
            reference: The reference of the run.
            stack: Holds the handle.
            follow: Wait for a run that is in the queue of its driver, or being prepared.
        """
        if (await self._context.fleet.backend(reference.backend)).runs_here:
            return None
        pause = SHORTEST_PAUSE
        while True:
            try:
                return await stack.enter_async_context(self._context.fleet.handles.use(reference))
            except RunLost:
                driver = await self._look()
                if self._info.status.is_terminal or (driver is Driver.LIVES and not follow):
                    return None
                if driver is not Driver.LIVES:
                    raise
            await anyio.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)

    async def _settle(self, outcome: Outcome, *, patience: float = DRIVER_PATIENCE) -> None:
        """Write the status of a run whose end was seen here, unless its own process does; backends forget ends."""
        context = self._context
        context.fleet.records.end(self.run_id, outcome)
        for _ in range(int(patience / SHORTEST_PAUSE)):
            if (await self._refresh()).status.is_terminal or self._info.deleted:
                return
            await anyio.sleep(SHORTEST_PAUSE)
        if self._info.deleted:
            return
        self._info = await write_end(context, self._info, outcome)

    # ---- cancelling -------------------------------------------------------------------------------------------------

    async def _cancel(self, grace: float | None) -> None:
        context, info = self._context, await self._refresh()
        if info.status.is_terminal:
            # Its own code has set the status and goes on, or another process is ending it.
            record = await FILES.run(partial(_live_record, self.run_id))
            if record is not None and record.outcome is None and await FILES.run(partial(ask_to_cancel, record, grace)):
                await self._ended()
            return
        verdict = await judge(context, info, elsewhere=False)
        if verdict.is_left:
            if not info.deleted:
                await conclude(context, info, verdict)
        elif JobRef.TAG not in info.tags and verdict.driver is Driver.GONE:
            await (await context.attach(self.run_id)).cancel(grace=grace)  # the processes that its driver has left
        elif (handle := await self._find_begun(verdict.driver, grace)) is None:
            pass
        elif JobRef.TAG in info.tags and (await handle.get_status()).is_terminal:
            await self._settle(await handle.outcome())
        else:
            await self._end(handle, grace)
        if verdict.driver is Driver.GONE:
            await FILES.run(partial(remove_record, self.run_id))  # those of named sweeps are left alone elsewhere
        await self._refresh()

    async def _find_begun(self, driver: Driver, grace: float | None) -> BackendRun | None:
        """Return the handle of what runs of the run; None if it was kept from beginning, and is KILLED.

        Raises:
            BackendError: The run is not where it should be.
            UsageError: Its command has not begun, and its driver cannot be asked to cancel it.
        """
        record = await FILES.run(partial(find_record, self.run_id)) if driver is Driver.LIVES else None
        try:
            if JobRef.TAG not in self._info.tags and record is not None:
                processes = await find_processes(self._context, record)
                if processes is not None:
                    return processes
            reference = read_reference(self._info)
            backend = await self._context.fleet.backend(reference.backend)
            if not await backend.withdraw(reference):
                return await backend.attach(reference)
            await self._write(RunStatus.KILLED)
            if record is not None:
                await FILES.run(partial(ask_to_cancel, record, grace))  # nor does it prepare the run any more
            return None
        except (RunLost, UsageError) as error:
            # It waits in the queue of its driver, is being prepared, or is known to its driver only.
            if record is None or not await FILES.run(partial(ask_to_cancel, record, grace)):
                if record is None or isinstance(error, UsageError):
                    raise
                raise UsageError(
                    f"the command of the run {self.run_id} has not begun: try again when it has, or end the process"
                    f" that prepares it ({record.driver.partition('-')[0]})"
                ) from None
        await self._let_end()
        return None

    async def _write(self, status: RunStatus) -> None:
        """Write a status, unless the run was deleted: MLflow refuses it then."""
        if not self._info.deleted:
            await self._context.tracking.update_run(self.run_id, status)

    async def _end(self, handle: BackendRun, grace: float | None) -> None:
        """Write KILLED first, so that the run's own process, if it lives, takes it for cancelled and not for failed.

        Raises:
            RunLost: The end of the run was not confirmed: it may still run.
        """
        before = self._info.status
        await self._write(RunStatus.KILLED)
        try:
            await handle.cancel(grace=grace)
            outcome = await handle.outcome()
            if isinstance(outcome.error, BackendError):
                raise outcome.error
        except MlfleetError:
            await self._write(before)
            raise
        if outcome.status is not RunStatus.KILLED and not self._info.deleted:
            # It had ended by itself, a moment before it was to be ended.
            if tags := failure_tags(outcome):
                await self._context.tracking.log(self.run_id, tags=tags)
            await self._write(outcome.status)


async def tracked_output(run: TrackedRun, *, follow: bool, tail: int | None = None) -> AsyncGenerator[bytes, None]:
    """Yield the output of a run byte for byte; see `TrackedRun.logs`."""
    async with run._output(follow=follow) as handle:
        start = await find_start(handle, tail=tail, start=0)
        async with aclosing(read_bytes(handle, follow=follow, start=start)) as chunks:
            async for data in chunks:
                yield data


class _KeptOutput(FileOutput):
    """The output of a run in its folder on this machine."""

    def __init__(self, path: Path, run: TrackedRun) -> None:
        self.path = path
        self._run = run

    def _output_file(self) -> Path | None:
        return self.path

    async def _output_ended(self) -> object:
        return await self._run._ended()


def _live_record(run_id: str) -> RunRecord | None:
    """Return the record of a run whose supervising process lives on this machine, else None. Blocking."""
    record, lives = look_up(run_id)
    return record if lives else None


class _Watch:
    """Looks again and again at one run that has no terminal status, to see when it has to be concluded here."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._seen = 0
        self._since: float | None = None
        self._next = 0.0

    async def look(self, info: RunInfo) -> Verdict | None:
        """Return how to conclude the run if it is over and nobody else writes its status, else None."""
        now = anyio.current_time()
        if now < self._next:
            return None
        verdict = await judge(self._context, info)
        if verdict.driver is not Driver.GONE:
            self._next = now + _PAUSE_ELSEWHERE if verdict.driver is Driver.UNSEEN else now
            is_left, looks, patience = verdict.ended, 1, self._context.fleet.unseen_patience
        else:
            # Look twice: a process that has reattached to the run may be about to write its status. One that has
            # removed its container after the end gets more time.
            is_left, looks, patience = verdict.is_left, 2, 2 * DRIVER_PATIENCE if verdict.is_missing else 0.0
        self._seen = self._seen + 1 if is_left else 0
        self._since = None if self._seen == 0 else now if self._since is None else self._since
        is_due = self._since is not None and self._seen >= looks and now - self._since >= patience
        return verdict if is_due else None
