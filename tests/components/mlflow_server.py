"""Real MLflow servers on loopback, with sqlite and their artifacts in a temporary folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from components import free_port, missing

STARTS_WITHIN = 120.0
"""Seconds; a server takes about 10 on an idle machine."""


@dataclass(frozen=True, slots=True)
class MlflowServer:
    """A running server.

    Attributes:
        url: its tracking URI.
        folder: with its database ``mlflow.db`` and its artifacts.
        username: of its administrator, where it asks for one.
        password: likewise.
    """

    url: str
    folder: Path
    username: str = ""
    password: str = ""


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server that asks nobody who he is."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    with serve(folder) as url:
        yield MlflowServer(url, folder)


@pytest.fixture(scope="session")
def mlflow_server_with_auth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server with MLflow's basic authentication."""
    if importlib.util.find_spec("flask_wtf") is None:
        missing("MLflow's basic authentication", "pip install 'mlflow[auth]'")
    folder = tmp_path_factory.mktemp("mlflow-server-with-auth")
    username, password = "admin", f"pass word:{secrets.token_hex(8)}"
    config = folder / "auth.ini"
    config.write_text(
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = sqlite:///{folder}/auth.db\n"
        f"admin_username = {username}\n"
        f"admin_password = {password}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environ = {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex()}
    with serve(folder, "--app-name", "basic-auth", environ=environ) as url:
        yield MlflowServer(url, folder, username, password)


@pytest.fixture(scope="session")
def mlflow_server_with_prefix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server below the path ``/some/prefix``."""
    folder = tmp_path_factory.mktemp("mlflow-server-with-prefix")
    with serve(folder, "--static-prefix", "/some/prefix") as url:
        yield MlflowServer(f"{url}/some/prefix", folder)


@contextmanager
def serve(folder: Path, *options: str, environ: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run ``mlflow server`` for the time of the block; gives its address."""
    # mlflow-skinny has no server. Looking for mlflow.server would import mlflow into the process of the tests.
    if not list(importlib.metadata.Distribution.discover(name="mlflow")):
        missing("the MLflow server", "pip install mlflow")
    port = free_port()
    argv = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
        *options,
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as output:
        process = _start(argv, folder, output.fileno(), environ or {})
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}", process, folder / "server.log", options)
            yield f"http://127.0.0.1:{port}"
        finally:
            _stop(process)


def _start(argv: Sequence[str], folder: Path, output: int, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PYTHON"))}
    # Without this it starts eight more processes for jobs that no test has.
    variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", **environ}
    return subprocess.Popen(
        argv,
        cwd=folder,
        env={**inherited, **variables},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path, options: Sequence[str]) -> None:
    prefix = options[options.index("--static-prefix") + 1] if "--static-prefix" in options else ""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with opener.open(f"{url}{prefix}/health", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    raise RuntimeError(f"the MLflow server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers, which are in a session of its own."""
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
