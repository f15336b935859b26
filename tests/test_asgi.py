"""The Fleet of a web application: its lifespan, and the service of the examples behind a real server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from components import free_port, stop
from components.projects import pid_is_gone, write_project
from fakes.scripted_server import scripted
from fakes.small_mlflow import SmallMlflow
from mlfleet.asgi import lifespan
from mlfleet.testing import FakeTracking

pytestmark = pytest.mark.timeout(90)  # servers start, on a machine that may be busy

EXAMPLE = Path(__file__).parents[1] / "examples" / "service"
STOP_TIMEOUT = 30.0  # seconds from SIGTERM to SIGKILL, as in Kubernetes

# The service of the example with projects of the test, and what a test has to know of a worker.
APP = """\
import asyncio, gc, os, stat
import service
from mlfleet import Timeouts
from mlfleet.fleet import context_of
from starlette.responses import JSONResponse

projects = {name: {"uri": name, "env_manager": "local"} for name in ("demo", "greeting")}
app = service.create_app(projects, max_concurrent=SLOTS, max_queued=100, timeouts=Timeouts(cancel_grace=5))
service.EventStream.pause = 0.5

def is_file(descriptor):  # connections are kept or not, as servers and clients like
    try:
        return not stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        return False

async def worker(request):
    gc.collect()
    return JSONResponse({
        "pid": os.getpid(),
        "tasks": len(asyncio.all_tasks()),
        "readers": len(context_of(request.state.fleet).fleet.events._readers),
        "files": sum(map(is_file, map(int, os.listdir("/proc/self/fd")))),
    })

app.add_route("/worker", worker)
"""
COMMAND = "echo started {name}; echo $$ > new-{name}; mv new-{name} pid-{name}; exec sleep 1000"


@pytest.fixture
async def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SmallMlflow]:
    mlflow = SmallMlflow()
    async with scripted(mlflow.script) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.place}")
        yield mlflow


class Service:
    """The service of the example in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url

    def client(self, connections: int = 1) -> httpx.AsyncClient:
        """Return a client. One with a single connection speaks to one worker for as long as that is kept."""
        limits = httpx.Limits(max_connections=connections)
        return httpx.AsyncClient(base_url=self.url, trust_env=False, verify=False, timeout=60, limits=limits)

    async def terminate(self) -> int:
        """Stop the server as Kubernetes does."""
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait, STOP_TIMEOUT)


@pytest.fixture
def start(mlflow: SmallMlflow, tmp_path: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def start(*options: str, app: str = "app:app", slots: int = 200) -> AsyncIterator[Service]:
        write_project(tmp_path / "demo", COMMAND, parameters="name: string")
        write_project(tmp_path / "greeting", "echo one; echo zwölf; echo three ${SERVICE_PASSWORD-secret}")
        (tmp_path / "app.py").write_text(APP.replace("SLOTS", str(slots)))
        port = free_port()
        command = ["uvicorn", app, "--port", str(port), "--log-level", "warning"]
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                *command,
                "--timeout-graceful-shutdown",
                "2",
                "--timeout-keep-alive",
                "60",
                *options,
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(EXAMPLE), "SERVICE_PASSWORD": "told"},
        )
        service = Service(process, f"http://127.0.0.1:{port}")
        try:
            async with service.client() as client:
                while True:
                    with suppress(httpx.ConnectError):  # it does not listen yet
                        await client.get("/worker")
                        break
                    await asyncio.sleep(0.05)
            yield service
        finally:
            await asyncio.to_thread(stop, process)

    return start


async def submit(client: httpx.AsyncClient, name: str, project: str = "demo") -> str:
    body = {"project": project, "parameters": {"name": name}} if project == "demo" else {"project": project}
    answer = await client.post("/runs", json=body)
    assert answer.status_code == 201, answer.text
    run_id: str = answer.json()["run_id"]
    assert answer.headers["Location"] == f"/runs/{run_id}"
    return run_id


async def pid(path: Path) -> int:
    """Wait for the file in which a command writes its process id."""
    while not path.exists():  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.02)
    return int(path.read_text())


async def events_of(answer: httpx.Response, count: int = 10**9) -> list[dict[str, str]]:
    """Read server-sent events to the end of an answer, or so many of them."""
    found: list[dict[str, str]] = []
    event: dict[str, str] = {}
    async for line in answer.aiter_lines():
        name, _, value = line.partition(": ")
        if name:
            event[name] = value
        elif event:
            found.append(event)
            event = {}
            if len(found) == count:
                break
    return found


async def read(client: httpx.AsyncClient, path: str, count: int = 10**9, after: str = "0") -> list[dict[str, str]]:
    """Ask for server-sent events and read them to the end, or so many of them and then go away."""
    async with client.stream("GET", path, headers={"Last-Event-ID": after}) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream"), await answer.aread()
        return await events_of(answer, count)


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


# ---- the service of the examples ------------------------------------------------------------------------------------


async def test_a_service_runs_shows_and_cancels(start: Callable[..., Any], tmp_path: Path) -> None:
    async with start() as service, service.client() as client, service.client() as other:
        async with other.stream("GET", "/events") as answer:
            run_id = await submit(client, "one")
            process = await pid(tmp_path / "demo" / "pid-one")
            # The command may be faster than its driver, which notes the start.
            while (shown := await client.get(f"/runs/{run_id}")).json()["status"] == "SCHEDULED":
                pass
            assert (shown.status_code, shown.json()) == (200, {"run_id": run_id, "status": "RUNNING"})
            ended = await client.delete(f"/runs/{run_id}")
            assert (ended.status_code, ended.json()) == (200, {"run_id": run_id, "status": "KILLED"})
            assert pid_is_gone(process)
            events = await events_of(answer, 6)
        stages = ["fetching", "queued", "preparing", "starting", "started", "finished"]
        assert [event["event"] for event in events] == stages
        assert [json.loads(event["data"])["stage"] for event in events] == stages
        assert json.loads(events[-1]["data"])["status"] == "KILLED"
        # Comments keep a connection on which nothing else comes.
        async with other.stream("GET", "/events") as answer:
            assert await anext(answer.aiter_lines()) == ": still there"


async def test_the_log_of_a_run_is_resumed_where_it_broke_off(start: Callable[..., Any]) -> None:
    async with start() as service, service.client() as client:
        run_id = await submit(client, "", "greeting")
        whole = await read(client, f"/runs/{run_id}/logs")
        assert [(event.get("event"), event["data"]) for event in whole] == [
            (None, "one"),
            (None, "zwölf"),
            (None, "three secret"),
            ("end", "FINISHED"),
        ]
        for index, event in enumerate(whole[:3]):
            rest = await read(client, f"/runs/{run_id}/logs", after=event["id"])
            assert rest == whole[index + 1 :]
        # A browser asks again after the end, until it is told that there is nothing more.
        answer = await client.get(f"/runs/{run_id}/logs", headers={"Last-Event-ID": whole[-1]["id"]})
        assert answer.status_code == 204


MISTAKES: list[tuple[str, str, object, int, str]] = [
    ("POST", "/runs", {"project": "/etc"}, 404, "there is no project '/etc': give one of quickstart"),
    ("POST", "/runs", [], 400, "the body is not a JSON object"),
    ("POST", "/runs", {"project": "quickstart", "uri": "x"}, 400, "'uri' is unknown or of a wrong type: give project"),
    ("POST", "/runs", {"project": "quickstart", "parameters": {"alpha": "much"}}, 400, "alpha"),
    ("GET", "/runs/nothing", None, 404, "nothing"),
    ("DELETE", "/runs/nothing", None, 404, "nothing"),
    ("GET", "/runs/nothing/logs", None, 404, "nothing"),
]


async def test_a_mistake_of_the_caller_is_answered_with_what_to_do(
    start: Callable[..., Any], mlflow: SmallMlflow
) -> None:
    async with start(app="service:app") as service, service.client() as client:
        for method, path, body, status, message in MISTAKES:
            answer = await client.request(method, path, json=body)
            assert (answer.status_code, list(answer.json())) == (status, ["error"]), answer.text
            assert message in answer.json()["error"]
    assert mlflow.runs == {}


async def until_as(client: httpx.AsyncClient, before: dict[str, int]) -> None:
    """Wait until a worker has no more tasks, readers and files than it had: it sees soon that clients have gone."""
    while any(count > before[name] for name, count in (await client.get("/worker")).json().items()):  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def test_a_client_that_goes_away_leaves_nothing(start: Callable[..., Any], tmp_path: Path) -> None:
    async with start() as service, service.client() as client:
        run_id = await submit(client, "one")
        await pid(tmp_path / "demo" / "pid-one")
        await read(client, f"/runs/{run_id}/logs", 1)
        before = (await client.get("/worker")).json()
        assert before["readers"] == 0
        async with AsyncExitStack() as stack:
            for path in (f"/runs/{run_id}/logs", "/events") * 10:
                other = await stack.enter_async_context(service.client())
                answer = await stack.enter_async_context(other.stream("GET", path))
                assert answer.status_code == 200
            during = (await client.get("/worker")).json()
            assert (during["readers"], during["tasks"] > before["tasks"] + 20) == (10, True)
            await submit(client, "two")  # of which the readers of events hear
            await pid(tmp_path / "demo" / "pid-two")
            assert (await client.delete(f"/runs/{run_id}")).status_code == 200
        await until_as(client, before)


async def test_a_service_that_is_stopped_ends_all_its_runs_in_time(
    start: Callable[..., Any], mlflow: SmallMlflow, tmp_path: Path
) -> None:
    async with start() as service, service.client(20) as client:
        ids = await asyncio.gather(*(submit(client, str(number)) for number in range(300)))
        refused = await client.post("/runs", json={"project": "demo", "parameters": {"name": "one too many"}})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        reading = asyncio.ensure_future(read(client, f"/runs/{ids[0]}/logs"))
        while len(files := list((tmp_path / "demo").glob("pid-*"))) < 200:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.1)
        pids = [await pid(file) for file in files]
        await service.terminate()
        with suppress(httpx.HTTPError):
            await reading
    assert [process for process in pids if not pid_is_gone(process)] == []
    assert mlflow.statuses == ["KILLED"] * 300


async def test_every_worker_knows_every_run(start: Callable[..., Any], tmp_path: Path, mlflow: SmallMlflow) -> None:
    async with start("--workers", "2", slots=1) as service, AsyncExitStack() as stack:
        workers: dict[int, list[httpx.AsyncClient]] = {}
        while len(workers) < 2 or any(len(clients) < 3 for clients in workers.values()):
            client = await stack.enter_async_context(service.client())
            workers.setdefault((await client.get("/worker")).json()["pid"], []).append(client)
        for number, (one, two) in enumerate((workers.values(), reversed(workers.values()))):
            here, there = one[0], two[0]
            reader = two.pop()  # which loses its connection by going away
            running, waiting = await submit(here, f"running{number}"), await submit(here, f"waiting{number}")
            process = await pid(tmp_path / "demo" / f"pid-running{number}")
            assert (await there.get(f"/runs/{running}")).json()["status"] == "RUNNING"
            before = (await there.get("/worker")).json()
            (line,) = await read(reader, f"/runs/{running}/logs", 1)
            assert line["data"] == f"started running{number}"
            await until_as(there, before)
            for run_id in (waiting, running):
                ended = await there.delete(f"/runs/{run_id}")
                assert (ended.status_code, ended.json()) == (200, {"run_id": run_id, "status": "KILLED"})
                assert (await here.get(f"/runs/{run_id}")).json()["status"] == "KILLED"
            assert pid_is_gone(process)
            assert not (tmp_path / "demo" / f"pid-waiting{number}").exists()
        await submit(here, "last")
        last = await pid(tmp_path / "demo" / "pid-last")
        await service.terminate()
    assert pid_is_gone(last)
    assert mlflow.statuses == ["KILLED"] * 5
