"""The client programs of Slurm: sbatch, squeue, scancel and scontrol, with what their errors mean."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.single_flight import Coalescing
from mlfleet._concurrency.threads import FILES
from mlfleet._process.process import Completed, run_process
from mlfleet._retry import RetryPolicy
from mlfleet._run_log import get_logger
from mlfleet.backends.slurm.config import SlurmConfig
from mlfleet.backends.slurm.states import GONE, JobState
from mlfleet.errors import BackendError, SubmitError
from mlfleet.resources import Resources

__all__ = ["ListedJob", "SlurmClient", "SlurmError", "Submission", "Timing", "sbatch_arguments"]

_log = get_logger("mlfleet.slurm")

# 300 submits take 2.2 s one by one, 0.96 s by four, 0.83 s by eight (measured, Slurm 22.05).
_SUBMITS_AT_ONCE = 4
_BY_USER = 50  # from so many jobs on squeue gets no list of ids, and shows all jobs of the user
# Certain errors of sbatch: no job was made, and a later attempt may succeed.
_NOT_SUBMITTED = re.compile(
    "Unable to contact slurm controller|Protocol authentication error|Slurm backup controller in standby"
)
# Nobody knows whether a job was made.
_UNCLEAR = re.compile("timed out|Zero Bytes were transmitted|Unexpected message received|Connection reset")
_INVALID_ID = "Invalid job id specified"
_FORMAT = "JobArrayID:|,State:|,exit_code:|,Reason:|,RestartCnt:|,Name:|"
# JobID is another one for each task of an array that has begun.
_FOUND = "ArrayJobID:|,State:|,Reason:|"
_LISTED = "JobArrayID:|,State:|,Name:|,Comment:|,SubmitTime:|"
_ERROR_PREFIX = re.compile(r"^(sbatch|squeue|scancel|scontrol): (error: |fatal: )?", re.M)
_BAD_CONSTRAINTS = "BadConstraints"
_KILL_MARGIN = 2.0  # seconds before KillWait at which SIGKILL should have been sent
# All variables of sbatch go to the job (--export=ALL), and on many sites into the database. With a list of names, NONE,
# or NIL before Slurm 23, the node would run the user's login files for each job, and with --export-file the job would
# miss what sbatch sets itself, such as SLURM_JOB_NAME and the limits. So sbatch itself gets only these.
_OF_SBATCH = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LD_LIBRARY_PATH", "KRB5CCNAME", "SLURM_CONF")
_CALL_LIMIT = 120.0  # seconds after which a program has hung: they give up after MessageTimeout and a few retries

# A restart of the controller may take ten minutes. There must be time left to look for the job of a lost submit, and to
# submit it again.
_RETRIES = RetryPolicy(seconds=900, first_pause=1, longest_pause=30)


class SlurmError(BackendError):
    """A client program of Slurm failed.

    Attributes:
        unclear: True if the request may have been carried out all the same.
    """

    unclear: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The intervals of polls and retries, in seconds.

    Attributes:
        fast: Between two polls while a run is young or is being cancelled.
        slow: The longest interval between two polls.
        search: For which a job is looked for whose submit was unclear.
        retries: The retries of submits and cancellations while the controller cannot be reached.
    """

    fast: float = 2.0
    slow: float = 30.0
    search: float = 20.0
    retries: RetryPolicy = _RETRIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A batch job, or an array of them, to submit.

    Attributes:
        name: The name of the job, by which it is found again.
        script: The batch script.
        arguments: The arguments of sbatch from the configuration and the resources.
        messages: The file for Slurm's own messages, absolute; its folder exists.
        work_dir: The work folder.
        count: The number of tasks of an array; None: a single job.
        earlier: Returns the highest id of earlier jobs with this name; blocking.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    messages: str
    work_dir: Path
    count: int | None = None
    earlier: Callable[[], int] = int

    def argv(self) -> tuple[str, ...]:
        """Return the program and its arguments; the script goes to stdin."""
        array = () if self.count is None else (f"--array=0-{self.count - 1}",)
        return (
            "sbatch", "--parsable", f"--job-name={self.name}", f"--comment=mlfleet {self.work_dir}",
            f"--output={self.messages}", "--open-mode=append", f"--chdir={self.work_dir}", "--export=ALL", *array,
            *self.arguments,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ListedJob:
    """A job of mlfleet in the queue.

    Attributes:
        id: The id of the job.
        state: The state, in Slurm's word.
        name: The name of the job.
        work_dir: The work folder.
        submitted: The time of the submit, in seconds since the epoch.
    """

    id: str
    state: str
    name: str
    work_dir: Path
    submitted: float


def sbatch_arguments(config: SlurmConfig, resources: Resources | None) -> tuple[str, ...]:
    """Return the arguments of sbatch that the configuration and the resources of a run ask for.

    A key of the configuration counts more than the resources: some clusters insist on one of several options.
    """
    options = dict(config.options)
    if resources is not None:
        options.setdefault("cpus-per-task", str(max(1, -int(-resources.cpus // 1))))
        if resources.memory_bytes is not None and not {"mem", "mem-per-cpu"} & options.keys():
            options["mem"] = f"{-(-resources.memory_bytes // 1024)}K"
        if resources.gpus and not {"gres", "gpus-per-node"} & options.keys():
            options["gres"] = f"gpu:{resources.gpus}"
    flags = [f"--clusters={config.clusters}"] if config.clusters is not None else []
    flags += ["--exclusive"] if config.exclusive else []
    flags.append("--requeue" if config.requeue else "--no-requeue")
    return (*(f"--{name}={value}" for name, value in options.items()), *flags, *config.sbatch_args)


class SlurmClient:
    """The client programs of one cluster.

    Args:
        cluster: The name of the cluster (``--clusters``); None: that of this machine.
        timing: The intervals of polls and retries.

    Attributes:
        kill_wait: Seconds between SIGTERM and SIGKILL at the end of a job (KillWait).
        largest_array: The largest number of tasks of an array (MaxArraySize).
    """

    def __init__(self, cluster: str | None, timing: Timing) -> None:
        self._cluster = () if cluster is None else (f"--clusters={cluster}",)
        self._timing = timing
        self._submits = anyio.CapacityLimiter(_SUBMITS_AT_ONCE)
        self._to_cancel: dict[tuple[str, ...], set[str]] = {}
        self._cancelling: Coalescing[tuple[str, ...], None] = Coalescing()
        self.kill_wait = 30.0
        self.largest_array = 1001

    @property
    def longest_grace(self) -> float:
        """The longest grace, in seconds, whose end comes before Slurm kills the batch script."""
        return max(0.0, self.kill_wait - _KILL_MARGIN)

    async def open(self) -> None:
        """Read the settings of the cluster.

        Raises:
            SlurmError: There is no sbatch on PATH.
        """
        if await FILES.run(lambda: shutil.which("sbatch")) is None:
            raise SlurmError(
                "there is no sbatch on PATH: run mlfleet on a machine of the cluster from which jobs are submitted,"
                " or load its module for Slurm",
                backend="slurm",
            )
        with suppress(SlurmError):  # the defaults of Slurm stand above
            shown = await self._run("scontrol", *self._cluster, "show", "config")
            settings = dict(re.findall(r"^(\w+)\s*=\s*(\d+)", shown, re.M))
            self.kill_wait = float(settings.get("KillWait", self.kill_wait))
            self.largest_array = int(settings.get("MaxArraySize", self.largest_array))

    # ---- submitting -------------------------------------------------------------------------------------------------

    async def submit(self, submission: Submission) -> str:
        """Submit a job and return its id.

        A submit whose answer was lost is looked for by its name before it is repeated. A cancelled call waits for the
        answer and cancels the job.

        Raises:
            SubmitError: Slurm refuses the job.
            SlurmError: The controller cannot be reached, or nobody knows whether it has the job.
        """
        lost: SlurmError | None = None  # the last submit, if nobody knows yet whether it made a job

        async def attempt() -> str:
            nonlocal lost
            async with self._submits:
                if lost is None:
                    try:
                        return await self._sbatch(submission)
                    except SlurmError as error:
                        if not error.unclear:
                            raise
                        lost = error
                found = await self._search(submission)
                if found is None:
                    unclear, lost = lost, None
                    raise unclear
                _log.warning("the answer of sbatch was lost; the job %s has been found by its name", found)
                return found

        def log(error: BaseException, pause: float) -> None:
            _log.warning("the job %s could not be submitted, next attempt in %.0f s: %s", submission.name, pause, error)

        async def work() -> str:
            return await self._timing.retries.call(
                attempt, retry_if=lambda error: isinstance(error, SlurmError), before_pause=log
            )

        try:
            return await complete(work, limit=self._timing.search)
        except asyncio.CancelledError:
            await complete(lambda: self._cancel_by_name(submission.name), limit=self._timing.search)
            raise

    async def _sbatch(self, submission: Submission) -> str:
        environ = {name: os.environ[name] for name in _OF_SBATCH if name in os.environ}
        completed = await self._call(submission.argv(), environ, submission.script.encode(errors="surrogateescape"))
        if completed.returncode == 0:
            # Some sites have a program of their own around sbatch, which greets on stdout.
            jobs = re.findall(r"^(\d+)(?:;.*)?$", completed.stdout.decode(errors="replace"), re.M)
            if jobs:
                return str(jobs[-1])
        text = _message(completed)
        if _NOT_SUBMITTED.search(text):
            raise SlurmError(f"Slurm cannot be reached: {text}", backend="slurm")
        if _UNCLEAR.search(text) or completed.returncode <= 0:  # without an id, or ended by a signal
            error = SlurmError(f"sbatch had no clear answer: {text}", backend="slurm")
            error.unclear = True
            raise error
        raise SubmitError(f"Slurm does not take the job: {text}", backend="slurm")

    async def _search(self, submission: Submission) -> str | None:
        """Look for a job by its name, for a while: the controller may still be about to make it."""
        pause = 0.5
        deadline = time.monotonic() + self._timing.search
        earlier = await FILES.run(submission.earlier)
        while True:
            with suppress(SlurmError):
                found = await self.find(submission.name, after=earlier)
                if found is not None:
                    return found
                if time.monotonic() > deadline - self._timing.search / 2:
                    return None
            if time.monotonic() > deadline:
                raise SlurmError("Slurm cannot be asked for the job", backend="slurm")
            await anyio.sleep(pause)

    async def find(self, name: str, *, after: int = 0) -> str | None:
        """Return the id of this user's job with a name, the newest if there are several; None: there is none.

        A refused submit may leave a job that has failed for its constraints: it does not count.

        Args:
            name: The name.
            after: The highest id of earlier jobs with this name, which do not count.

        Raises:
            SlurmError: The controller cannot be asked.
        """
        shown = await self._run("squeue", *self._cluster, "-h", "-t", "all", "--me", "-n", name, "-O", _FOUND)
        ids = []
        for line in shown.splitlines():
            job, state, reason, *_ = [*line.split("|"), "", ""]
            if job.strip().isdecimal() and not (state == "FAILED" and reason.strip("()") == _BAD_CONSTRAINTS):
                ids.append(int(job))
        return str(max(ids)) if ids and max(ids) > after else None

    # ---- following --------------------------------------------------------------------------------------------------

    async def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        """Return the states of jobs, with one process; `GONE` for those that Slurm does not know.

        Raises:
            SlurmError: The controller cannot be asked, which says nothing about the jobs.
        """
        if not jobs:
            return {}
        which = ("--me",) if len(jobs) > _BY_USER else ("-j", ",".join(jobs))
        # Never --json: it gives all jobs of the cluster, and other fields with each version.
        completed = await self._ask(("squeue", *self._cluster, "-h", "-r", "-t", "all", *which, "-O", _FORMAT))
        text = _message(completed)
        if completed.returncode != 0 and _INVALID_ID not in text:
            raise SlurmError(f"Slurm cannot be asked for the states of jobs: {text}", backend="slurm")
        found = dict.fromkeys(jobs, GONE)
        for line in completed.stdout.decode(errors="replace").splitlines():
            fields = line.split("|")
            if len(fields) >= 6 and fields[0] in found:
                found[fields[0]] = JobState(
                    word=fields[1],
                    exit_code=_whole(fields[2]),
                    reason=fields[3].strip("()"),
                    restarts=_whole(fields[4]),
                    name=fields[5],
                )
        return found

    async def list_jobs(self) -> list[ListedJob]:
        """Return the jobs of this user that mlfleet submitted and that Slurm still knows.

        Raises:
            SlurmError: The controller cannot be asked.
        """
        shown = await self._run("squeue", *self._cluster, "-h", "-r", "-t", "all", "--me", "-O", _LISTED)
        listed = []
        for line in shown.splitlines():
            # The comment ends with the work folder, in whose path a | may be.
            job, state, name, rest, *_ = [*line.split("|", 3), *("",) * 4]
            comment, submitted, *_ = [*rest.rsplit("|", 2), *("",) * 2]
            product, _, work_dir = comment.partition(" ")
            if product == "mlfleet" and name.startswith("mlfleet-") and work_dir.startswith("/"):
                listed.append(ListedJob(job, state, name, Path(work_dir), _time(submitted)))
        return listed

    # ---- cancelling -------------------------------------------------------------------------------------------------

    async def cancel(self, *jobs: str, only_script: bool = False) -> None:
        """Request the end of jobs. Requests of the same moment share a process. One for an ended job does nothing.

        Args:
            jobs: The ids of the jobs.
            only_script: True to send SIGTERM to the batch script only, without SIGKILL after KillWait.

        Raises:
            SlurmError: The controller cannot be reached.
        """
        how = ("-b", "-s", "TERM") if only_script else ()
        self._to_cancel.setdefault(how, set()).update(jobs)
        await self._cancelling(how, lambda: self._scancel(how))

    async def _scancel(self, how: tuple[str, ...]) -> None:
        jobs = sorted(self._to_cancel.pop(how, ()))
        if not jobs:
            return

        async def attempt() -> None:
            await self._run("scancel", *self._cluster, *how, *jobs)

        def log(error: BaseException, pause: float) -> None:
            _log.warning("%d jobs could not be cancelled, next attempt in %.0f s: %s", len(jobs), pause, error)

        await self._timing.retries.call(attempt, retry_if=lambda error: isinstance(error, SlurmError), before_pause=log)

    async def _cancel_by_name(self, name: str) -> None:
        with suppress(SlurmError):
            await self._run("scancel", *self._cluster, "--me", f"--name={name}")

    # ---- processes --------------------------------------------------------------------------------------------------

    async def _run(self, *argv: str) -> str:
        completed = await self._ask(argv)
        if completed.returncode != 0:
            raise SlurmError(f"{argv[0]} failed: {_message(completed)}", backend="slurm")
        return completed.stdout.decode(errors="replace")

    async def _ask(self, argv: Sequence[str]) -> Completed:
        """Run a program that may be repeated, unlike sbatch, and so may be ended when it hangs."""
        try:
            with anyio.fail_after(_CALL_LIMIT):
                return await self._call(argv, os.environ)
        except TimeoutError:
            raise SlurmError(f"{argv[0]} has not answered for {_CALL_LIMIT:.0f} s", backend="slurm") from None

    async def _call(self, argv: Sequence[str], environ: Mapping[str, str], stdin: bytes | None = None) -> Completed:
        try:
            return await run_process(argv, env=_environ(environ), stdin=stdin)
        except OSError as error:
            raise SlurmError(f"{argv[0]} cannot be run: {error.strerror}", backend="slurm") from error


def _environ(here: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for client programs.

    Those of a job that this process runs in, and defaults such as SBATCH_PARTITION, would silently apply to the jobs.
    """
    kept = {
        name: value
        for name, value in here.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_"))
    }
    return {**kept, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}


def _message(completed: Completed) -> str:
    text = _ERROR_PREFIX.sub("", completed.stderr.decode(errors="replace")).strip()
    return "; ".join(text.splitlines()) or f"exit code {completed.returncode}"


def _whole(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0


def _time(text: str) -> float:
    return float(text) if text.strip().isdecimal() else 0.0
