"""Docker's registry (Debian's docker-registry) on loopback, open or with a password."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from components import free_port, missing, stop
from components.docker import DockerEngine

__all__ = ["Registry", "registry", "registry_with_password"]

STARTS_WITHIN = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class Registry:
    """A running registry.

    Attributes:
        host: The host as ``127.0.0.1:<port>``, which an engine of this machine accepts without TLS.
        username: The user name, if the registry asks for one.
        password: The password, if the registry asks for one.
    """

    host: str
    username: str = ""
    password: str = ""

    def push(self, engine: DockerEngine, image: str, name: str) -> str:
        """Push an image of the engine, remove it there, and return its name."""
        uri = f"{self.host}/{name}"
        repo, _, tag = uri.rpartition(":")
        engine.call("POST", f"/images/{image}/tag?repo={repo}&tag={tag}")
        credentials = {"username": self.username, "password": self.password, "serveraddress": self.host}
        header = base64.urlsafe_b64encode(json.dumps(credentials).encode()).decode()
        engine.call("POST", f"/images/{repo}/push?tag={tag}", headers={"X-Registry-Auth": header})
        engine.call("DELETE", f"/images/{uri}")
        return uri


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("registry")
    with _serve(folder, "") as host:
        yield Registry(host)


@pytest.fixture(scope="session")
def registry_with_password(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("registry-with-password")
    htpasswd = shutil.which("htpasswd") or missing("htpasswd", "apt-get install apache2-utils")
    username, password = "someone", "open-sesame-42"
    made = subprocess.run([htpasswd, "-Bbn", username, password], capture_output=True, text=True, check=True).stdout
    (folder / "htpasswd").write_text(made)
    with _serve(folder, f"auth: {{htpasswd: {{realm: tests, path: {folder}/htpasswd}}}}\n") as host:
        yield Registry(host, username, password)


@contextmanager
def _serve(folder: Path, more: str) -> Iterator[str]:
    program = shutil.which("docker-registry") or missing("Docker's registry", "apt-get install docker-registry")
    host = f"127.0.0.1:{free_port()}"
    config = folder / "config.yml"
    config.write_text(
        "version: 0.1\n"
        f"http: {{addr: '{host}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/images}}}}\n"
        "log: {level: error}\n" + more
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            _wait(host, process, folder / "log")
            yield host
        finally:
            stop(process)


def _wait(host: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(f"http://{host}/v2/", timeout=5):
                return
        except urllib.error.HTTPError:  # it asks for the password
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the registry did not start:\n{log.read_text(errors='replace')[-2000:]}")
