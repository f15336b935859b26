"""Fixtures of the tests against the scripted Databricks workspace."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from components.fake_databricks import QUICK, JobMaker, make_jobs, open_workspace
from fakes.databricks import FakeWorkspace
from mlfleet.backends.databricks import DatabricksBackend


@pytest.fixture
async def workspace(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeWorkspace]:
    async with open_workspace(monkeypatch) as fake:
        yield fake


@pytest.fixture
async def backend(workspace: FakeWorkspace) -> AsyncIterator[DatabricksBackend]:
    async with DatabricksBackend(timing=QUICK) as backend:
        yield backend


@pytest.fixture
def make_job(tmp_path: Path) -> JobMaker:
    return make_jobs(tmp_path)
