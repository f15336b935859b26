"""The Fleet of a web application: its lifespan, behind a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from components import missing
from components.projects import pid_is_gone, write_project
from mlfleet.asgi import lifespan
from mlfleet.testing import FakeTracking

if find_spec("uvicorn") is None or find_spec("fastapi") is None:
    missing("uvicorn or FastAPI", "pip install 'mlfleet[dev]'")

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse

pytestmark = pytest.mark.timeout(90)  # servers start, on a machine that may be busy

COMMAND = "echo started {name}; echo $$ > new-{name}; mv new-{name} pid-{name}; exec sleep 1000"


async def pid(path: Path) -> int:
    """Wait for the file in which a command writes its process id."""
    while not path.exists():  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.02)
    return int(path.read_text())


# ---- the lifespan ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
async def test_the_runs_of_an_application_end_with_it(framework: Callable[..., Starlette], tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", COMMAND, parameters="name: string")
    tracking = FakeTracking()

    async def submit_one(request: Request) -> PlainTextResponse:
        run = await request.state.fleet.submit(uri, parameters={"name": "one"}, env_manager="local")
        return PlainTextResponse(run.run_id)

    app = framework(lifespan=lifespan(tracking=tracking))
    app.add_route("/", submit_one)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(trust_env=False) as client:
        run_id = (await client.get(f"http://127.0.0.1:{port}/")).text
    process = await pid(tmp_path / "demo" / "pid-one")
    server.should_exit = True
    await serving
    assert pid_is_gone(process)
    assert [(run.run_id, run.status) for run in tracking.runs.values()] == [(run_id, "KILLED")]


async def test_the_options_of_a_lifespan_are_those_of_a_fleet(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true")
    tracking = FakeTracking()
    async with lifespan(tracking=tracking, on_exit="wait")(object()) as state:
        await state["fleet"].submit(uri, env_manager="local")
    assert [run.status for run in tracking.runs.values()] == ["FINISHED"]
