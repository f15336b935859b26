"""Helpers of the tests against the scripted Databricks workspace."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fakes.databricks import FakeRun, FakeWorkspace
from mlfleet.backends.base import Job
from mlfleet.backends.databricks import DatabricksBackend
from mlfleet.backends.databricks.client import Timing

__all__ = ["QUICK", "JobMaker", "lines_of", "make_jobs", "open_workspace", "succeed"]

QUICK = Timing(fast=0.1, after_failure=0.05, quota_pause=0.05)
"""Short intervals for a workspace on this machine; the rates are those of Databricks."""

JobMaker = Callable[..., Job]


@asynccontextmanager
async def open_workspace(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeWorkspace]:
    """Serve a scripted workspace during the block, and set the environment variables of its login."""
    async with FakeWorkspace().open() as fake:
        monkeypatch.setenv("DATABRICKS_HOST", fake.url)
        monkeypatch.setenv("DATABRICKS_TOKEN", fake.token)
        monkeypatch.setenv("DATABRICKS_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0.05")
        yield fake


def make_jobs(folder: Path) -> JobMaker:
    """Create a small project in `folder`, and return a function that makes jobs of it.

    The function takes a ``backend_config`` and fields of `Job`.
    """
    project = folder / "project"
    project.mkdir()
    (project / "train.py").write_text("print('hello')\n")

    def make(config: dict[str, Any] | None = None, **options: Any) -> Job:
        run_id = options.pop("run_id", uuid.uuid4().hex)
        return Job(
            run_id=run_id,
            experiment_id="0",
            project_name="demo",
            project_dir=options.pop("project_dir", project),
            command="python train.py",
            tracking_uri=options.pop("tracking_uri", "databricks"),
            output=folder / run_id / "output.log",
            config=DatabricksBackend().configure(config or {}),
            **options,
        )

    return make


def succeed(workspace: FakeWorkspace) -> Callable[[FakeRun], None]:
    """Return a function that ends a run successfully, with some output."""

    def end(run: FakeRun) -> None:
        workspace.put_output(run, b"done\n")
        run.set_state("TERMINATED", "SUCCESS")

    return end


async def lines_of(run: Any) -> list[str]:
    """Return the lines of a run's output, up to its end."""
    return [line async for line in run.logs()]
