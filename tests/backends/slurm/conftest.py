"""The backend on a real Slurm, with jobs that say what happens to them."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
import pytest_asyncio

from components.slurm import QUICK, Slurm
from mlfleet.backends._remote.owner import describe_this_process
from mlfleet.backends.base import BackendRun, Job
from mlfleet.backends.slurm import SlurmBackend
from mlfleet.backends.slurm.run import SlurmRun

MakeJob = Callable[..., Job]
OnPath = Callable[[str, str], None]


async def line_of(run: BackendRun, text: str) -> None:
    async for line in run.logs():
        if line == text:
            return
    raise AssertionError(f"the run ended without {text!r}: {await run.outcome()}")


async def running(backend: SlurmBackend, job: Job) -> SlurmRun:
    run = await backend.submit(job)
    await line_of(run, "ready")
    return run


async def leave(slurm: Slurm, run_id: str) -> None:
    """Let the process that looks after a run be one that has ended."""
    owner = {**await anyio.to_thread.run_sync(describe_this_process), "started": 1}
    (slurm.work_dir / "runs" / run_id / "owner").write_text(json.dumps(owner))


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


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnPath:
    """Put scripts in front of client programs on PATH; a script finds the real one as $real."""
    folder = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(program: str, script: str) -> None:
        folder.mkdir(exist_ok=True)
        path = folder / program
        path.write_text(f"#!/bin/bash\nreal=/usr/bin/{program}\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return put
