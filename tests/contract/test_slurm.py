"""The contract on a real Slurm of one node, without cgroups."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio.to_thread
import pytest

from components.slurm import QUICK, Slurm
from mlfleet.backends.base import Job
from mlfleet.backends.slurm import SlurmBackend
from mlfleet.testing import BackendContract, Harness


@pytest.mark.timeout(120)
class TestSlurm(BackendContract):
    @pytest.fixture
    def harness(self, tmp_path: Path, slurm: Slurm) -> Harness:
        project = tmp_path / "project"
        project.mkdir()
        (project / "project.txt").write_text("of the project\n")
        config = SlurmBackend().configure({"latency": 5})

        def job(run_id: str, command: str, *, environ: dict[str, str] | None = None, **options: object) -> Job:
            return Job(
                run_id=run_id,
                experiment_id="0",
                project_name="contract",
                project_dir=project,
                command=command,
                environ={**(environ or {}), "MLFLEET_TEST_RUN": run_id},
                output=tmp_path / "outputs" / run_id / "output.log",
                config=config,
                **options,  # type: ignore[arg-type]
            )

        async def leftovers(run_id: str) -> Sequence[str]:
            return await anyio.to_thread.run_sync(slurm.processes, run_id)

        return Harness(open=partial(SlurmBackend, timing=QUICK), job=job, leftovers=leftovers, lag=0.5)
