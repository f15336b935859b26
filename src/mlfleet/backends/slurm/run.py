"""The handle of a run in Slurm, whose task follows the job, ends it on request and reads how it ended."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet._run_log import get_logger
from mlfleet._text.lines import last_lines
from mlfleet.backends._remote.output import pass_on
from mlfleet.backends._remote.run import SupervisedRun, tasks_beside
from mlfleet.backends.slurm.client import SlurmClient, SlurmError
from mlfleet.backends.slurm.config import SlurmConfig
from mlfleet.backends.slurm.run_files import RunFiles
from mlfleet.backends.slurm.states import ExitRecord, JobState, conclude
from mlfleet.backends.slurm.watch import Poller
from mlfleet.errors import BackendError, MlfleetError
from mlfleet.runs import FailureKind, Outcome, RunStatus

__all__ = ["SlurmRun"]

_log = get_logger("mlfleet.slurm")
_LOOK = 0.5  # seconds between two looks for a file that another machine has written
_COPY_PAUSE = 0.5  # seconds between two looks for new output that goes to the output of this process
_CHUNK = 2**20


class SlurmRun(SupervisedRun):
    """The handle of a run.

    Args:
        files: The files of the run.
        config: The configuration of the run, or as much of it as its reference holds.
        job: The id of the job.
        client: The client of the cluster.
        poller: The poller of the cluster's jobs.
        output: The file to copy the output to at the end; None: it goes to the stdout of this process as it comes.
        submitted: True if this process submitted the run: then it does not outlive its backend.
        grace: Seconds between the request to stop and the end by force.
    """

    backend = "slurm"
    noun = "job"

    def __init__(
        self,
        files: RunFiles,
        config: SlurmConfig,
        job: str,
        client: SlurmClient,
        poller: Poller,
        *,
        output: Path | None,
        submitted: bool,
        grace: float,
    ) -> None:
        super().__init__(files.run_id, files.output, submitted=submitted, grace=grace)
        self.job = job
        self._files = files
        self._client = client
        self._poller = poller
        self._config = config
        self._target = output
        self._never: Outcome | None = None  # the outcome of a job that was ended since it can never start
        self._state = poller.track(job)
        self._copied = 0

    # ---- the handle -------------------------------------------------------------------------------------------------

    async def started(self) -> None:
        """Wait until the job runs or has ended."""
        try:
            await self._state.until(lambda state: not state.is_waiting)
        except MlfleetError:
            return  # the outcome has the error

    async def _active_status(self) -> RunStatus:
        """Return the status of the latest poll, and RUNNING if the command has begun since."""
        return RunStatus.RUNNING if await self._is_running() else RunStatus.SCHEDULED

    async def _is_running(self) -> bool:
        """Return True if the job runs by the latest poll, or has begun since."""
        state = self._state.value
        if state is not None and not state.is_waiting:
            return True
        restarts = 0 if state is None else state.restarts
        return await FILES.run(partial(self._files.claimed_by, restarts=restarts)) is not None

    # ---- its task ---------------------------------------------------------------------------------------------------

    async def _live(self) -> Outcome:
        async with tasks_beside(self._cancel_when_asked, self._end_what_never_starts) as group:
            if self._target is None:
                group.start_soon(self._copy_as_it_comes)
            state = await self._follow()
        record = await self._read_exit(state)
        claimed, lines = True, tuple[str, ...]()
        if record != ExitRecord(0, asked=False) or state.word != "COMPLETED":
            claimed, lines = await FILES.run(partial(self._read_rest, with_messages=record is None))
        outcome = conclude(state, record, cancelled=self._stop_request.is_requested, claimed=claimed, output=lines)
        if self._never is not None and not claimed and not self._stop_request.is_requested:
            return self._never
        return outcome

    async def _follow(self) -> JobState:
        """Return the last state of the job that runs the command.

        A submit whose answer was lost may have been repeated, and then the first job may be the one that has begun.
        """
        while True:
            state = await self._state.until(lambda state: state.is_over)
            claimed = await FILES.run(self._files.claimed_by)
            if claimed is None or claimed == self.job:
                return state
            before, self.job = self.job, claimed
            self._state = self._poller.track(claimed)
            self._poller.untrack(before)

    async def _read_exit(self, state: JobState) -> ExitRecord | None:
        """Return the record of the command's end; wait for it as long as the shared file system may need."""
        deadline = time.monotonic() + self._config.latency
        while True:
            record = await FILES.run(self._files.exit_record)
            # Of other ends Slurm gives the reason itself, also of a job that never began.
            expected = state.is_gone or state.word in ("COMPLETED", "FAILED")
            if record is not None or not expected or time.monotonic() > deadline:
                return record
            if state.is_launch_failure and await FILES.run(self._files.claimed_by) is None:
                return None
            await anyio.sleep(min(_LOOK, self._config.latency))

    def _read_rest(self, *, with_messages: bool) -> tuple[bool, tuple[str, ...]]:
        """Return True if the command has begun, and the last lines of the output and of Slurm's messages. Blocking."""
        lines = last_lines(self._files.output)
        if with_messages:
            lines += last_lines(self._files.messages)
        return self._files.claimed_by() is not None, lines

    async def _cancel_when_asked(self) -> None:
        """Wait for a request to stop, and end the job as often as its grace is shortened."""
        await self._stop_request.requested()
        while True:
            grace = self._stop_request.remaining or 0.0
            claimed = await FILES.run(partial(self._prepare_stop, grace))
            is_long = grace > self._client.longest_grace and await self._is_running()
            try:
                # Slurm itself sends SIGKILL after KillWait. With a longer grace only the batch script gets SIGTERM.
                await self._client.cancel(self.job, claimed or self.job, only_script=is_long)
            except SlurmError as error:
                text = f"the job {self.job} could not be cancelled, and may still run: {error}"
                raise BackendError(text, backend="slurm") from error
            self._poller.poll_soon(self.job)
            if is_long:
                with anyio.move_on_after(grace):
                    await self._stop_request.changed()
            else:
                await self._stop_request.changed()

    def _prepare_stop(self, grace: float) -> str | None:
        """Set the grace, keep further jobs from beginning, and return the job that has begun. Blocking."""
        try:
            self._files.write_grace(grace)
            self._files.withdraw()
        except OSError as error:
            _log.warning("the job %s is cancelled with an earlier grace: %s", self.job, error)
        return self._files.claimed_by()

    async def _end_what_never_starts(self) -> None:
        """Cancel a job that waits for something that does not come by itself."""
        while True:
            state = await self._state.until(lambda state: state.never_starts or state.failed_to_launch)
            limit = 0.0 if state.failed_to_launch else self._config.start_timeout
            if limit is None:
                return
            with anyio.move_on_after(limit) as waiting:
                await self._state.until(lambda state: not (state.never_starts or state.failed_to_launch))
            if not waiting.cancelled_caught:
                continue
            if state.failed_to_launch:
                text, kind = f"Slurm could not start the job on its node ({state.reason})", FailureKind.INFRASTRUCTURE
            else:
                text = (
                    f"the job can never start: Slurm gives the reason {state.reason}. Change the options of sbatch in"
                )
                text, kind = f"{text} backend_config", FailureKind.FAILURE
            self._never = Outcome(RunStatus.FAILED, None, text, cause=kind)
            await self._client.cancel(self.job)
            self._poller.poll_soon(self.job)
            return

    async def _copy_as_it_comes(self) -> None:
        while True:
            await self._copy()
            await anyio.sleep(_COPY_PAUSE)

    async def _copy(self) -> None:
        """Copy new output to the stdout of this process."""

        def copy() -> None:
            # In the thread: the result of a cancelled call is lost.
            with suppress(OSError), self._files.output.open("rb") as file:
                file.seek(self._copied)
                while data := file.read(_CHUNK):
                    self._copied += len(data)
                    pass_on(data)

        await FILES.run(copy)

    async def _abandon(self) -> None:
        """End the job, after an error because of which it is not watched any more."""
        try:
            await self._client.cancel(self.job)
        except SlurmError as error:
            _log.warning("the job %s of the run %s may still run: %s", self.job, self.run_id, error)

    async def _tidy(self) -> None:
        if not self._detached:
            try:
                if self._target is None:
                    await self._copy()
                await FILES.run(partial(self._files.finish, self._target, keep=self._config.keep))
            except OSError as error:
                _log.warning("files of the run %s stay in %s: %s", self.run_id, self._files.folder, error)
        self._poller.untrack(self.job)
