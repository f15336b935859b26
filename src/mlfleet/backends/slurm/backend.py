"""The Slurm backend: it submits each run as a batch job, and attaches to jobs of earlier processes."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import anyio

from mlfleet._concurrency.cancellation import complete
from mlfleet._concurrency.single_flight import Coalescing, SingleFlight
from mlfleet._concurrency.threads import FILES
from mlfleet._hosts import has_loopback_host
from mlfleet._paths import run_folder, size_on_disk
from mlfleet._process.guardian import MARKER_VARIABLE, RUN_VARIABLE
from mlfleet.backends._remote.backend import RemoteBackend
from mlfleet.backends._remote.owner import owner_lives
from mlfleet.backends.base import DockerRequest, Job, ListedRun, Presence
from mlfleet.backends.slurm.client import ListedJob, SlurmClient, Timing, sbatch_arguments
from mlfleet.backends.slurm.config import SlurmConfig, default_work_dir, parse_config
from mlfleet.backends.slurm.run import SlurmRun
from mlfleet.backends.slurm.run_files import RunFiles, folders_of_runs, prune_shared, run_of_job, write_run
from mlfleet.backends.slurm.script import command_script, is_left_out
from mlfleet.backends.slurm.states import GONE, JobState
from mlfleet.backends.slurm.submits import ArraySubmitter, single
from mlfleet.backends.slurm.watch import Poller
from mlfleet.errors import RunLost, SubmitError, UsageError
from mlfleet.runs import DEFAULT_CANCEL_GRACE, JobRef
from mlfleet.tracking.databricks import is_databricks

__all__ = ["SlurmBackend"]

_URI = "MLFLOW_TRACKING_URI"
_RUN_ID_LENGTH = 32
_FOUND_AFTER = 30.0  # seconds after which a run without a job and without a living driver will have none
_TAKE_BACK = 60.0  # seconds to wait for the end of the job of a submit that was cancelled


class _Cluster:
    """One cluster with the client, the poller and the submitter that all its runs share."""

    def __init__(self, client: SlurmClient, poller: Poller) -> None:
        self.client = client
        self.poller = poller
        self.arrays = ArraySubmitter(client)
        self.copies: Coalescing[object, Path] = Coalescing()


class SlurmBackend(RemoteBackend[SlurmConfig]):
    """A backend that runs jobs as batch jobs of a cluster with Slurm, by its client programs.

    Closing the backend cancels the jobs that it submitted; jobs that it attached to go on.

    Args:
        timing: The intervals of polls and retries; None: those that suit a shared cluster.
    """

    name: ClassVar[str] = "slurm"
    needs_environment: ClassVar[bool] = True
    path_keys: ClassVar[frozenset[str]] = frozenset({"work-dir"})

    def __init__(self, *, timing: Timing | None = None) -> None:
        super().__init__()
        self._timing = timing or Timing()
        self._clusters: SingleFlight[str | None, _Cluster] = SingleFlight(keep=True)

    # ---- before anything exists -------------------------------------------------------------------------------------

    def configure(self, config: Mapping[str, Any]) -> SlurmConfig:
        """Check ``backend_config``; see `parse_config`.

        Raises:
            UsageError: A key is unknown or a value is wrong.
        """
        return parse_config(config, os.environ)

    def check(self, docker: DockerRequest | None, folder: Path) -> None:
        """Refuse projects with ``docker_env``; see `Backend.check`."""
        if docker is not None:
            raise UsageError(
                "projects with docker_env cannot run on Slurm, whose nodes seldom have an engine: give the project a"
                " python_env, or run it with the backend 'docker' or 'kubernetes'"
            )

    def variables(self, job: Job) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return the variables of the job, with the address of tracking that the nodes know."""
        return _variables(job, _config(job)), job.secrets

    def check_variables(self, names: Collection[str], config: SlurmConfig | None = None) -> None:
        """Refuse variables that Slurm or bash sets on the node; see `Backend.check_variables`."""
        set_there = sorted(filter(is_left_out, names))
        if set_there:
            raise UsageError(
                f"env: {', '.join(set_there)} cannot be given to runs on Slurm, since Slurm or bash sets it on the"
                " node: leave it out, or set it in the lines of setup"
            )

    def check_tracking(self, uri: str, config: SlurmConfig | None = None) -> None:
        """Refuse tracking that the nodes cannot reach, unless ``tracking-uri`` gives them another address."""
        if config is None or config.tracking_uri is not None or is_databricks(uri):
            return
        hint = (
            "Give tracking-uri in backend_config: the address of a tracking server that the nodes can reach, or a"
            " store on the shared file system if you accept its risks"
        )
        if uri.startswith(("http://", "https://")):
            if has_loopback_host(uri):
                raise UsageError(
                    f"the tracking server {uri} is on loopback, which on a node is the node itself. {hint}"
                )
        elif uri.startswith("sqlite:"):
            raise UsageError(
                f"the tracking store {uri} is a file of SQLite, which several machines damage on a network file system"
                f" (https://sqlite.org/howtocorrupt.html, 2.1). {hint}"
            )
        elif (uri.startswith("file:") or "://" not in uri) and not _is_below(uri, config.work_dir):
            raise UsageError(f"the tracking store {uri} is on this machine, where nodes may not see it. {hint}")

    def shared_folder(self, config: SlurmConfig) -> Path:
        """Return the work folder; see `Backend.shared_folder`."""
        return config.work_dir

    def preview(self, job: Job) -> str:
        """Return the command line of sbatch, the batch script and the script of the command, without the secrets."""
        config = _config(job)
        files = RunFiles(config.work_dir, job.run_id)
        submission = single(files, sbatch_arguments(config, job.resources))
        command = command_script(
            files.folder, files.project, job.command, environment=job.environment, setup=config.setup
        )
        environ = _variables(job, config)
        others = "this process's variables" if job.inherit_env is True else "some of this process's variables"
        shown = "\n".join(f"{name}={environ[name]}" for name in sorted(environ))
        hidden = "".join(f"\n{name}=***" for name in sorted(job.secrets))
        return (
            f"{shlex.join(submission.argv())} <<'EOF'\n{submission.script.rstrip()}\nEOF\n\n"
            f"# {files.folder}/command.sh\n{command}\n# {files.folder}/environ, besides {others}\n"
            f"{shown}{hidden}"
        )

    # ---- one run ----------------------------------------------------------------------------------------------------

    def reference(self, job: Job) -> JobRef:
        """Return the cluster and the work folder, by which `attach` finds the run's files and its job."""
        config = _config(job)
        return JobRef(
            self.name,
            job.run_id,
            {
                "cluster": config.clusters,
                "work_dir": str(config.work_dir),
                "start_timeout": config.start_timeout,
                "latency": config.latency,
                "keep": config.keep,
                "grace": job.cancel_grace,
                "since": time.time(),
                "owner": dict(self._this_process),
            },
        )

    async def submit(self, job: Job) -> SlurmRun:
        """Write the run's files into the work folder and submit its job.

        Raises:
            SubmitError: Slurm does not take the job, or the work folder cannot be written.
            SlurmError: The controller could not be reached for fifteen minutes.
        """
        config = _config(job)
        cluster = await self._open_cluster(config.clusters)
        arguments = sbatch_arguments(config, job.resources)
        # The time limit, a preemption and a cancellation from outside leave the batch script no more than KillWait.
        grace = min(job.cancel_grace, cluster.client.longest_grace)
        files = await write_run(job, config, _environ(job, config), self._this_process, cluster.copies, grace=grace)
        run: SlurmRun | None = None
        try:
            job.on_progress("submitting to Slurm")
            if config.array:
                number = await cluster.arrays.submit(files, arguments, sweep_id=job.sweep_id)
            else:
                number = await cluster.client.submit(single(files, arguments))
            run = self._supervise(
                files, config, number, cluster, output=job.output, submitted=True, grace=job.cancel_grace
            )
            await FILES.run(partial(files.write_job, number))
        except BaseException as error:
            await complete(partial(_take_back, files, run), restart=True)
            if isinstance(error, OSError):
                text = f"the id of the job cannot be written below {config.work_dir}: {error.strerror}"
                raise SubmitError(text, backend=self.name) from error
            raise
        return run

    def tags(self, run: Any) -> Mapping[str, str]:
        """Return the tag with the id of the job."""
        return {"mlfleet.slurm.job": run.job} if isinstance(run, SlurmRun) else {}

    async def attach(self, ref: JobRef) -> SlurmRun:
        """Return the handle of a run that an earlier process submitted.

        Raises:
            RunLost: There are no files of the run, or no job was submitted for it.
            SlurmError: The controller cannot be asked.
        """
        files, config = _read_reference(ref)
        cluster = await self._open_cluster(config.clusters)
        found = await self._find(ref, files, cluster.client)
        if found is None:
            raise RunLost(f"the run {ref.run_id} is lost: no job of Slurm was submitted for it", backend=self.name)
        await FILES.run(partial(self._take_over, files))
        number, state = found
        grace = _seconds(ref.data.get("grace"), DEFAULT_CANCEL_GRACE)
        output = run_folder(ref.run_id) / "output.log"
        run = self._supervise(files, config, number, cluster, output=output, submitted=False, grace=grace)
        cluster.poller.put(number, state)
        return run

    # ---- runs of other processes ------------------------------------------------------------------------------------

    async def list_runs(self) -> Sequence[ListedRun]:
        """Return the runs of this user whose job is waiting or running; see `Backend.list_runs`."""
        cluster = await self._open_cluster((await self._selected_config()).clusters)
        jobs = await cluster.client.list_jobs()
        return await FILES.run(partial(_listed, [job for job in jobs if not JobState(job.state).is_over]))

    async def prune(
        self, run_ids: Collection[str] = (), *, running: bool = False, dry_run: bool = False
    ) -> Sequence[ListedRun]:
        """Remove the files of runs that no process looks after; see `Backend.prune`.

        They are those in the work folder that was selected, or else in the default one.
        """
        config = await self._selected_config()
        cluster = await self._open_cluster(config.clusters)
        found = await FILES.run(partial(_kept, config.work_dir, set(run_ids)))
        states = await cluster.client.states([number for _, number, _ in found if number is not None])
        going = []
        for files, number, _ in found:
            if number is not None and not (await FILES.run(partial(_own, states[number], files, number))).is_over:
                going.append(number)
        removed = [(files, number, listed) for files, number, listed in found if running or number not in going]
        if not dry_run:
            if running:
                await cluster.client.cancel(*going)
            for files, _, _ in removed:
                await FILES.run(files.remove)
            await FILES.run(partial(prune_shared, config.work_dir))
        return [listed for _, _, listed in removed]

    async def presence(self, ref: JobRef) -> Presence:
        """Return the state of the job; see `Backend.presence`."""
        try:
            files, config = _read_reference(ref)
            cluster = await self._open_cluster(config.clusters)
            found = await self._find(ref, files, cluster.client)
        except RunLost:
            return Presence.MISSING
        if found is None:
            return Presence.ACTIVE if _is_young(ref) else Presence.MISSING
        return Presence.ENDED if found[1].is_over else Presence.ACTIVE

    async def withdraw(self, ref: JobRef) -> bool:
        """Claim a run that no job has claimed yet, so that its command never runs, and cancel its job."""
        with suppress(RunLost):
            files, config = _read_reference(ref)
            if await FILES.run(files.withdraw):
                cluster = await self._open_cluster(config.clusters)
                number = await _job_of(files, cluster.client)
                if number is not None:
                    await cluster.client.cancel(number)
                return True
        return False

    # ---- helpers ----------------------------------------------------------------------------------------------------

    async def _find(self, ref: JobRef, files: RunFiles, client: SlurmClient) -> tuple[str, JobState] | None:
        """Return the job of a run and its state, `GONE` if Slurm has forgotten it; None: there is no job."""
        if not await FILES.run(files.is_own):
            text = f"the run {ref.run_id} is lost: {files.folder} does not exist, or is not this user's own"
            raise RunLost(text, backend=self.name)
        number = await _job_of(files, client)
        if number is None and _is_young(ref):
            await anyio.sleep(self._timing.fast)
            number = await _job_of(files, client)
        if number is None:
            return None
        state = (await client.states([number]))[number]
        return number, await FILES.run(partial(_own, state, files, number))

    def _take_over(self, files: RunFiles) -> None:
        """Look after a run whose process has died, so that `prune` of another process leaves it. Blocking."""
        if owner_lives(files.owner()) is False:
            with suppress(OSError):
                files.write_owner(self._this_process)

    async def _open_cluster(self, name: str | None) -> _Cluster:
        """Return the shared services of a cluster; the first call opens them."""

        async def enter() -> _Cluster:
            client = SlurmClient(name, self._timing)
            await client.open()
            cluster = _Cluster(client, await self._stack.enter_async_context(Poller(client, self._timing)))
            self._stack.push_async_callback(cluster.arrays.close)
            return cluster

        return await self._clusters(name, enter)

    def _supervise(
        self,
        files: RunFiles,
        config: SlurmConfig,
        number: str,
        cluster: _Cluster,
        *,
        output: Path | None,
        submitted: bool,
        grace: float,
    ) -> SlurmRun:
        run = SlurmRun(
            files, config, number, cluster.client, cluster.poller, output=output, submitted=submitted, grace=grace
        )
        self._runs.start(run, name=f"mlfleet Slurm job {number}")
        return run


def _config(job: Job) -> SlurmConfig:
    return job.config if isinstance(job.config, SlurmConfig) else parse_config({}, os.environ)


def _variables(job: Job, config: SlurmConfig) -> dict[str, str]:
    """Return the variables that mlfleet sets for the command and that are not secret."""
    return {**job.environ, **({} if config.tracking_uri is None else {_URI: config.tracking_uri})}


def _environ(job: Job, config: SlurmConfig) -> dict[str, str]:
    """Return all variables of the command: those that it inherits, those of the job and the secret ones."""
    environ = {**job.inherited(), **_variables(job, config), **job.secrets}
    # This process may be part of a run itself: at the end of that run, or of its driver, a job goes on all the same.
    for name in (MARKER_VARIABLE, RUN_VARIABLE):
        environ.pop(name, None)
    return environ


async def _take_back(files: RunFiles, run: SlurmRun | None) -> None:
    """Remove the files of a submit that failed, and first end its job if there is one."""
    if run is not None:
        with anyio.move_on_after(_TAKE_BACK):
            await run.cancel()
    await FILES.run(files.remove)


async def _job_of(files: RunFiles, client: SlurmClient) -> str | None:
    """Return the id of a run's job: that of its files, or else one with the run's name; None: there is none."""
    number = await FILES.run(files.job)
    if number is not None:
        return number
    return await client.find(f"mlfleet-{files.run_id}", after=await FILES.run(files.earlier))


def _own(state: JobState, files: RunFiles, job: str) -> JobState:
    """Return the state of a job, or `GONE` if the id is now that of another one. Blocking."""
    return state if state.is_gone or run_of_job(files.work_dir, state.name, job) == files.run_id else GONE


def _is_young(ref: JobRef) -> bool:
    since = ref.data.get("since")
    return isinstance(since, int | float) and time.time() - since < _FOUND_AFTER


def _read_reference(ref: JobRef) -> tuple[RunFiles, SlurmConfig]:
    """Return the files of a run, and as much of its configuration as its reference holds.

    Raises:
        RunLost: The reference names no work folder.
    """
    run_folder(ref.run_id)  # checks the id
    work_dir = Path(str(ref.data.get("work_dir") or default_work_dir(os.environ)))
    if not work_dir.is_absolute():
        raise RunLost(f"the tag {JobRef.TAG} of the run {ref.run_id} names no work folder", backend="slurm")
    cluster, limit = ref.data.get("cluster"), ref.data.get("start_timeout")
    config = SlurmConfig(
        work_dir=work_dir,
        clusters=parse_config({"clusters": cluster}, {}).clusters if cluster else None,
        start_timeout=None if limit is None else _seconds(limit, 0.0),
        latency=_seconds(ref.data.get("latency"), 0.0),
        keep=ref.data.get("keep") is True,
    )
    return RunFiles(work_dir, ref.run_id), config


def _seconds(value: object, default: float) -> float:
    return float(value) if isinstance(value, int | float) and value >= 0 else default


def _is_below(uri: str, folder: Path) -> bool:
    path = Path(uri.removeprefix("file://").removeprefix("file:")).absolute()
    return path.is_relative_to(folder)


def _listed(jobs: Sequence[ListedJob]) -> list[ListedRun]:
    """Return the runs of jobs. Blocking."""
    runs = []
    for job in jobs:
        run_id = run_of_job(job.work_dir, job.name, job.id)
        if run_id is None or len(run_id) != _RUN_ID_LENGTH or not run_id.isalnum():
            continue
        files = RunFiles(job.work_dir, run_id)
        if not files.is_own():
            continue
        runs.append(
            ListedRun(
                run_id=run_id,
                backend=SlurmBackend.name,
                created=datetime.fromtimestamp(job.submitted, UTC),
                state=job.state.lower(),
                supervised=owner_lives(files.owner()) is not False,
                detail={"job": job.id},
                output=files.output,
            )
        )
    return runs


def _kept(work_dir: Path, run_ids: set[str]) -> list[tuple[RunFiles, str | None, ListedRun]]:
    """Return the runs in a work folder that no living process looks after, each with its job. Blocking."""
    found = []
    for files in folders_of_runs(work_dir):
        if (run_ids and files.run_id not in run_ids) or owner_lives(files.owner()) is not False:
            continue
        number = files.job()
        listed = ListedRun(
            run_id=files.run_id,
            backend=SlurmBackend.name,
            created=datetime.fromtimestamp(files.folder.stat().st_mtime, UTC),
            state="ended" if files.exit_record() is not None else "unknown",
            supervised=False,
            detail={} if number is None else {"job": number},
            output=files.output,
            size=size_on_disk(files.folder),
        )
        found.append((files, number, listed))
    return found
