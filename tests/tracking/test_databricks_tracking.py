"""Tracking in a scripted Databricks workspace: experiments in folders, limits of requests, artifacts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import anyio.to_thread
import pytest

from components.fake_databricks import open_workspace
from components.projects import write_project
from fakes.databricks import USER, FakeWorkspace
from fakes.databricks_tracking import SIGNATURE, error
from fakes.flaky_proxy import Answer, Forward, Request
from mlfleet import Fleet
from mlfleet.errors import TrackingError
from mlfleet.tracking import RunInfo, Tracking, open_tracking


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


# ---- artifacts


@pytest.fixture
async def run(tracking: Tracking) -> RunInfo:
    return await tracking.create_run(await tracking.experiment_id(f"/Users/{USER}/first"), name=None, tags={})


KINDS = ["AWS_PRESIGNED_URL", "AZURE_SAS_URI", "AZURE_ADLS_GEN2_SAS_URI", "GCP_SIGNED_URL"]


@pytest.mark.parametrize("kind", KINDS)
async def test_an_artifact_goes_to_the_storage_of_every_cloud(
    tracking: Tracking, workspace: FakeWorkspace, run: RunInfo, tmp_path: Path, kind: str
) -> None:
    workspace.mlflow.storage = kind
    contents = {"output.log": b"a line\n" * 400_000, "50% of #1?.txt": b"x", "empty": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        await tracking.log_artifact(run, tmp_path / name, "logs")
    assert workspace.mlflow.artifacts == {(run.run_id, f"logs/{name}"): text for name, text in contents.items()}
    (tmp_path / "here").mkdir()
    found = await tracking.download(f"runs:/{run.run_id}/logs", tmp_path / "here")
    assert {path.name: path.read_bytes() for path in found.iterdir()} == contents


async def test_the_output_of_a_run_is_logged(workspace: FakeWorkspace, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo hello")
    async with Fleet(tracking_uri="databricks") as fleet:
        run = await fleet.submit(uri, experiment_name=f"/Workspace/Users/{USER}/first", log_output=True)
        assert await run.wait() is True
    assert workspace.mlflow.artifacts == {(run.run_id, "output.log"): b"hello\n"}


async def test_folders_are_downloaded_from_all_pages_of_their_lists(
    tracking: Tracking, workspace: FakeWorkspace, run: RunInfo, tmp_path: Path
) -> None:
    workspace.mlflow.page = 2
    names = ["MLmodel", "model.pkl", "metadata/one", "metadata/deep/two", "metadata/three", "env.yaml"]
    workspace.mlflow.artifacts = {(run.run_id, f"model/{name}"): name.encode() for name in names}
    model = await tracking.download(f"runs:/{run.run_id}/model", tmp_path)
    found = {str(path.relative_to(model)): path.read_text() for path in model.rglob("*") if path.is_file()}
    assert found == {name: name for name in names}
    file = await tracking.download(f"dbfs:/databricks/mlflow-tracking/7/{run.run_id}/artifacts/model/MLmodel", tmp_path)
    assert file.read_text() == "MLmodel"


async def test_a_logged_model_is_downloaded(tracking: Tracking, workspace: FakeWorkspace, tmp_path: Path) -> None:
    workspace.mlflow.artifacts = {("m-1", "MLmodel"): b"flavors", ("m-1", "data/weights"): b"1 2 3"}
    found = await tracking.download("dbfs:/databricks/mlflow-tracking/7/logged_models/m-1/artifacts", tmp_path)
    assert (found / "data" / "weights").read_bytes() == b"1 2 3"


async def test_a_missing_artifact_is_reported_and_leaves_nothing(
    tracking: Tracking, run: RunInfo, tmp_path: Path
) -> None:
    with pytest.raises(TrackingError, match=f"there is no artifact 'model' of {run.run_id}"):
        await tracking.download(f"runs:/{run.run_id}/model", tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_faults_of_the_storage_are_tried_again_with_a_new_url(
    tracking: Tracking, workspace: FakeWorkspace, run: RunInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [Answer(503), None, Answer(500)]

    async def fail(request: Request, forward: Forward) -> Answer | None:
        return faults.pop() if "/storage/" in request.target and faults else await forward()

    workspace.fault = fail
    (tmp_path / "output.log").write_text("a line\n")
    await tracking.log_artifact(run, tmp_path / "output.log")
    assert workspace.mlflow.artifacts[run.run_id, "output.log"] == b"a line\n"
    assert workspace.count("credentials-for-write") == 4

    async def refuse(request: Request, forward: Forward) -> Answer | None:
        return Answer(403, b"<Error/>") if "/storage/" in request.target else await forward()

    workspace.fault = refuse
    with pytest.raises(
        TrackingError, match=r"the storage 127\.0\.0\.1 of the artifact 'output\.log' answered with 403"
    ):
        await tracking.log_artifact(run, tmp_path / "output.log")
    assert SIGNATURE not in caplog.text


async def test_mlflow_itself_reads_and_writes_the_same_artifacts(
    tracking: Tracking, workspace: FakeWorkspace, run: RunInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR")  # mlflow takes whole numbers only
    (tmp_path / "ours.txt").write_text("ours\n")
    (tmp_path / "theirs.txt").write_text("theirs\n")
    await tracking.log_artifact(run, tmp_path / "ours.txt", "texts")

    def ask() -> str:
        from mlflow.store.artifact.databricks_artifact_repo import DatabricksArtifactRepository

        repository = DatabricksArtifactRepository(run.artifact_uri)
        repository.log_artifact(str(tmp_path / "theirs.txt"), "texts")
        folder = repository.download_artifacts("texts", str(tmp_path))
        return Path(folder, "ours.txt").read_text()

    assert await anyio.to_thread.run_sync(ask) == "ours\n"
    (tmp_path / "here").mkdir()
    found = await tracking.download(f"runs:/{run.run_id}/texts/theirs.txt", tmp_path / "here")
    assert found.read_text() == "theirs\n"
