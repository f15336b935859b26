"""The contract in containers of a real engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio
import pytest

from components.docker import DockerEngine
from mlfleet._project.spec import DockerEnv
from mlfleet.backends.base import DockerRequest, Job
from mlfleet.backends.docker import DockerBackend
from mlfleet.testing import BackendContract, Harness


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
