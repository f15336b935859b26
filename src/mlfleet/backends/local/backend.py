"""The backend for runs on this machine: each is a process of ``bash -c``."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.threads import FILES
from mlfleet._paths import run_folder as folder_of
from mlfleet._process.guardian import MARKER_VARIABLE, RUN_VARIABLE
from mlfleet._process.marked import end_marked, find_marked
from mlfleet._process.process import Command, Process, start
from mlfleet._process.reattach import ReattachedProcess
from mlfleet._text.lines import last_lines
from mlfleet.backends._output import FileOutput
from mlfleet.backends.base import DRIVER_DIED, Backend, BackendRun, Job, ListedRun, Presence
from mlfleet.backends.local import run_folder
from mlfleet.errors import BackendError, RunLost, SubmitError
from mlfleet.runs import DEFAULT_CANCEL_GRACE, JobRef, Outcome, RunStatus

__all__ = ["LocalBackend"]

_LEFT_POLL = 0.2  # seconds between two looks at the processes that a driver has left
_START_TIMEOUT, _START_POLL = 5.0, 0.05  # seconds that a run to attach to may take to begin, and between two looks


class LocalBackend(Backend[None]):
    """A backend that runs jobs as processes on this machine.

    Each leads a session of its own, so that Ctrl-C reaches only this process. Leaving the backend ends active runs, and
    so does the end of this process, whatever kind of end: only durable runs outlive it.
    """

    name: ClassVar[str] = "local"
    needs_environment: ClassVar[bool] = True
    runs_here: ClassVar[bool] = True
    hides_environment: ClassVar[bool] = True
    docker_backend: ClassVar[str | None] = "docker"

    def __init__(self) -> None:
        self._runs: set[_LocalRun] = set()
        self._open = True
        self._here: Mapping[str, object] = {}

    async def __aenter__(self) -> Self:
        self._here = await FILES.run(run_folder.this_process)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        await complete(self._cancel_all)

    async def _cancel_all(self) -> None:
        async with anyio.create_task_group() as group:
            for run in tuple(self._runs):
                group.start_soon(run.cancel)

    async def submit(self, job: Job) -> _LocalRun:
        """Start the job's command with ``bash -c`` in the project's folder.

        Raises:
            SubmitError: There is no bash or no such folder, the output cannot be written, or the system has no room.
        """
        try:
            process = await start(partial(_command, job))
        except (OSError, ValueError) as error:
            raise SubmitError(_refusal(job, error), backend=self.name) from error
        # The handle does not keep the job: hundreds of them would keep its environment and secrets in memory.
        conclude = partial(run_folder.conclude, folder_of(job.run_id)) if job.durable else None
        run = _LocalRun(job.run_id, job.output, job.cancel_grace, process, conclude)
        if not self._open:
            await process.stop(0)
            raise SubmitError(f"the backend {self.name!r} was closed before the run could start", backend=self.name)
        self._keep(run, process)
        return run

    def reference(self, job: Job) -> JobRef | None:
        """Return the folder of a durable job, or None: other jobs end with this process."""
        return run_folder.reference(job, self._here)

    async def attach(self, ref: JobRef) -> BackendRun:
        """Return the handle of a durable run. From now on leaving this backend ends it, too.

        Raises:
            RunLost: It was killed, or never started.
            BackendError: It was not durable, or has not been started yet.
        """
        if "folder" not in ref.data:
            return await super().attach(ref)
        found = await self._find(ref)
        output, grace = run_folder.output_file(ref), _grace(ref)
        if isinstance(found, run_folder.Ended):
            return _LocalRun(ref.run_id, output, grace, _Ended(), lambda: found.code)
        process = ReattachedProcess(found.identity, found.pidfd, _title(ref.run_id), grace)
        run = _LocalRun(ref.run_id, output, grace, process, partial(run_folder.conclude, folder_of(ref.run_id)))
        self._keep(run, process)
        return run

    def detach(self, run: BackendRun) -> None:
        """Let a durable run go on when this backend is left."""
        if isinstance(run, _LocalRun):
            self._runs.discard(run)

    async def list_runs(self) -> Sequence[ListedRun]:
        """Return the runs of this machine that outlive the process that started them: detached, or of named sweeps."""
        return await FILES.run(run_folder.list_runs)

    async def is_abandoned(self, ref: JobRef) -> bool:
        """Return True if a run of this machine is over and the process that started it is gone."""
        return await FILES.run(partial(run_folder.is_abandoned, ref))

    async def presence(self, ref: JobRef) -> Presence | None:
        """Return the state of a durable run; None if it is on another machine."""
        return await FILES.run(partial(run_folder.presence, ref)) if "folder" in ref.data else None

    async def find_left(self, run_id: str, *, grace: float) -> BackendRun:
        """Return the handle of the processes of a run of another driver, found by the run's variable.

        If that driver has died, its guardian is about to end them.

        Raises:
            RunLost: None is left.
        """
        if not await find_marked(run_id):
            raise RunLost(DRIVER_DIED, backend=self.name)
        return _LeftRun(run_id, grace)

    async def withdraw(self, ref: JobRef) -> bool:
        """Claim a run that its shell has not claimed yet, so that it never begins.

        Raises:
            BackendError: The run is on another machine.
        """
        return await FILES.run(partial(run_folder.withdraw, ref)) if "folder" in ref.data else False

    async def _find(self, ref: JobRef) -> run_folder.Living | run_folder.Ended:
        """Look for a run, and wait up to 5 s for one that is just being started."""
        waited = 0.0
        while True:
            found = await FILES.run(partial(run_folder.find, ref, give_up=waited >= _START_TIMEOUT), undo=_close_found)
            if found is not None:
                return found
            if waited >= _START_TIMEOUT:
                text = f"the run {ref.run_id} has not been started yet by the process {ref.data['driver']}, which lives"
                raise BackendError(f"{text}: try again when it runs", backend=self.name)
            await anyio.sleep(_START_POLL)
            waited += _START_POLL

    def _keep(self, run: _LocalRun, process: Process) -> None:
        self._runs.add(run)
        process.add_done_callback(partial(self._runs.discard, run))


class _LocalRun(FileOutput):
    """The handle of a run.

    Args:
        run_id: The id of the MLflow run.
        output: The file with the run's output; None if it is inherited.
        grace: Seconds between the request to stop and the end by force.
        process: The run's process.
        exit_code: Reads the run's exit code (blocking), if `process` does not have it; it returns None if the code was
            never recorded.
    """

    __slots__ = ("_exit_code", "_grace", "_outcomes", "_output", "_process", "_run_id")

    def __init__(
        self,
        run_id: str,
        output: Path | None,
        grace: float,
        process: Process | _Ended,
        exit_code: Callable[[], int | None] | None = None,
    ) -> None:
        self._run_id = run_id
        self._output = output
        self._grace = grace
        self._process = process
        self._exit_code = exit_code
        self._outcomes: list[Outcome] = []

    @property
    def run_id(self) -> str:
        return self._run_id

    async def started(self) -> None:
        """Return at once: a process runs as soon as it exists."""

    async def wait(self) -> bool:
        return (await self.outcome()).status is RunStatus.FINISHED

    async def outcome(self) -> Outcome:
        code: int | None = await self._process.wait()
        if not self._outcomes:
            if self._exit_code is not None:
                code = await FILES.run(self._exit_code)
            outcome = _ended_by(code, stopped=self._process.stopped)
            if self._output is not None and outcome.status is not RunStatus.FINISHED:
                outcome = replace(outcome, output=await FILES.run(partial(last_lines, self._output)))
            # Processes that the run left behind may still write: all waiters get the first one's result.
            self._outcomes.append(outcome)
        return self._outcomes[0]

    async def cancel(self, *, grace: float | None = None) -> None:
        await complete(partial(self._stop, self._grace if grace is None else grace), restart=True)

    async def _stop(self, grace: float) -> None:
        """End the session, and at the same time what has left it: a process that called ``setsid``."""
        process = self._process
        if isinstance(process, _Ended) or process.returncode is not None:
            return
        stopping = asyncio.ensure_future(process.stop(grace))
        await end_marked(
            self._run_id,
            grace,
            session=process.pid,
            goes_on=lambda: not stopping.done(),
            # A command that ended by itself before SIGTERM reached it keeps what it has left on purpose.
            may_end=lambda: process.stopped,
        )
        await stopping

    async def get_status(self) -> RunStatus:
        return RunStatus.RUNNING if self._process.returncode is None else (await self.outcome()).status

    def _output_file(self) -> Path | None:
        return self._output

    async def _output_ended(self) -> object:
        return await self._process.wait()


class _LeftRun(FileOutput):
    """The handle of the processes of another driver's run. Nobody learns their exit codes here."""

    def __init__(self, run_id: str, grace: float) -> None:
        self.run_id = run_id
        self._grace = grace
        self._stopped = False

    async def started(self) -> None:
        """Return at once."""

    async def wait(self) -> bool:
        return (await self.outcome()).status is RunStatus.FINISHED

    async def outcome(self) -> Outcome:
        while await find_marked(self.run_id):  # noqa: ASYNC110 - nobody tells of the ends of others' processes
            await anyio.sleep(_LEFT_POLL)
        return self._outcome()

    async def cancel(self, *, grace: float | None = None) -> None:
        self._stopped = self._stopped or bool(await find_marked(self.run_id))
        await complete(partial(end_marked, self.run_id, self._grace if grace is None else grace), restart=True)

    async def get_status(self) -> RunStatus:
        return RunStatus.RUNNING if await find_marked(self.run_id) else self._outcome().status

    def _output_file(self) -> Path | None:
        return folder_of(self.run_id) / "output.log"

    async def _output_ended(self) -> object:
        return await self.outcome()

    def _outcome(self) -> Outcome:
        if self._stopped:
            return Outcome(RunStatus.KILLED, reason="cancelled")
        error = RunLost(DRIVER_DIED, backend=LocalBackend.name)
        return Outcome(RunStatus.FAILED, reason=DRIVER_DIED, error=error)


class _Ended:
    """A stand-in for a process that had ended before it was looked for."""

    returncode = 0
    stopped = False

    async def wait(self) -> int:
        return self.returncode


def _grace(ref: JobRef) -> float:
    grace = ref.data.get("grace", DEFAULT_CANCEL_GRACE)
    return float(grace) if isinstance(grace, int | float) and grace >= 0 else DEFAULT_CANCEL_GRACE


def _ended_by(code: int | None, *, stopped: bool) -> Outcome:
    if stopped:
        return Outcome(RunStatus.KILLED, code, "cancelled")
    if code is None:
        lost = RunLost("the run is lost: its process was killed", backend=LocalBackend.name)
        return Outcome(RunStatus.FAILED, None, str(lost), error=lost)
    if code == 0:
        return Outcome(RunStatus.FINISHED, 0)
    reason = f"exit code {code}" if code > 0 else f"killed by signal {_signal_name(-code)}"
    return Outcome(RunStatus.FAILED, code, reason)


async def _close_found(found: run_folder.Living | run_folder.Ended | None) -> None:
    if isinstance(found, run_folder.Living):
        found.close()


@contextmanager
def _command(job: Job) -> Iterator[Command]:
    """Return the command to start for a job; its output is open inside the context. Blocking."""
    argv: tuple[str, ...] = ("bash", "-c", job.command)
    if job.durable:
        argv = run_folder.argv(job)
        try:
            folder_of(job.run_id).mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            text = f"the folder of the run, {error.filename}, cannot be made: {error.strerror}"
            raise SubmitError(text, backend=LocalBackend.name) from error
    environ = {**_environ(job), RUN_VARIABLE: job.run_id}
    if job.durable:
        # This process may be a run of another driver itself: at that one's end a durable run goes on all the same.
        environ.pop(MARKER_VARIABLE, None)
    output = None if job.output is None else _open_output(job.output)
    try:
        yield Command(
            argv,
            job.project_dir,
            environ,
            output,
            output,
            _program(argv[0], environ.get("PATH", "")),
            title=_title(job.run_id),
            rest_grace=job.cancel_grace,
            guarded=not job.durable,
        )
    finally:
        if output is not None:
            os.close(output)


def _title(run_id: str) -> str:
    return f"the command of the run {run_id}"


def _environ(job: Job) -> dict[str, str]:
    environ = job.inherited()
    environ.update(job.environ)
    environ.update(job.secrets)
    return environ if job.environment is None else job.environment.apply(environ)


def _program(name: str, path: str) -> str | None:
    """Return the path of a program, by the last search for it.

    Returns:
        None if it must be searched for at each start, because PATH depends on the working directory.
    """
    found = _found(name, path)
    if found is None or os.access(found, os.X_OK):
        return found
    _found.cache_clear()  # it was removed
    return _found(name, path)


@lru_cache(maxsize=16)
def _found(name: str, path: str) -> str | None:
    # To search all of PATH for each run takes longer than the rest of its start.
    is_fixed = all(os.path.isabs(folder) for folder in path.split(os.pathsep))  # noqa: PTH117
    return shutil.which(name, path=path) if is_fixed else None


def _open_output(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Append, so that a child that opens it once more (/dev/stdout) does not overwrite its content.
        output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        # Held as long as a process can write to it: `prune_outputs` leaves it alone.
        fcntl.flock(output, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return output
    except OSError as error:
        raise SubmitError(
            f"the output of the run cannot be written to {path}: {error.strerror}", backend=LocalBackend.name
        ) from error


def _refusal(job: Job, error: OSError | ValueError) -> str:
    """Return why the command could not be started. Of the command's variables only the names may be shown."""
    if isinstance(error, OSError):
        if error.filename == str(job.project_dir):
            return f"the folder of the project, {job.project_dir}, cannot be entered: {error.strerror}"
        missing = error.errno in (errno.ENOENT, errno.EACCES) and error.filename is not None
        if missing and os.path.basename(error.filename) == "bash":  # noqa: PTH119
            return f"bash cannot be run: {error.strerror}. Install it, or set PATH so that it is found"
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
