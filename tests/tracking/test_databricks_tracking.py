"""Tracking in a scripted Databricks workspace: experiments in folders, limits of requests, artifacts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest

from components.fake_databricks import open_workspace
from fakes.databricks import USER, FakeWorkspace
from fakes.databricks_tracking import error
from fakes.flaky_proxy import Answer, Forward, Request
from mlfleet.errors import TrackingError
from mlfleet.tracking import Tracking, open_tracking


@pytest.fixture
async def workspace(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeWorkspace]:
    async with open_workspace(monkeypatch) as fake:
        yield fake


@pytest.fixture
async def tracking(workspace: FakeWorkspace) -> AsyncIterator[Tracking]:
    async with open_tracking("databricks") as tracking:
        yield tracking


# ---- experiments


@pytest.mark.parametrize("name", [f"/Users/{USER}/first", f"/Workspace/Users/{USER}/first"])
async def test_an_experiment_is_found_again_with_and_without_the_prefix(workspace: FakeWorkspace, name: str) -> None:
    for _ in range(2):
        async with open_tracking("databricks") as tracking:
            assert await tracking.experiment_id(name) == "700"
    assert workspace.mlflow.experiments == {f"/Users/{USER}/first": "700"}


async def test_missing_folders_of_an_experiment_are_made(tracking: Tracking, workspace: FakeWorkspace) -> None:
    name = f"/Users/{USER}/team/spring/first"
    run = await tracking.create_run(await tracking.experiment_id(name), name=None, tags={})
    assert run.experiment_id == workspace.mlflow.experiments[name]
    assert f"/Workspace/Users/{USER}/team/spring" in workspace.folders


async def test_an_experiment_in_the_folder_of_another_user_is_refused(tracking: Tracking) -> None:
    with pytest.raises(TrackingError, match=r"mkdirs.*may not create /Users/boss@example\.com"):
        await tracking.experiment_id("/Users/boss@example.com/first")


async def test_the_name_of_an_experiment_must_be_a_path(tracking: Tracking) -> None:
    with pytest.raises(TrackingError, match=r"must be an absolute path.*; .*--experiment-name /Users/<you>/<name>"):
        await tracking.experiment_id("first")


async def test_a_run_without_an_experiment_is_told_to_name_one(tracking: Tracking) -> None:
    with pytest.raises(TrackingError, match=r"has no default one; .*--experiment-name /Users/<you>/<name>"):
        await tracking.create_run("0", name=None, tags={})


# ---- limits


async def test_requests_stay_within_the_limits_of_the_workspace(
    tracking: Tracking, workspace: FakeWorkspace, caplog: pytest.LogCaptureFixture
) -> None:
    # Above the real limits, to allow for a slow machine, and below what this machine would send.
    workspace.limits = {"runs/log-batch": 70, "runs/search": 12, "/api/2.0/mlflow/": 180}
    run = await tracking.create_run(await tracking.experiment_id(f"/Users/{USER}/first"), name=None, tags={})
    with caplog.at_level(logging.WARNING):
        await asyncio.gather(
            *(tracking.log(run.run_id, tags={f"tag{number}": "x"}) for number in range(110)),
            *(tracking.search_runs([run.experiment_id]) for _ in range(16)),
            *(tracking.get_run(run.run_id) for _ in range(300)),
        )
    assert workspace.refused == 0
    assert caplog.text == ""


async def test_many_refused_requests_are_one_warning(
    tracking: Tracking, workspace: FakeWorkspace, caplog: pytest.LogCaptureFixture
) -> None:
    run = await tracking.create_run(await tracking.experiment_id(f"/Users/{USER}/first"), name=None, tags={})
    refused: set[str] = set()

    async def refuse_each_once(request: Request, forward: Forward) -> Answer | None:
        if request.target in refused:
            return await forward()
        refused.add(request.target)
        return error(429, "REQUEST_LIMIT_EXCEEDED", "too many requests")

    workspace.fault = refuse_each_once
    with caplog.at_level(logging.WARNING):
        await asyncio.gather(tracking.search_runs([run.experiment_id]), tracking.get_run(run.run_id))
    assert len(refused) == 2
    assert caplog.text.count("too many requests; trying again") == 1
