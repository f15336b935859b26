"""Artifacts by way of a real MLflow server, through a network that tears, and in S3."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from components import missing
from components.mlflow_server import MlflowServer
from fakes.flaky_proxy import Answer, FlakyProxy, Forward, Request
from mlfleet.errors import MlfleetError, TrackingError
from mlfleet.runs import RunStatus
from mlfleet.tracking import RestTracking, RunInfo


@pytest.fixture
async def tracking(proxy: FlakyProxy) -> AsyncIterator[RestTracking]:
    async with RestTracking(proxy.url) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "downloads"
    made.mkdir()
    return made


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


async def test_files_and_folders_with_any_name_come_back(tracking: RestTracking, tmp_path: Path, folder: Path) -> None:
    run = await tracking.create_run("0", name=None, tags={})
    for name in ("plain.txt", "ü %b+&.txt"):
        (tmp_path / name).write_text(name)
        await tracking.log_artifact(run, tmp_path / name)
        await tracking.log_artifact(run, tmp_path / name, "deep/ü r")
    whole = await tracking.download(f"runs:/{run.run_id}", folder)
    assert left(whole) == ["deep/ü r/plain.txt", "deep/ü r/ü %b+&.txt", "plain.txt", "ü %b+&.txt"]
    part = await tracking.download(f"runs:/{run.run_id}/deep/ü r", folder)
    assert (part, left(part)) == (folder / "ü r", ["plain.txt", "ü %b+&.txt"])
    one = await tracking.download(f"{run.artifact_uri}/plain.txt", folder)
    assert (one, one.read_text()) == (folder / "plain.txt", "plain.txt")


async def test_a_file_with_the_name_of_its_folder(tracking: RestTracking, tmp_path: Path, folder: Path) -> None:
    run = await tracking.create_run("0", name=None, tags={})
    (tmp_path / "model").write_text("weights")
    await tracking.log_artifact(run, tmp_path / "model", "inner")
    assert (await tracking.download(f"runs:/{run.run_id}/inner/model", folder)).read_text() == "weights"


async def test_a_big_file_survives_broken_connections(
    tracking: RestTracking, proxy: FlakyProxy, tmp_path: Path, folder: Path
) -> None:
    run = await tracking.create_run("0", name=None, tags={})
    content = os.urandom(5 * 2**20 + 17)
    file = tmp_path / "big.bin"
    file.write_bytes(content)

    async def tear_the_first(request: Request, forward: Forward) -> Answer | None:
        first = sum(seen.method == request.method and seen.target == request.target for seen in proxy.requests) == 1
        if request.method == "PUT" and first:
            return Answer(503)
        answer = await forward()
        torn = request.method == "GET" and first and request.target.endswith("big.bin")
        return Answer(answer.status, answer.body, answer.headers, sent=2**20) if torn else answer

    proxy.rule = tear_the_first
    await tracking.log_artifact(run, file)
    got = await tracking.download(f"runs:/{run.run_id}/big.bin", folder)
    assert hashlib.sha256(got.read_bytes()).digest() == hashlib.sha256(content).digest()


async def test_a_missing_artifact_is_named_and_leaves_no_file(tracking: RestTracking, folder: Path) -> None:
    run = await tracking.create_run("0", name=None, tags={})
    with pytest.raises(TrackingError, match=r"No such artifact.*nope"):
        await tracking.download(f"runs:/{run.run_id}/nope", folder)
    assert list(folder.iterdir()) == []


async def test_a_cancelled_download_leaves_nothing(
    tracking: RestTracking, proxy: FlakyProxy, tmp_path: Path, folder: Path
) -> None:
    run = await tracking.create_run("0", name=None, tags={})
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
        await tracking.log_artifact(run, tmp_path / name)
    second = asyncio.Event()

    async def stop_at_the_second(request: Request, forward: Forward) -> Answer | None:
        if request.target.endswith("b.txt"):
            second.set()
            await asyncio.Event().wait()
        return await forward()

    proxy.rule = stop_at_the_second
    task = asyncio.create_task(tracking.download(f"runs:/{run.run_id}", folder))
    await second.wait()
    assert left(folder) != []
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["../evil", "..", "/etc/evil", "a\\b", "", None])
async def test_a_server_cannot_write_outside_of_the_folder(
    tracking: RestTracking, proxy: FlakyProxy, folder: Path, name: str | None
) -> None:
    run = await tracking.create_run("0", name=None, tags={})

    async def lie(request: Request, forward: Forward) -> Answer | None:
        if "artifacts?" not in request.target:
            return await forward()
        files = [{"path": name, "is_dir": False}, {"path": "other", "is_dir": False}]
        return Answer(200, json.dumps({"files": files}).encode())

    proxy.rule = lie
    with pytest.raises(TrackingError, match="not safe to write"):
        await tracking.download(f"runs:/{run.run_id}", folder)
    assert left(folder.parent) == []


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("runs:/abc/../../x", "leads out of the artifacts"),
        ("runs:/", "names no run"),
        ("runs://host/abc", "names no run"),
        ("models:/", "names no model"),
        ("models:/name", "names no version of the model 'name'"),
        ("mlflow-artifacts:/a/../../b", "leads out of the artifacts"),
        ("mlflow-artifacts://elsewhere:1/a", "is on another server"),
        ("dbfs:/somewhere", "dbfs: URIs are not supported"),
    ],
)
async def test_a_wrong_uri_says_what_is_wrong(tracking: RestTracking, folder: Path, uri: str, text: str) -> None:
    with pytest.raises(MlfleetError, match=text):
        await tracking.download(uri, folder)


async def test_a_file_that_is_not_there_cannot_be_logged(tracking: RestTracking, tmp_path: Path) -> None:
    run = await tracking.create_run("0", name=None, tags={})
    with pytest.raises(TrackingError, match=r"missing.txt cannot be read: No such file"):
        await tracking.log_artifact(run, tmp_path / "missing.txt")


async def test_models_of_the_registry(
    tracking: RestTracking, mlflow_server: MlflowServer, tmp_path: Path, folder: Path
) -> None:
    run = await tracking.create_run("0", name=None, tags={})
    (tmp_path / "MLmodel").write_text("flavors: {}")
    await tracking.log_artifact(run, tmp_path / "MLmodel", "model")
    await tracking.update_run(run.run_id, RunStatus.FINISHED)
    source = f"{run.artifact_uri}/model"
    async with httpx.AsyncClient(base_url=f"{mlflow_server.url}/api/2.0/mlflow/") as client:

        async def post(path: str, **body: Any) -> None:
            (await client.post(path, json=body)).raise_for_status()

        await post("registered-models/create", name="a model")
        await post("model-versions/create", name="a model", source=source, run_id=run.run_id)
        await post("registered-models/alias", name="a model", alias="champion", version="1")
    for number, which in enumerate(("/1", "/latest", "@champion", "/1/MLmodel")):
        place = folder / str(number)
        place.mkdir()
        got = await tracking.download(f"models:/a model{which}", place)
        assert (got if got.is_file() else got / "MLmodel").read_text() == "flavors: {}"
    with pytest.raises(TrackingError, match="has no version in the stage 'Production'"):
        await tracking.download("models:/a model/Production", folder)
    with pytest.raises(TrackingError, match="nobody"):
        await tracking.download("models:/a model@nobody", folder)


async def test_artifacts_in_a_folder_that_server_and_client_share(
    tracking: RestTracking, tmp_path: Path, folder: Path
) -> None:
    shared = tmp_path / "shared disk"
    run = RunInfo("r", "0", "n", RunStatus.RUNNING, artifact_uri=shared.as_uri())
    (tmp_path / "a.txt").write_text("a")
    await tracking.log_artifact(run, tmp_path / "a.txt", "sub")
    got = await tracking.download(f"{shared.as_uri()}/sub", folder)
    assert (got / "a.txt").read_text() == "a"
    (tmp_path / "file").write_text("in the way")
    blocked = RunInfo("r", "0", "n", RunStatus.RUNNING, artifact_uri=f"{tmp_path}/file/x")
    with pytest.raises(TrackingError, match="start the server with --serve-artifacts"):
        await tracking.log_artifact(blocked, tmp_path / "a.txt")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    if not all(importlib.util.find_spec(name) for name in ("moto", "s3fs")):
        missing("moto's S3 server", "pip install 'moto[server]' s3fs")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.mark.timeout(60)  # botocore reads its many descriptions of services first
async def test_artifacts_in_s3(
    tracking: RestTracking, tmp_path: Path, folder: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    async with httpx.AsyncClient() as client:
        (await client.put(f"{s3}/bucket")).raise_for_status()
    run = RunInfo("r", "0", "n", RunStatus.RUNNING, artifact_uri="s3://bucket/runs/r/artifacts")
    (tmp_path / "a.txt").write_text("a")
    await tracking.log_artifact(run, tmp_path / "a.txt")
    await tracking.log_artifact(run, tmp_path / "a.txt", "sub")
    got = await tracking.download(run.artifact_uri, folder)
    assert left(got) == ["a.txt", "sub/a.txt"]
    assert (await tracking.download(f"{run.artifact_uri}/a.txt", folder)).read_text() == "a"
    with pytest.raises(TrackingError, match="there is no artifact"):
        await tracking.download("s3://bucket/nothing", folder)
    with pytest.raises(TrackingError, match="cannot be"):
        await tracking.download("s3://no-such-bucket/x", folder)
