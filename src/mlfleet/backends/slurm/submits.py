"""Submits of runs: each as a job of its own, or those that follow each other as one array."""

from __future__ import annotations

import asyncio
import copy
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import anyio

from mlfleet._concurrency.cancellation import complete, wait_done
from mlfleet._concurrency.threads import FILES
from mlfleet._run_log import get_logger
from mlfleet._store.content_store import remove_tree
from mlfleet.backends.slurm.client import SlurmClient, SlurmError, Submission
from mlfleet.backends.slurm.run_files import RunFiles, link_array
from mlfleet.backends.slurm.script import array_script, batch_script
from mlfleet.errors import SubmitError

__all__ = ["ArraySubmitter", "single"]

_log = get_logger("mlfleet.slurm")
_GATHER = 0.5  # seconds without a further submit with equal options after which an array is complete
_GATHER_AT_MOST = 3.0  # seconds after which it is submitted although further runs come


@dataclass(frozen=True, slots=True)
class _Waiting:
    files: RunFiles
    sweep_id: str | None
    job: asyncio.Future[str]


@dataclass(slots=True, eq=False)
class _Batch:
    """Runs that are submitted together by one task."""

    runs: list[_Waiting] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    def release(self, _: object = None) -> None:
        """Cancel the futures that the task has not set, such as those of a task that was cancelled itself."""
        for each in self.runs:
            each.job.cancel()


def single(files: RunFiles, arguments: tuple[str, ...]) -> Submission:
    """Return the submission of one run as a job of its own.

    Args:
        files: The files of the run.
        arguments: The arguments of sbatch from the configuration and the resources.
    """
    return Submission(
        name=f"mlfleet-{files.run_id}",
        script=batch_script(files.folder),
        arguments=arguments,
        messages=str(files.messages),
        work_dir=files.work_dir,
        earlier=files.earlier,
    )


class ArraySubmitter:
    """Submits runs as arrays.

    Runs with equal options that follow each other become one array. A run that comes alone becomes a single job.

    Args:
        client: The client of the cluster.
    """

    def __init__(self, client: SlurmClient) -> None:
        self._client = client
        self._gathering: dict[object, _Batch] = {}
        self._locks: dict[object, anyio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, files: RunFiles, arguments: tuple[str, ...], *, sweep_id: str | None) -> str:
        """Submit a run, and return the id of its job: ``48_7`` in an array.

        A cancelled call cancels the job of this run, and leaves the other runs of the array alone.

        Args:
            files: The files of the run.
            arguments: The arguments of sbatch from the configuration and the resources.
            sweep_id: The MLflow run of the sweep that the run belongs to.

        Raises:
            MlfleetError: As `SlurmClient.submit`.
        """
        key = (files.work_dir, arguments)
        waiting = _Waiting(files, sweep_id, asyncio.get_running_loop().create_future())
        batch = self._gathering.get(key)
        if batch is None:
            batch = self._gathering[key] = _Batch()
            batch.task = asyncio.ensure_future(self._submit_batch(key, arguments, batch))
            self._tasks.add(batch.task)
            batch.task.add_done_callback(self._tasks.discard)
            batch.task.add_done_callback(batch.release)
        batch.runs.append(waiting)
        try:
            return await waiting.job
        except asyncio.CancelledError:
            if not waiting.job.cancelled():  # the answer came together with the cancellation
                if waiting.job.exception() is None:
                    await complete(partial(self._cancel, [waiting.job.result()]))
            elif batch.task is not None and all(each.job.done() for each in batch.runs):
                self._close(key, batch)
                batch.task.cancel()
                await wait_done(batch.task)
            raise

    async def close(self) -> None:
        """Wait until the jobs of cancelled calls are cancelled. There must be no other calls."""
        while self._tasks:
            await asyncio.wait(tuple(self._tasks))

    def _close(self, key: object, batch: _Batch) -> None:
        """Let the next run begin a new batch."""
        if self._gathering.get(key) is batch:
            del self._gathering[key]

    async def _submit_batch(self, key: object, arguments: tuple[str, ...], batch: _Batch) -> None:
        # While an array is being submitted the runs of the next one gather.
        async with self._locks.setdefault(key, anyio.Lock()):
            count = max(1, self._client.largest_array)  # MaxArraySize=0: the cluster takes no arrays
            # A sweep's runs come one after the other, as fast as the tracking server creates them.
            deadline, gathered = time.monotonic() + _GATHER_AT_MOST, 0
            while gathered < len(batch.runs) < count and time.monotonic() < deadline:
                gathered = len(batch.runs)
                await anyio.sleep(_GATHER)
            self._close(key, batch)
            for start in range(0, len(batch.runs), count):
                await self._submit_chunk(batch.runs[start : start + count], arguments)

    async def _submit_chunk(self, chunk: Sequence[_Waiting], arguments: tuple[str, ...]) -> None:
        runs = [each for each in chunk if not each.job.done()]
        if not runs:
            return
        try:
            jobs = await self._sbatch(runs, arguments)
        except Exception as error:
            for each in runs:
                if not each.job.done():
                    each.job.set_exception(copy.copy(error))
            return
        unwanted = []
        for each, job in zip(runs, jobs, strict=True):
            if each.job.done():
                unwanted.append(job)
            else:
                each.job.set_result(job)
        if unwanted:
            await self._cancel(unwanted)

    async def _sbatch(self, runs: Sequence[_Waiting], arguments: tuple[str, ...]) -> list[str]:
        if len(runs) == 1:
            return [await self._client.submit(single(runs[0].files, arguments))]
        work_dir = runs[0].files.work_dir
        name = f"mlfleet-{runs[0].sweep_id or 'array'}-{os.urandom(4).hex()}"
        folder = work_dir / "arrays" / name
        try:
            await FILES.run(partial(link_array, folder, tuple(each.files for each in runs)))
            job = await self._client.submit(
                Submission(
                    name=name,
                    script=array_script(folder),
                    arguments=arguments,
                    messages=f"{folder}/%a/slurm.log",
                    work_dir=work_dir,
                    count=len(runs),
                )
            )
        except BaseException as error:
            await FILES.finish(partial(remove_tree, folder))
            if isinstance(error, OSError):
                text = f"the array's files cannot be written below {work_dir}: {error.strerror}"
                raise SubmitError(text, backend="slurm") from error
            raise
        return [f"{job}_{index}" for index in range(len(runs))]

    async def _cancel(self, jobs: Sequence[str]) -> None:
        try:
            await self._client.cancel(*jobs)
        except SlurmError as error:
            _log.warning("jobs of cancelled runs could not be cancelled (%s): %s", ", ".join(jobs), error)
