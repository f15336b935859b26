"""Submits of runs: each as a job of its own, or those that wait at the same moment as one array."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import anyio

from mlfleet._concurrency.single_flight import Coalescing
from mlfleet._concurrency.threads import FILES
from mlfleet.backends.slurm.client import SlurmClient, Submission
from mlfleet.backends.slurm.run_files import RunFiles, link_array
from mlfleet.backends.slurm.script import array_script, batch_script
from mlfleet.errors import MlfleetError

__all__ = ["ArraySubmitter", "single"]

_GATHER = 0.2  # seconds in which submits with equal options gather for the first array


@dataclass(slots=True)
class _Waiting:
    files: RunFiles
    sweep_id: str | None
    job: asyncio.Future[str]


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
    )


class ArraySubmitter:
    """Submits runs as arrays.

    Runs with equal options that wait at the same moment become one array. A run that waits alone becomes a single job.

    Args:
        client: The client of the cluster.
    """

    def __init__(self, client: SlurmClient) -> None:
        self._client = client
        self._waiting: dict[object, list[_Waiting]] = {}
        self._submitting: Coalescing[object, None] = Coalescing()

    async def submit(self, files: RunFiles, arguments: tuple[str, ...], *, sweep_id: str | None) -> str:
        """Submit a run, and return the id of its job: ``48_7`` in an array. A cancelled call cancels the job.

        Args:
            files: The files of the run.
            arguments: The arguments of sbatch from the configuration and the resources.
            sweep_id: The MLflow run of the sweep that the run belongs to.

        Raises:
            MlfleetError: As `SlurmClient.submit`.
        """
        key = (files.work_dir, arguments)
        waiting = _Waiting(files, sweep_id, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(key, []).append(waiting)
        try:
            await self._submitting(key, partial(self._submit_waiting, key, arguments))
            if not waiting.job.done():  # it came while the array was being submitted
                await self._submitting(key, partial(self._submit_waiting, key, arguments))
            return await waiting.job
        except asyncio.CancelledError:
            if waiting in self._waiting.get(key, ()):
                self._waiting[key].remove(waiting)
            elif not waiting.job.done():
                waiting.job.cancel()
            elif not waiting.job.cancelled() and waiting.job.exception() is None:
                await self._client.cancel(waiting.job.result())
            raise

    async def _submit_waiting(self, key: object, arguments: tuple[str, ...]) -> None:
        await anyio.sleep(_GATHER)
        waiting = self._waiting.pop(key, [])
        for start in range(0, len(waiting), self._client.largest_array):
            chunk = waiting[start : start + self._client.largest_array]
            try:
                jobs = await self._submit_chunk(chunk, arguments)
            except BaseException as error:
                for each in waiting[start:]:
                    if not each.job.done():
                        each.job.set_exception(error if isinstance(error, MlfleetError) else asyncio.CancelledError())
                if not isinstance(error, MlfleetError):
                    raise
                return
            for each, job in zip(chunk, jobs, strict=True):
                if each.job.cancelled():
                    await self._client.cancel(job)
                else:
                    each.job.set_result(job)

    async def _submit_chunk(self, chunk: Sequence[_Waiting], arguments: tuple[str, ...]) -> list[str]:
        if len(chunk) == 1:
            return [await self._client.submit(single(chunk[0].files, arguments))]
        work_dir = chunk[0].files.work_dir
        name = f"mlfleet-{chunk[0].sweep_id or 'array'}-{os.urandom(4).hex()}"
        folder = await FILES.run(partial(link_array, work_dir, name, tuple(each.files for each in chunk)))
        job = await self._client.submit(
            Submission(
                name=name,
                script=array_script(folder),
                arguments=arguments,
                messages=f"{folder}/%a/slurm.log",
                work_dir=work_dir,
                count=len(chunk),
            )
        )
        return [f"{job}_{index}" for index in range(len(chunk))]
