"""The backend on a real Slurm, with jobs that say what happens to them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from components.slurm import QUICK, Slurm
from mlfleet.backends.base import Job
from mlfleet.backends.slurm import SlurmBackend

MakeJob = Callable[..., Job]


@pytest_asyncio.fixture
async def backend(slurm: Slurm) -> AsyncIterator[SlurmBackend]:
    async with SlurmBackend(timing=QUICK) as backend:
        yield backend


@pytest.fixture
def make_job(slurm: Slurm, tmp_path: Path) -> MakeJob:
    project = tmp_path / "project"
    project.mkdir()
    (project / "project.txt").write_text("of the project\n")

    def make(command: str, config: dict[str, Any] | None = None, **options: Any) -> Job:
        run_id = uuid.uuid4().hex
        return Job(
            run_id=run_id,
            experiment_id="0",
            project_name="demo",
            project_dir=project,
            command=command,
            environ={"MLFLEET_TEST_RUN": run_id},
            output=tmp_path / "outputs" / run_id / "output.log",
            config=SlurmBackend().configure({"latency": 5, **(config or {})}),
            **options,
        )

    return make
