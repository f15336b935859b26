"""The handle of a run in Databricks, whose task copies the output, cancels the run and waits for its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from mlfleet._concurrency.threads import FILES
from mlfleet._run_log import get_logger
from mlfleet.backends._remote.run import SupervisedRun, tasks_beside
from mlfleet.backends.databricks.client import Workspace, WorkspaceError
from mlfleet.backends.databricks.output import Ending, OutputCopy
from mlfleet.backends.databricks.records import remove_record
from mlfleet.backends.databricks.reference import output_folder, secret_of
from mlfleet.backends.databricks.secret_scopes import remove_secret
from mlfleet.backends.databricks.states import Phase, State
from mlfleet.backends.databricks.storage import Storage
from mlfleet.backends.databricks.watch import Poller
from mlfleet.errors import BackendError, MlfleetError, RunLost
from mlfleet.runs import FailureKind, JobRef, Outcome, RunStatus

__all__ = ["DatabricksRun"]

_log = get_logger("mlfleet.databricks")
_FIRST_PAUSE, _LAST_PAUSE = 0.25, 3.0  # seconds between checks for new output while it is followed
_POLL_SOON_INTERVAL = 20.0  # seconds between requests to poll a cancelled run often
_LINES = 20
_CUT = b"(mlfleet: the beginning is missing, Databricks keeps the last 5 MB)\n"


class DatabricksRun(SupervisedRun):
    """The handle of a run. Databricks ends it on `cancel`, with the grace that the job was submitted with.

    Args:
        ref: The reference to the run.
        number: The run's id in Databricks.
        workspace: The client of its workspace.
        storage: The storage of its output.
        poller: The poller of the workspace's runs.
        output: The file to copy its output to; None: the output of this process.
        tags: Tags for the MLflow run.
        submitted: True if this process submitted the run: then it does not outlive its backend.
        state: The state that is known before the first poll; None if none is.
    """

    backend = "databricks"
    noun = "run"

    def __init__(
        self,
        ref: JobRef,
        number: str,
        workspace: Workspace,
        storage: Storage,
        poller: Poller,
        *,
        output: Path | None,
        tags: Mapping[str, str],
        submitted: bool,
        state: State | None,
    ) -> None:
        ended_as = state.status if state is not None and not submitted else None
        super().__init__(ref.run_id, output, submitted=submitted, ended_as=ended_as)
        self._number = number
        self._tags = tags
        self._secret = secret_of(ref)
        self._workspace = workspace
        self._poller = poller
        self._state = poller.track(number)
        if state is not None:
            self._state.put(state)
        folder = output_folder(ref)
        self._copy = OutputCopy(lambda name: storage.read(f"{folder}/{name}"), output)
        self._cancelling = anyio.Event()
        self._followed = anyio.Event()

    # ---- the handle -------------------------------------------------------------------------------------------------

    @property
    def tags(self) -> Mapping[str, str]:
        """Tags for the MLflow run with the run's page in Databricks."""
        return self._tags

    async def started(self) -> None:
        """Wait until the run runs or has ended."""
        try:
            await self._state.until(lambda state: state.phase is not Phase.WAITING)
        except MlfleetError:
            return  # the outcome has the error

    def _begin_stop(self, grace: float | None) -> None:
        self._cancelling.set()

    async def _active_status(self) -> RunStatus:
        state = self._state.value
        return RunStatus.SCHEDULED if state is None or state.phase is Phase.WAITING else RunStatus.RUNNING

    async def _output_ended(self) -> object:
        self._followed.set()  # its output is copied only if somebody reads it
        return await super()._output_ended()

    async def _catch_up(self) -> None:
        if self._outcome is None and self._output is not None:
            await self._copy.copy_new_parts()

    # ---- its task ---------------------------------------------------------------------------------------------------

    async def _tidy(self) -> None:
        if self._secret is not None and not self._detached:
            await remove_secret(self._workspace, *self._secret)
        if self._state.value is not None and self._state.value.is_terminal and not self._detached:
            await FILES.run(partial(remove_record, self.run_id))
        self._poller.untrack(self._number)

    async def _live(self) -> Outcome:
        async with tasks_beside(self._copy_while_followed, self._cancel_when_asked):
            state = await self._state.until(lambda state: state.is_terminal)
        if state.phase is Phase.LOST:
            text = f"Databricks does not know the run {self._number} (of the MLflow run {self.run_id}) any more"
            raise RunLost(text, backend="databricks")
        return await self._conclude(state)

    async def _copy_while_followed(self) -> None:
        if self._output is not None:
            await self._followed.wait()
        pause = _FIRST_PAUSE
        while True:
            try:
                pause = _FIRST_PAUSE if await self._copy.copy_new_parts() else min(pause * 1.2, _LAST_PAUSE)
            except WorkspaceError as error:
                _log.warning("the output of the run %s cannot be followed now: %s", self.run_id, error)
            await anyio.sleep(pause)

    async def _cancel_when_asked(self) -> None:
        """Wait for a request to cancel, cancel the run, and have it polled often until its end cancels this task."""
        await self._cancelling.wait()
        try:
            await self._workspace.call("POST", f"{self._workspace.runs}/cancel", body={"run_id": int(self._number)})
        except WorkspaceError as error:
            # These mean that the run has ended or is gone, which the next poll shows.
            if not error.missing and error.code not in ("INVALID_STATE", "INVALID_PARAMETER_VALUE"):
                text = f"the run {self._number} could not be cancelled, and may still run in Databricks: {error}"
                raise BackendError(text, backend="databricks") from error
        while True:
            self._poller.poll_soon(self._number)
            await anyio.sleep(_POLL_SOON_INTERVAL)

    # ---- how it ended -----------------------------------------------------------------------------------------------

    async def _conclude(self, state: State) -> Outcome:
        ending = await self._finish_copy()
        page: dict[str, Any] = {}
        if state.status is not RunStatus.FINISHED or ending is None or ending.parts is None:
            page = await self._fetch_page(state)
        if self._copy.empty and page.get("logs"):
            if page.get("logs_truncated"):
                _log.warning(
                    "the beginning of the output of the run %s is missing: Databricks keeps the last 5 MB of it; %s",
                    self.run_id,
                    state.page_url,
                )
                await self._copy.append(_CUT)
            await self._copy.append(str(page["logs"]).encode())
        outcome = self._make_outcome(state, ending, page)
        if outcome.status is RunStatus.FINISHED:
            return outcome
        return replace(outcome, output=_with_trace(await self._last_lines(), page))

    async def _finish_copy(self) -> Ending | None:
        try:
            return await self._copy.finish()
        except WorkspaceError as error:
            _log.warning("the output of the run %s cannot be copied: %s", self.run_id, error)
            return None

    async def _fetch_page(self, state: State) -> dict[str, Any]:
        """Return what the run's page in Databricks shows: error, trace and the last 5 MB of the task's output."""
        params = {"run_id": str(state.task_run_id or self._number)}
        try:
            return await self._workspace.call("GET", f"{self._workspace.runs}/get-output", params=params)
        except WorkspaceError as error:
            _log.info("Databricks has no output of the run %s: %s", self.run_id, error)
            return {}

    def _make_outcome(self, state: State, ending: Ending | None, page: Mapping[str, Any]) -> Outcome:
        code = ending.exit_code if ending is not None else None
        if state.status is RunStatus.FINISHED:
            return Outcome(RunStatus.FINISHED, 0 if code is None else code)
        failed_itself = ending is not None and not ending.stopped and state.status is RunStatus.FAILED
        if self._cancelling.is_set() and not failed_itself and self._ended_as is None:
            return Outcome(RunStatus.KILLED, code, "cancelled")
        if state.status is RunStatus.KILLED:
            return Outcome(RunStatus.KILLED, code, f"cancelled in Databricks ({state.reason})")
        if code and state.cause is not FailureKind.TIMEOUT:
            return Outcome(RunStatus.FAILED, code, f"exit code {code}")
        error = " ".join(str(page.get("error") or "").split())
        reason = f"{state.reason}: {error}" if error and error not in (state.reason or "") else state.reason
        return Outcome(RunStatus.FAILED, code, reason or "failed in Databricks", cause=state.cause)


def _with_trace(lines: tuple[str, ...], page: Mapping[str, Any]) -> tuple[str, ...]:
    """Append the traceback that Databricks shows, unless the output ends with it already."""
    trace = tuple(str(page.get("error_trace") or "").splitlines())
    if not trace or (lines and trace[-1].strip() == lines[-1].strip()):
        return lines
    return (*lines, *trace)[-_LINES:]
