"""Path parameters and artifacts in Google's and Azure's stores, in DBFS and in HDFS."""

from __future__ import annotations

import base64
import importlib.util
import json
import ssl
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from anyio import to_thread

from components import missing
from components.minilake import Minilake
from components.ssh_server import SshServer
from fakes.azure_blobs import AzureBlobs
from fakes.flaky_proxy import Answer, FlakyProxy, Request
from mlfleet._project.downloads import download_all
from mlfleet._project.parameters import Download
from mlfleet.errors import FetchError, TrackingError
from mlfleet.tracking.artifacts import download_object, upload_object

AZURE = "runs@account.blob.core.windows.net/a"
DRIVERS = {
    "gs://bucket/a": "gcsfs",
    "gcs://bucket/a": "gcsfs",
    "az://runs/a": "adlfs",
    "abfs://runs/a": "adlfs",
    f"abfss://{AZURE}": "adlfs",
    # What MLflow calls artifacts in Azure.
    f"wasbs://{AZURE}": "adlfs",
    f"wasb://{AZURE}": "adlfs",
}


class Workspace(FlakyProxy):
    """minilake by https, with one thing more that Databricks does: a GET may have its arguments in its body."""

    async def _forward(self, request: Request) -> Answer:
        if request.method == "GET" and request.body:
            target = f"{request.target}?{urlencode(json.loads(request.body))}"
            headers = {name: text for name, text in request.headers.items() if not name.startswith("content-")}
            request = replace(request, target=target, headers=headers, body=b"")
        return await super()._forward(request)


async def no_artifacts(uri: str, folder: Path) -> Path:
    raise AssertionError(f"{uri} is no artifact")


async def download(uri: str, storage: Path) -> Path:
    return Path((await download_all([Download("data", uri, 2)], storage, no_artifacts))["data"])


async def failure(uri: str, storage: Path) -> str:
    with pytest.raises(FetchError) as caught:
        await download(uri, storage)
    assert list(storage.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize(("uri", "driver"), DRIVERS.items())
async def test_a_driver_that_is_missing_is_named(
    uri: str, driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, driver, None)
    assert f"run: pip install 'mlfleet[remote]' {driver}" in await failure(uri, tmp_path)
    with pytest.raises(TrackingError, match=rf"pip install 'mlfleet\[remote\]' {driver}"):
        await to_thread.run_sync(download_object, uri, tmp_path / "x")


@pytest.mark.timeout(60)  # pyarrow takes its time to be imported
@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")
async def test_hdfs_without_java_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "none"))
    (tmp_path / "storage").mkdir()
    text = await failure("hdfs://namenode:8020/data.csv", tmp_path / "storage")
    assert "Unable to load lib" in text
    assert "hdfs: needs Java and Hadoop's client here, webhdfs: does not" in text
    assert "dlopen" not in text


async def test_sftp(ssh_server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("paramiko")
    keys, there, here = tmp_path / "home" / ".ssh", tmp_path / "there", tmp_path / "here"
    for folder in (keys, there, here):
        folder.mkdir(parents=True)
    (keys / "id_ed25519").write_bytes(ssh_server.key.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    uri = f"sftp://{ssh_server.user}@127.0.0.1:{ssh_server.port}{there}"
    (here / "a.csv").write_text("1,2")
    await to_thread.run_sync(upload_object, here / "a.csv", f"{uri}/sub/a.csv")
    assert (there / "sub" / "a.csv").read_text() == "1,2"
    assert ((await download(uri, here)) / "sub" / "a.csv").read_text() == "1,2"
    await to_thread.run_sync(download_object, f"{uri}/sub/a.csv", here / "b.csv")
    assert (here / "b.csv").read_text() == "1,2"


@pytest.mark.timeout(120)  # Google's libraries take their time to be imported
async def test_google(gcs_emulator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    # Neither credentials of this machine, nor a machine of Google's, are looked for.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    await there_and_back("gs://bucket/runs", tmp_path)


@pytest.mark.timeout(90)  # so do Azure's
@pytest.mark.parametrize("root", ["abfs://runs/a", f"abfss://{AZURE}", f"wasbs://{AZURE}", f"wasb://{AZURE}"])
async def test_azure(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("adlfs") is None:
        missing("adlfs", "pip install adlfs")
    blobs = AzureBlobs()
    key = base64.b64encode(b"the key of the account").decode()
    async with blobs.listen():
        monkeypatch.setenv(
            "AZURE_STORAGE_CONNECTION_STRING",
            f"DefaultEndpointsProtocol=http;AccountName=account;AccountKey={key};BlobEndpoint={blobs.url}/account;",
        )
        await there_and_back(root, tmp_path)
    assert all(request.headers["authorization"].startswith("SharedKey account:") for request in blobs.requests)


async def there_and_back(root: str, tmp_path: Path) -> None:
    """Artifacts to a store, and from there as artifacts and as the values of parameters."""
    # Less than a MiB: their libraries hand more to aiohttp in a way that it warns of.
    large = bytes(range(256)) * 4_000
    (tmp_path / "a.bin").write_bytes(large)
    for name in ("one/a.bin", "one/deep/b c.bin", "other"):
        await to_thread.run_sync(upload_object, tmp_path / "a.bin", f"{root}/{name}")
    await to_thread.run_sync(download_object, f"{root}/one", tmp_path / "artifacts")
    (tmp_path / "storage").mkdir()
    got = await download(f"{root}/one", tmp_path / "storage")
    for folder in (tmp_path / "artifacts", got):
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        assert sorted(files) == ["a.bin", "deep/b c.bin"]
        assert all(path.read_bytes() == large for path in files.values())
    (tmp_path / "single").mkdir()
    assert (await download(f"{root}/one/deep/b c.bin", tmp_path / "single")).read_bytes() == large
    (tmp_path / "nothing").mkdir()
    assert "there is nothing of that name" in await failure(f"{root}/nothing", tmp_path / "nothing")


@pytest.mark.timeout(90)  # the emulator starts
async def test_dbfs(minilake: Minilake, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = bytes(range(256)) * 10_000
    async with httpx.AsyncClient(base_url=f"{minilake.url}/api/2.0/dbfs/", trust_env=False) as client:
        for name, data in {"/sets/one/a.bin": large, "/sets/one/deep/b c.txt": b"b", "/sets/other": b"no"}.items():
            await put(client, name, data)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "both.pem")
    async with Workspace(minilake.url, tls=context).listen() as workspace:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates / "certificate.pem"))
        monkeypatch.setenv("DATABRICKS_HOST", workspace.url)
        monkeypatch.setenv("DATABRICKS_TOKEN", "dapi-secret-token")
        got = await download("dbfs:/sets/one", tmp_path)
        assert (got / "a.bin").read_bytes() == large
        assert (got / "deep" / "b c.txt").read_bytes() == b"b"
        assert workspace.requests[0].headers["authorization"] == "Bearer dapi-secret-token"
        (tmp_path / "again").mkdir()
        assert (await download("dbfs:/sets/one/a.bin", tmp_path / "again")).read_bytes() == large
        (tmp_path / "nothing").mkdir()
        text = await failure("dbfs:/sets/nothing", tmp_path / "nothing")
    assert "there is nothing of that name" in text
    assert "dapi-secret-token" not in text


async def put(client: httpx.AsyncClient, path: str, data: bytes) -> None:
    async def post(call: str, **body: Any) -> Any:
        return (await client.post(call, json=body)).raise_for_status().json()

    handle = (await post("create", path=path, overwrite=True))["handle"]
    for start in range(0, len(data), 2**19):
        await post("add-block", handle=handle, data=base64.b64encode(data[start : start + 2**19]).decode())
    await post("close", handle=handle)
