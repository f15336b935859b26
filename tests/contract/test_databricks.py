"""The contract in an emulated Databricks workspace, where the jobs really run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from components.fake_databricks import QUICK
from components.minilake import MARK, SCOPE, Databricks, processes_of
from mlfleet.backends.base import Job
from mlfleet.backends.databricks import DatabricksBackend
from mlfleet.testing import BackendContract, Harness


# The emulator runs six at a time.
@pytest.mark.timeout(120)
class TestDatabricks(BackendContract):
    @pytest.fixture
    def harness(self, tmp_path: Path, databricks: Databricks) -> Harness:
        project = tmp_path / "project"
        project.mkdir()
        (project / "project.txt").write_text("of the project\n")
        config = DatabricksBackend().configure(
            {"new_cluster": {"spark_version": "15.4.x-scala2.12", "num_workers": 0}, "secret_scope": SCOPE}
        )

        def job(run_id: str, command: str, *, environ: dict[str, str] | None = None, **options: object) -> Job:
            return Job(
                run_id=run_id,
                experiment_id="0",
                project_name="contract",
                project_dir=project,
                command=command,
                environ={**(environ or {}), MARK: run_id},
                output=tmp_path / run_id / "output.log",
                config=config,
                tracking_uri="databricks",
                **options,  # type: ignore[arg-type]
            )

        async def leftovers(run_id: str) -> Sequence[str]:
            return await anyio.to_thread.run_sync(processes_of, run_id)

        return Harness(open=partial(DatabricksBackend, timing=QUICK), job=job, leftovers=leftovers, lag=2.0)
