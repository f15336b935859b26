"""The contract on real processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from mlfleet._paths import run_folder
from mlfleet.backends.base import Job
from mlfleet.backends.local.backend import LocalBackend
from mlfleet.testing import BackendContract, Harness

MARK = "CONTRACT_RUN"


def living_with(run_id: str) -> list[str]:
    """Return every live process that inherited the run's mark, including those in other groups and sessions."""
    found: list[str] = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        folder = Path("/proc", entry)
        try:
            if f"{MARK}={run_id}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(f"{entry}: {(folder / 'cmdline').read_bytes()!r}")
        except OSError:  # the process has ended, or belongs to another user
            continue
    return found


def local_harness(folder: Path, *, durable: bool) -> Harness:
    project = folder / "project"
    project.mkdir()
    (project / "project.txt").write_text("of the project\n")

    def job(run_id: str, command: str, *, environ: dict[str, str] | None = None, **options: object) -> Job:
        return Job(
            run_id=run_id,
            experiment_id="0",
            project_name="contract",
            project_dir=project,
            command=command,
            environ={**(environ or {}), MARK: run_id},
            output=run_folder(run_id) / "output.log",
            durable=durable,
            **options,  # type: ignore[arg-type]
        )

    async def leftovers(run_id: str) -> Sequence[str]:
        return await anyio.to_thread.run_sync(living_with, run_id)

    return Harness(open=LocalBackend, job=job, leftovers=leftovers)


class TestLocal(BackendContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        return local_harness(tmp_path, durable=False)


class TestDurableLocal(BackendContract):
    """Runs that are found again: a small shell stands between mlfleet and the command."""

    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        return local_harness(tmp_path, durable=True)
