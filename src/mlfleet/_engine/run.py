"""The handle of a run of a Fleet."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from mlfleet._engine.supervisor import Supervisor
from mlfleet._text.lines import LogLine
from mlfleet._text.plain import duration_text, short
from mlfleet.backends._output import read_bytes, read_lines
from mlfleet.errors import RunCancelled, UsageError
from mlfleet.runs import Outcome, RunStatus, Stage, check_seconds, failure
from mlfleet.tracking.base import RunInfo

__all__ = ["FleetRun", "run_output"]


class FleetRun:
    """The handle of a run of a `Fleet`. It satisfies `SubmittedRun`."""

    __slots__ = ("_supervisor",)

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def __repr__(self) -> str:
        supervisor = self._supervisor
        state = supervisor.outcome.status if supervisor.outcome else supervisor.stage
        return f"<FleetRun {supervisor.info.run_id if supervisor.info else '(not created)'} {state}>"

    def _repr_html_(self) -> str:
        from mlfleet._text.html import link, run_block, values

        supervisor, info, outcome, times = self._supervisor, self._supervisor.info, self._supervisor.outcome, self.times
        began, ended = times.get(Stage.STARTED), times.get(Stage.FINISHED, time.time())
        return run_block(
            info.name if info else self.project_name,
            outcome.status if outcome else self.stage,
            [
                ("reason", outcome.reason if outcome else None),
                ("MLflow run", link(info.run_id, supervisor.url) if info else None),
                ("project", f"{self.project_name} ({supervisor.description.entry_point}) on {self.backend}"),
                ("parameters", values((key, short(value)) for key, value in self.parameters.items())),
                ("metrics", values((key, short(value)) for key, value in self.metrics.items())),
                ("time", None if began is None else duration_text(ended - began)),
            ],
        )

    @property
    def run_id(self) -> str:
        """The id of the MLflow run."""
        return self._supervisor.run_id

    @property
    def info(self) -> RunInfo:
        """The MLflow run as it was created, with its ids, its name and the place of its artifacts."""
        info = self._supervisor.info
        if info is None:
            raise UsageError("this run has no MLflow run: it was cancelled before there was one")
        return info

    @property
    def project_name(self) -> str:
        """The name of the project. For a run that was attached to it is the project's URI."""
        return self._supervisor.description.project_name

    @property
    def backend(self) -> str:
        """The name of the backend."""
        return self._supervisor.description.backend

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters as they were given; empty for a run that was attached to."""
        return self._supervisor.description.parameters

    @property
    def index(self) -> int | None:
        """The number of the run's point in its sweep, counted from 0; None if it does not belong to a sweep."""
        member = self._supervisor.description.member
        return None if member is None else member.index

    @property
    def stage(self) -> Stage:
        """The present stage of the run."""
        return self._supervisor.stage

    @property
    def times(self) -> Mapping[Stage, float]:
        """The times at which the run came to its stages, in seconds since the epoch."""
        return self._supervisor.times

    @property
    def metrics(self) -> Mapping[str, float]:
        """The latest value of each metric that the run had logged when it ended; empty before."""
        return self._supervisor.metrics

    @property
    def output_path(self) -> Path | None:
        """The file with the run's output; None if the output is inherited, or kept elsewhere by the backend."""
        return self._supervisor.output_path

    async def wait(self) -> bool:
        """Wait until the run has ended and its status is written. Return True if it finished well.

        Any number of tasks may wait. Cancelling one of them does not affect the run.
        """
        return (await self.outcome()).status is RunStatus.FINISHED

    async def outcome(self) -> Outcome:
        """Wait like `wait`, and return the outcome of the run."""
        await self._supervisor.done.wait()
        if self._supervisor.outcome is None:
            raise UsageError(
                f"the run {self.run_id} is detached and goes on, but the Fleet of this handle is closed: "
                f"await mlfleet.attach({self.run_id!r}), or run mlfleet wait {self.run_id}"
            )
        return self._supervisor.outcome

    async def check(self) -> None:
        """Wait like `wait`, and raise an error if the run did not finish well.

        Raises:
            RunCancelled: The run was cancelled.
            RunTimeout: One of its time limits was exceeded.
            ExecutionException: The run failed.
        """
        outcome = await self.outcome()
        if outcome.status is not RunStatus.FINISHED:
            raise failure(self.info.name, self.run_id, outcome, self.output_path)

    async def cancel(self, *, grace: float | None = None) -> None:
        """End the run. Return once all of its processes have ended and its status is written (KILLED).

        A run that has ended already keeps its status. Any number of tasks may call this, also at the same time. A
        cancelled call has requested the end all the same.

        Args:
            grace: Seconds between the request to stop and the end by force, 0 kills at once; None: as the timeouts of
                the run say. Of several calls the shortest grace counts.

        Raises:
            UsageError: The grace is negative or not a finite number. The run goes on.
        """
        grace = check_seconds("grace", grace, or_none=True, is_finite=True)
        await self._supervisor.cancel(grace)

    async def get_status(self) -> RunStatus:
        """Return SCHEDULED before the command runs, RUNNING while it does, then the terminal status."""
        supervisor = self._supervisor
        if supervisor.done.is_set():
            return (await self.outcome()).status
        if supervisor.handle is None:
            return RunStatus.SCHEDULED
        status = await supervisor.handle.get_status()
        # A run that has ended at its backend has not ended before its status is written to MLflow.
        return RunStatus.RUNNING if status.is_terminal else status

    async def logs(
        self, *, follow: bool = True, tail: int | None = None, start: int = 0
    ) -> AsyncGenerator[LogLine, None]:
        """Read the lines of the run's output.

        Args:
            follow: Go on until the run has ended and its status is written; False gives what there is now.
            tail: The largest number of lines from before this call: older ones are left out. None: no limit.
            start: The offset in bytes to begin at. `LogLine.end` of the last line that was read continues there.

        Raises:
            UsageError: The output is not captured, or an argument is negative.
        """
        supervisor = self._supervisor
        if supervisor.description.output == "inherit":
            raise UsageError("the output of this run is not captured: submit it with output='capture' to read its logs")
        if follow:
            await supervisor.started.wait()
        if supervisor.handle is not None:
            async with aclosing(read_lines(supervisor.handle, follow=follow, tail=tail, start=start)) as lines:
                async for line in lines:
                    yield line
        if follow:
            # A reader that has come to the end may ask for the status at once.
            await supervisor.done.wait()

    async def created(self) -> None:
        """Wait until the MLflow run exists.

        Raises:
            RunCancelled: The run was cancelled before its MLflow run was created.
            MlfleetError: The MLflow run could not be created.
        """
        supervisor = self._supervisor
        await supervisor.created.wait()
        if supervisor.creation_error is not None:
            raise supervisor.creation_error
        if supervisor.info is None:
            raise RunCancelled("the run was cancelled before its MLflow run was created")


async def run_output(run: FleetRun) -> AsyncGenerator[bytes, None]:
    """Yield the captured output of a run byte for byte, until the run has ended."""
    supervisor = run._supervisor
    await supervisor.started.wait()
    if supervisor.handle is not None:
        async for data in read_bytes(supervisor.handle, follow=True):
            yield data
