"""Programs that run projects and are ended by others: a web server, and a Jupyter kernel."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from components import free_port, missing, stop
from components.command_line import mlfleet
from components.notebook import NotebookServer
from components.projects import pid_is_gone, write_project
from fakes.scripted_server import scripted
from fakes.small_mlflow import SmallMlflow
from mlfleet import Fleet

pytestmark = pytest.mark.timeout(90)  # servers and kernels start, on a machine that may be busy

DIED = "its driver died"
# The command's own process, a child in its session, and one that left it.
COMMAND = """setsid sleep 1000 &
left=$!
sleep 1000 &
echo $$ $! $left > new-{name}
mv new-{name} pids-{name}
wait
"""

APP = """\
import mlfleet

async def answer(send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        async with mlfleet.Fleet(on_exit="cancel") as app.fleet:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["path"] == "/run":
        await mlfleet.run_async("demo", parameters={"name": "run"}, env_manager="local")
        await answer(send)
    elif scope["path"] == "/submit":
        await mlfleet.submit("demo", parameters={"name": "submit"}, env_manager="local")
        await answer(send)
    else:
        await app.fleet.submit("demo", parameters={"name": "fleet"}, env_manager="local")
        await answer(send)
"""


@pytest.fixture
async def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SmallMlflow]:
    mlflow = SmallMlflow()
    write_project(tmp_path / "demo", COMMAND, parameters="name: string")
    async with scripted(mlflow.script) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.place}")
        yield mlflow


async def pids(path: Path) -> list[int]:
    """Wait for the file in which a command names its processes."""
    while not path.exists():  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.05)
    return [int(word) for word in path.read_text().split()]


async def until_gone(pids: list[int]) -> None:
    while not all(pid_is_gone(pid) for pid in pids):  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.05)


# ---- a web server ---------------------------------------------------------------------------------------------------


@pytest.fixture
def web(mlflow: SmallMlflow, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A web server whose endpoints run projects, and its address."""
    if find_spec("uvicorn") is None:
        missing("uvicorn", "pip install 'mlfleet[dev]'")
    (tmp_path / "app.py").write_text(APP)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--log-level", "warning"], cwd=tmp_path
    )
    yield process, f"http://127.0.0.1:{port}"
    stop(process)


async def get(client: httpx.AsyncClient, path: str) -> str:
    while True:
        try:
            return (await client.get(path)).text
        except httpx.ConnectError:  # it does not listen yet
            await asyncio.sleep(0.05)


async def test_a_web_server_that_is_stopped_hard_leaves_no_command(
    web: tuple[subprocess.Popen[bytes], str], mlflow: SmallMlflow, tmp_path: Path
) -> None:
    process, url = web
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=None) as client:
        assert await get(client, "/submit") == "done"
        endpoint = asyncio.ensure_future(get(client, "/run"))
        commands = await pids(tmp_path / "demo" / "pids-submit") + await pids(tmp_path / "demo" / "pids-run")
        process.terminate()
        # It waits for the end of the open request, and its service manager does not.
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, 2)
        process.kill()
        with suppress(httpx.HTTPError):
            await endpoint
    await until_gone(commands)
    done = await asyncio.to_thread(mlfleet, "wait", *mlflow.runs)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (
        1,
        sorted(f"{run_id} FAILED ({DIED})" for run_id in mlflow.runs),
    )
    assert mlflow.statuses == ["FAILED"] * 2


async def test_the_fleet_in_the_lifespan_of_a_web_server_ends_its_runs(
    web: tuple[subprocess.Popen[bytes], str], mlflow: SmallMlflow, tmp_path: Path
) -> None:
    process, url = web
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        assert await get(client, "/fleet") == "done"
    commands = await pids(tmp_path / "demo" / "pids-fleet")
    process.terminate()
    await asyncio.to_thread(process.wait)
    assert [pid for pid in commands if not pid_is_gone(pid)] == []
    assert mlflow.statuses == ["KILLED"]


# ---- a Jupyter kernel -----------------------------------------------------------------------------------------------

CELL = """\
import asyncio, mlfleet
mlfleet.run("demo", parameters={"name": "blocking"}, env_manager="local", synchronous=False)
await mlfleet.submit("demo", parameters={"name": "submit"}, env_manager="local")
task = asyncio.ensure_future(mlfleet.run_async("demo", parameters={"name": "task"}, env_manager="local"))
"""


@pytest.mark.parametrize("now", [False, True], ids=["asked", "killed"])
async def test_a_jupyter_kernel_that_is_restarted_and_shut_down_leaves_no_command(
    mlflow: SmallMlflow, notebook: NotebookServer, tmp_path: Path, now: bool
) -> None:
    await asyncio.to_thread(notebook.start)
    for end in (notebook.restart, notebook.shutdown):
        await asyncio.to_thread(notebook.execute, CELL)
        files = [tmp_path / "demo" / f"pids-{name}" for name in ("blocking", "submit", "task")]
        commands = [pid for file in files for pid in await pids(file)]
        assert len(commands) == 9
        for file in files:
            file.unlink()
        await asyncio.to_thread(partial(end, now=now))
        await until_gone(commands)
    # The kernel itself ends what it can. The next Fleet concludes the rest: that of the next kernel, or this one.
    async with Fleet(tracking_uri=os.environ["MLFLOW_TRACKING_URI"]):
        while "RUNNING" in mlflow.statuses:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.05)
    assert len(mlflow.statuses) == 6
    assert set(mlflow.statuses) <= ({"FAILED"} if now else {"FAILED", "KILLED"})
