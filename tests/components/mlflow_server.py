"""Real MLflow servers on loopback, with sqlite and their artifacts in a temporary folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from components import free_port, missing, stop
from fakes.flaky_proxy import FlakyProxy

STARTS_WITHIN = 240.0
"""The start timeout in seconds: about 10 are enough on an idle machine, a busy one needs minutes."""

OLDEST = (
    *("mlflow-skinny==2.0.1", "flask<3", "sqlalchemy<2", "alembic<2", "gunicorn<21", "querystring-parser<2"),
    "setuptools<81",
)
"""The first release of MLflow 2, and the contemporary packages that its server needs."""


@dataclass(frozen=True, slots=True)
class MlflowServer:
    """A running server.

    Attributes:
        url: The tracking URI.
        folder: The folder with its database ``mlflow.db`` and its artifacts.
        username: The name of its administrator; empty if it asks for none.
        password: The administrator's password; empty if it asks for none.
        workspace: The workspace to use; empty if it has none.
        python: An interpreter with the client of its version.
    """

    url: str
    folder: Path
    username: str = ""
    password: str = ""
    workspace: str = ""
    python: str = sys.executable

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables with the address of the server and the login of the user."""
        variables = {
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_USERNAME": self.username,
            "MLFLOW_TRACKING_PASSWORD": self.password,
            "MLFLOW_WORKSPACE": self.workspace,
        }
        return {name: text for name, text in variables.items() if text}


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server without authentication."""
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


@pytest.fixture(scope="session")
def mlflow_server_with_workspaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server with a workspace ``team-a`` beside its default one."""
    folder = tmp_path_factory.mktemp("mlflow-server-with-workspaces")
    with serve(folder, "--enable-workspaces") as url:
        request = urllib.request.Request(
            f"{url}/api/3.0/mlflow/workspaces",
            json.dumps({"name": "team-a"}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30):
            pass
        yield MlflowServer(url, folder, workspace="team-a")


@pytest.fixture(scope="session")
def oldest_mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server of the first MLflow 2 release, with as few packages as possible."""
    folder = tmp_path_factory.mktemp("oldest-mlflow-server")
    python = _install(folder / "environment", OLDEST)
    with serve(folder, python=python) as url:
        yield MlflowServer(url, folder, python=python)


def _install(folder: Path, requirements: Sequence[str]) -> str:
    """Create an environment with these packages, which uv caches, and return its interpreter."""
    python = str(folder / "bin" / "python")
    uv = [sys.executable, "-m", "uv"]
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("UV_", "PYTHON", "VIRTUAL_ENV"))}
    for argv in (
        [*uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
        [*uv, "pip", "install", "--quiet", "--python", python, *requirements],
    ):
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            missing(" ".join(requirements), f"pip install uv; PyPI must be reachable\n{done.stderr[-2000:]}")
    return python


@contextmanager
def serve(
    folder: Path, *options: str, environ: Mapping[str, str] | None = None, python: str = sys.executable
) -> Iterator[str]:
    """Run ``mlflow server`` during the block, and yield its address."""
    # mlflow-skinny has no server. Looking for mlflow.server would import mlflow into the process of the tests.
    if python == sys.executable and not list(importlib.metadata.Distribution.discover(name="mlflow")):
        missing("the MLflow server", "pip install mlflow")
    port = free_port()
    argv = [
        python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
        *options,
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as output:
        process = _start(argv, folder, output.fileno(), environ or {})
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}", process, folder / "server.log", options)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)


def _start(argv: Sequence[str], folder: Path, output: int, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PYTHON"))}
    # Without this it starts eight more processes for jobs that no test has.
    variables = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Where older ones look for gunicorn.
        "PATH": os.pathsep.join((str(Path(argv[0]).parent), os.environ.get("PATH", os.defpath))),
        **environ,
    }
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


@pytest.fixture
async def proxy(mlflow_server: MlflowServer) -> AsyncIterator[FlakyProxy]:
    """A proxy in front of the server that counts requests and injects network faults."""
    async with FlakyProxy(mlflow_server.url).listen() as listening:
        yield listening
