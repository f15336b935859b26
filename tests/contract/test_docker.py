"""The contract in containers of a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import pytest

from components.docker import DockerEngine
from mlfleet._project.spec import DockerEnv
from mlfleet.backends.base import DockerRequest, Job
from mlfleet.backends.docker import DockerBackend
from mlfleet.errors import SubmitError
from mlfleet.testing import BackendContract, Bench, Harness


# Containers start in 0.3 s each on two free cores; the machines of CI are not free.
@pytest.mark.timeout(120)
class TestDocker(BackendContract):
    @pytest.fixture
    def harness(self, tmp_path: Path, docker_engine: DockerEngine, shell_image: str) -> Harness:
        project = tmp_path / "project"
        project.mkdir()
        (project / "project.txt").write_text("of the project\n")

        def job(run_id: str, command: str, **options: object) -> Job:
            return Job(
                run_id=run_id,
                experiment_id="0",
                project_name="contract",
                project_dir=project,
                command=command,
                output=tmp_path / run_id / "output.log",
                docker=DockerRequest(env=DockerEnv(image=shell_image), build_image=True),
                **options,  # type: ignore[arg-type]
            )

        async def leftovers(run_id: str) -> Sequence[str]:
            label = f"mlfleet.run-id={run_id}"
            found = await anyio.to_thread.run_sync(partial(docker_engine.containers, label))
            return [f"{item['Names']}: {item['State']}" for item in found]

        return Harness(open=DockerBackend, job=job, leftovers=leftovers)

    async def test_closing_the_backend_ends_its_runs_although_all_tasks_are_cancelled(self, harness: Harness) -> None:
        backend = await DockerBackend().__aenter__()
        bench = Bench(harness, backend)
        await bench.submit_ready("trap '' TERM; echo ready; sleep 600", cancel_grace=0.5)
        closing = asyncio.create_task(backend.__aexit__(None, None, None))
        await asyncio.sleep(0.1)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:  # as asyncio.run does at its end
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert await bench.leftovers() == []

    async def test_a_run_whose_container_is_refused_can_be_submitted_again(self, bench: Bench) -> None:
        job = bench.job("true")
        assert job.docker is not None
        job = replace(job, docker=replace(job.docker, args={"runtime": "none-such"}))
        for _ in range(2):
            with pytest.raises(SubmitError, match="none-such"):
                await bench.backend.submit(job)
