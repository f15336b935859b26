"""minilake, an emulator of a Databricks workspace on loopback that runs the Python files submitted to it.

`Databricks`, the proxy in front of it, adds what it lacks: it turns shell commands into Python tasks, and ends the
processes of a cancelled run. Links at /Workspace, /Volumes and /dbfs show its files where code in Databricks finds
them; to make them, the tests must be able to write to the root folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import posixpath
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import pytest

from components import free_port, missing, stop
from fakes.flaky_proxy import Answer, FlakyProxy, Forward, Request, Rule

__all__ = ["MARK", "SCOPE", "Databricks", "Minilake", "processes_of"]

_STARTS_WITHIN = 60.0
_SHELL = "/Workspace/Shared/shell_command.py"
MARK = "MLFLEET_TEST_RUN"
SCOPE = "mlfleet-tests"


@dataclass(frozen=True, slots=True)
class Minilake:
    """A running emulator.

    Attributes:
        url: The URL of the workspace.
        folder: The folder with its files.
    """

    url: str
    folder: Path


@pytest.fixture(scope="session")
def minilake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Minilake]:
    """Serve one emulator for all tests."""
    if importlib.util.find_spec("minilake") is None:
        missing("the Databricks emulator", "pip install minilake")
    folder = tmp_path_factory.mktemp("minilake")
    with ExitStack() as stack:
        # Only one test session at a time can have the links.
        stack.enter_context(filelock.FileLock("/tmp/mlfleet-minilake.lock"))
        for link, target in {"Workspace": "workspace/Workspace", "Volumes": "dbfs/Volumes", "dbfs": "dbfs"}.items():
            stack.enter_context(_linked(Path("/", link), folder / target))
        yield stack.enter_context(_serve(folder))


@contextmanager
def _linked(link: Path, target: Path) -> Iterator[None]:
    target.mkdir(parents=True, exist_ok=True)
    try:
        if link.is_symlink():  # left by a test session that was killed
            link.unlink()
        link.symlink_to(target)
    except OSError as error:
        missing(f"the link {link} to the files of the Databricks emulator", f"{error.strerror}; run the tests as root")
    try:
        yield
    finally:
        link.unlink()


@contextmanager
def _serve(folder: Path) -> Iterator[Minilake]:
    port = free_port()
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(("MLFLOW_", "DATABRICKS_"))}
    environ = {
        **inherited,
        "MINILAKE_DATA_DIR": str(folder),
        "MINILAKE_JOB_EXECUTOR": "subprocess",
        "MINILAKE_NOTEBOOK": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    argv = [sys.executable, "-m", "minilake", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "server.log").open("wb") as output:
        process = subprocess.Popen(
            argv, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url, process, folder / "server.log")
            _make_scope(url)
            _put_shell(url)
            yield Minilake(url, folder)
        finally:
            stop(process)


def _make_scope(url: str) -> None:
    request = urllib.request.Request(
        f"{url}/api/2.0/secrets/scopes/create",
        data=json.dumps({"scope": SCOPE}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request):
        pass


def _put_shell(url: str) -> None:
    """Upload the script that runs a shell command as Databricks does."""
    code = "import subprocess, sys\nsys.exit(subprocess.run(sys.argv[1:]).returncode)\n"
    for path, content in (
        ("/api/2.0/workspace/mkdirs", json.dumps({"path": posixpath.dirname(_SHELL)}).encode()),
        (f"/api/2.0/workspace-files/import-file{_SHELL}?overwrite=true", code.encode()),
    ):
        request = urllib.request.Request(url + path, data=content, headers={"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request):
            pass


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(f"{url}/_minilake/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"minilake did not start:\n{log.read_text(errors='replace')[-3000:]}")


class Databricks(FlakyProxy):
    """The proxy in front of the emulator, which records requests, injects faults and ends cancelled runs.

    Args:
        minilake: The emulator.

    Attributes:
        minilake: The argument `minilake`.
        fault: A rule that may answer a request in place of the emulator; None: every request is passed on.
    """

    def __init__(self, minilake: Minilake) -> None:
        super().__init__(minilake.url)
        self.minilake = minilake
        self.rule = self._decide_about
        self.fault: Rule | None = None

    async def _decide_about(self, request: Request, forward: Forward) -> Answer | None:
        async def onward() -> Answer:
            if request.target == "/api/2.0/jobs/runs/submit":
                return await self._forward(_as_python(request))
            answer = await forward()
            if request.target.endswith("/jobs/runs/cancel") and answer.status == 200:
                self._end(int(json.loads(request.body)["run_id"]))
            return answer

        return await (self.fault(request, onward) if self.fault is not None else onward())

    def _end(self, number: int) -> None:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"{self.minilake.url}/api/2.2/jobs/runs/get?run_id={number}"
        ) as answer:
            name = json.load(answer)["run_name"]
        run_id = name.rpartition("(")[2].rstrip(")")
        for pid in _scripts_of(run_id):
            os.kill(pid, signal.SIGTERM)


def _as_python(request: Request) -> Request:
    """Return a submission of a Python file that runs the shell command."""
    body = json.loads(request.body)
    command = body.pop("shell_command_task")["command"]
    del body["new_cluster"], body["libraries"]
    task = {"task_key": "shell", "spark_python_task": {"python_file": _SHELL, "parameters": command}}
    content = json.dumps({**body, "tasks": [task]}).encode()
    headers = {**request.headers, "content-length": str(len(content))}
    return replace(request, target="/api/2.2/jobs/runs/submit", headers=headers, body=content)


@pytest.fixture
async def databricks(minilake: Minilake, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Databricks]:
    """Serve the proxy, and set the environment variables of its login."""
    async with Databricks(minilake).listen() as proxy:
        assert isinstance(proxy, Databricks)
        monkeypatch.setenv("DATABRICKS_HOST", proxy.url)
        monkeypatch.setenv("DATABRICKS_TOKEN", "dapi-not-to-be-seen")
        monkeypatch.setenv("DATABRICKS_CONFIG_FILE", "/dev/null")
        yield proxy


def processes_of(run_id: str) -> list[str]:
    """Return the live processes of a run: its script, and processes that inherited its mark."""
    found = [f"{pid}: the script" for pid in _scripts_of(run_id)]
    for pid in _pids():
        if f"{MARK}={run_id}".encode() in _read_proc(pid, "environ").split(b"\0"):
            found.append(f"{pid}: {_read_proc(pid, 'cmdline')!r}")
    return found


def _scripts_of(run_id: str) -> list[int]:
    return [pid for pid in _pids() if f'"run":"{run_id}"'.encode() in _read_proc(pid, "cmdline")]


def _pids() -> Iterator[int]:
    yield from (int(name) for name in os.listdir("/proc") if name.isdigit())


def _read_proc(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:  # the process has ended, or is another user's
        return b""
