"""Runs on this machine: each is a process of ``bash -c``."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import anyio

from mlfleet.backends.base import Backend, Job
from mlfleet.concurrency.lines import follow_file, last_lines
from mlfleet.concurrency.process import Process, start_process
from mlfleet.concurrency.threads import Threads
from mlfleet.errors import SubmitError
from mlfleet.runs import Outcome, RunStatus

__all__ = ["LocalBackend"]

_files = Threads("local output", 4)


class LocalBackend(Backend):
    """Runs jobs as processes on this machine, each in a session of its own, so that Ctrl-C reaches only this process.

    Leaving the backend ends what still runs.
    """

    name: ClassVar[str] = "local"
    needs_environment: ClassVar[bool] = True

    def __init__(self) -> None:
        self._runs: set[_LocalRun] = set()
        self._open = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        async with anyio.create_task_group() as group:
            for run in tuple(self._runs):
                group.start_soon(run.cancel)

    async def submit(self, job: Job) -> _LocalRun:
        """Start the job's command with ``bash -c`` in the project's folder.

        Raises:
            SubmitError: there is no bash, no such folder, the output cannot be written, or the system has no room.
        """
        environ, output = await _files(partial(_prepare, job), undo=_discard)
        try:
            process = await start_process(("bash", "-c", job.command), cwd=job.project_dir, env=environ, output=output)
        except (OSError, ValueError) as error:
            raise SubmitError(_refusal(job, error), backend=self.name) from error
        finally:
            if output is not None:
                os.close(output)
        run = _LocalRun(job, process)
        if not self._open:
            await process.stop(0)
            raise SubmitError(f"the backend {self.name!r} was closed before the run could start", backend=self.name)
        self._runs.add(run)
        process.add_done_callback(partial(self._runs.discard, run))
        return run


class _LocalRun:
    """The handle of a process."""

    __slots__ = ("_grace", "_outcomes", "_output", "_process", "_run_id")

    def __init__(self, job: Job, process: Process) -> None:
        # Not the job itself: hundreds of handles would keep its environment and secrets.
        self._run_id = job.run_id
        self._output = job.output
        self._grace = job.cancel_grace
        self._process = process
        self._outcomes: list[Outcome] = []

    @property
    def run_id(self) -> str:
        return self._run_id

    async def started(self) -> None:
        """A process runs as soon as it is there."""

    async def wait(self) -> bool:
        return (await self.outcome()).status is RunStatus.FINISHED

    async def outcome(self) -> Outcome:
        code = await self._process.wait()
        if not self._outcomes:
            output = self._output
            status = self._status(code)
            lines: tuple[str, ...] = ()
            if output is not None and status is not RunStatus.FINISHED:
                lines = await _files(partial(last_lines, output))
            # What the run left behind may still write: all waiters get what the first one saw.
            self._outcomes.append(Outcome(status, code, self._reason(code), lines))
        return self._outcomes[0]

    async def cancel(self, *, grace: float | None = None) -> None:
        await self._process.stop(self._grace if grace is None else grace)

    async def get_status(self) -> RunStatus:
        code = self._process.returncode
        return RunStatus.RUNNING if code is None else self._status(code)

    async def logs(self, *, follow: bool = True) -> AsyncIterator[str]:
        if self._output is None:
            return
        async for line in follow_file(self._output, self._process.wait if follow else None):
            yield line

    def _status(self, code: int) -> RunStatus:
        if self._process.stopped:
            return RunStatus.KILLED
        return RunStatus.FINISHED if code == 0 else RunStatus.FAILED

    def _reason(self, code: int) -> str | None:
        if self._process.stopped:
            return "cancelled"
        if code == 0:
            return None
        return f"exit code {code}" if code > 0 else f"killed by signal {_signal_name(-code)}"


def _prepare(job: Job) -> tuple[dict[str, str], int | None]:
    """The variables of the command, and the file descriptor of its output. Blocking."""
    # Another thread may change os.environ meanwhile, so a plain copy could fail.
    environ = {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}
    environ |= {**job.environ, **job.secrets}
    if job.environment is not None:
        environ = job.environment.apply(environ)
    return environ, None if job.output is None else _open_output(job.output)


def _open_output(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Append, so that a child which opens it anew (/dev/stdout) does not write over what is there.
        output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        # Held as long as anybody can write there: `prune_runs` leaves it alone.
        fcntl.flock(output, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return output
    except OSError as error:
        raise SubmitError(
            f"the output of the run cannot be written to {path}: {error.strerror}", backend=LocalBackend.name
        ) from error


async def _discard(prepared: tuple[dict[str, str], int | None]) -> None:
    if prepared[1] is not None:
        os.close(prepared[1])


def _refusal(job: Job, error: OSError | ValueError) -> str:
    """Why the command could not be started; of the command's variables, only names may be told."""
    if isinstance(error, OSError):
        if error.filename == "bash":
            return f"bash cannot be run: {error.strerror}. Install it, or set PATH so that it is found"
        if error.filename == str(job.project_dir):
            return f"the folder of the project, {job.project_dir}, cannot be entered: {error.strerror}"
        return f"the command cannot be started: {error.strerror}"
    for variables in (job.environ, job.secrets):
        for name, value in variables.items():
            if "\0" in name or "\0" in value or "=" in name or not name:
                return f"the environment variable {name!r} cannot be set: no variable may have such a name or value"
    return "the command has a NUL character in it"


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return str(number)
    return f"{name} (the machine may have run out of memory)" if number == signal.SIGKILL else name
