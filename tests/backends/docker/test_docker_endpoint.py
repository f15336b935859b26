"""The address of the engine: TLS over TCP, and contexts made by the docker command."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from components import free_port, missing
from components.certificates import write_certificates
from components.own_engine import OwnEngine, start_engine
from components.projects import write_project
from mlfleet import Fleet
from mlfleet.backends.docker.client import Endpoint, find_endpoint
from mlfleet.testing import FakeTracking

pytestmark = pytest.mark.timeout(120)  # an engine starts, on a busy machine


@dataclass(frozen=True, slots=True)
class TlsEngine:
    """An engine that asks clients for certificates.

    Attributes:
        url: The URL at which it listens.
        certificates: The folder of accepted certificates; those of another authority are in ``other`` beside it.
    """

    url: str
    certificates: Path

    @property
    def others(self) -> Path:
        return self.certificates.parent / "other"


@pytest.fixture(scope="module")
def tls_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsEngine]:
    mine = tmp_path_factory.mktemp("certificates") / "mine"
    write_certificates(mine, "", "server-")
    write_certificates(mine.parent / "other", "")
    url = f"tcp://127.0.0.1:{free_port()}"
    trust = (f"--tlscacert={mine}/ca.pem", f"--tlscert={mine}/server-cert.pem", f"--tlskey={mine}/server-key.pem")
    with start_engine(f"--host={url}", "--tlsverify", *trust):
        yield TlsEngine(url, mine)


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Docker's configuration, empty at first."""
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "config"))
    return tmp_path / "config"


async def said(folder: Path) -> str:
    """Return what a run prints, or why it failed."""
    uri = write_project(folder / "demo", "echo hello", extra=f"docker_env: {{image: '{OwnEngine.image}'}}\n")
    async with Fleet(tracking=FakeTracking()) as fleet:
        run = await fleet.submit(uri, docker_args={"network": "none"})
        outcome = await run.outcome()
        return outcome.reason or "\n".join([line async for line in run.logs()])


async def test_tls_with_certificates_that_fit(
    tls_engine: TlsEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", tls_engine.url)
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tls_engine.certificates))
    assert await said(tmp_path) == "hello"


async def test_tls_with_certificates_that_do_not_fit(
    tls_engine: TlsEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = tls_engine.url, tmp_path / "certificates"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_HOST", url)
    assert f"the Docker engine at {url} asks for TLS: set DOCKER_TLS_VERIFY=1" in await said(tmp_path)
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(folder))
    assert f"the certificate of the Docker engine at {url} is not trusted" in await said(tmp_path)
    shutil.copy(tls_engine.others / "ca.pem", folder)
    assert f"is {folder}/ca.pem that of its authority" in await said(tmp_path)
    shutil.copy(tls_engine.certificates / "ca.pem", folder)
    assert f"the Docker engine at {url} does not take the certificate in {folder}" in await said(tmp_path)
    shutil.copy(tls_engine.others / "cert.pem", folder)
    assert f"in {folder} need both, cert.pem and key.pem" in await said(tmp_path)
    shutil.copy(tls_engine.others / "key.pem", folder)
    assert f"the Docker engine at {url} does not take the certificate in {folder}" in await said(tmp_path)


def docker(*arguments: str) -> None:
    program = shutil.which("docker") or missing("the docker command", "apt-get install docker.io")
    subprocess.run([program, *arguments], check=True, capture_output=True)


async def test_contexts(tls_engine: TlsEngine, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tls_engine.certificates
    files = f"ca={mine}/ca.pem,cert={mine}/cert.pem,key={mine}/key.pem"
    docker("context", "create", "there", "--docker", f"host={tls_engine.url},{files}")
    docker("context", "create", "nowhere", "--docker", f"host=unix://{tmp_path}/nothing.sock")
    monkeypatch.setenv("DOCKER_CONTEXT", "there")
    assert await said(tmp_path) == "hello"
    monkeypatch.setenv("DOCKER_CONTEXT", "nobody")
    assert "the Docker context 'nobody' cannot be read from" in await said(tmp_path)
    monkeypatch.delenv("DOCKER_CONTEXT")
    docker("context", "use", "nowhere")
    assert f"there is no Docker engine at unix://{tmp_path}/nothing.sock" in await said(tmp_path)
    docker("context", "use", "there")
    assert await said(tmp_path) == "hello"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/elsewhere.sock")
    assert f"there is no Docker engine at unix://{tmp_path}/elsewhere.sock" in await said(tmp_path)
    assert find_endpoint({"DOCKER_CONTEXT": "default"}) == Endpoint("unix:///var/run/docker.sock")


@pytest.mark.parametrize(
    ("url", "local"),
    [("unix:///x.sock", True), ("tcp://127.0.0.1:2375", True), ("tcp://[::1]:1", True), ("tcp://10.0.0.1:2375", False)],
)
def test_an_engine_is_on_this_machine_as_far_as_its_address_tells(url: str, local: bool) -> None:
    assert find_endpoint({"DOCKER_HOST": url}).local is local
