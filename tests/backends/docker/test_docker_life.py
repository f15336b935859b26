"""Containers whose driver dies, is interrupted or loses the engine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

import mlfleet
from components.docker import DockerEngine
from components.projects import write_project
from mlfleet import Fleet, FleetRun, RunStatus, Timeouts, TrackedRun
from mlfleet.backends.docker import DockerBackend
from mlfleet.errors import ExecutionException, RunLost, UsageError
from mlfleet.fleet import context_of
from mlfleet.testing import FakeTracking
from mlfleet.tracking import open_tracking

pytestmark = pytest.mark.timeout(120)  # processes that import mlflow, and containers, on a busy machine

_DRIVER = """\
import asyncio, json, sys
import mlfleet

async def main():
    run = await mlfleet.submit(
        sys.argv[1], tracking_uri=sys.argv[2], docker_args=json.loads(sys.argv[3]),
        timeouts=mlfleet.Timeouts(cancel_grace=1),
    )
    async for line in run.logs():
        print(run.run_id, line, flush=True)
    await run.wait()

asyncio.run(main())
"""


def docker_project(folder: Path, image: str, command: str) -> str:
    return write_project(folder, command, extra=f"docker_env: {json.dumps({'image': image})}\n")


@asynccontextmanager
async def driver(
    uri: str, store: str, docker_args: Mapping[str, object] | None = None
) -> AsyncIterator[tuple[anyio.abc.Process, str]]:
    """Another process that has submitted the project and seen its first line; with the run's id."""
    argv = [sys.executable, "-c", _DRIVER, uri, store, json.dumps(docker_args)]
    async with await anyio.open_process(argv, stderr=None) as process:
        assert process.stdout is not None
        said = b""
        while b"\n" not in said:
            said += await process.stdout.receive()
        try:
            yield process, said.decode().split()[0]
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def containers(engine: DockerEngine, run_id: str) -> list[dict[str, object]]:
    return await anyio.to_thread.run_sync(engine.containers, f"mlfleet.run-id={run_id}")


async def test_a_driver_that_is_killed_leaves_a_run_to_attach_to(
    docker_engine: DockerEngine, shell_image: str, new_store: Callable[[Path], str], tmp_path: Path
) -> None:
    store = new_store(tmp_path / "mlflow.db")
    command = "echo one; while [ ! -e /gate/open ]; do sleep 0.1; done; echo two; exit 3"
    uri = write_project(
        tmp_path / "demo", command,
        extra=f"docker_env: {json.dumps({'image': shell_image, 'volumes': [f'{tmp_path}/gate:/gate']})}\n",
    )  # fmt: skip
    async with driver(uri, store) as (process, run_id):
        process.kill()
        await process.wait()
    async with Fleet(tracking_uri=store) as fleet:
        run = await fleet.attach(run_id)
        assert (await fleet.tracking.get_run(run_id)).status is RunStatus.RUNNING
        assert await run.get_status() in (RunStatus.SCHEDULED, RunStatus.RUNNING)
        (tmp_path / "gate" / "open").touch()
        assert [line async for line in run.logs()] == ["one", "two"]
        with pytest.raises(ExecutionException, match="exit code 3"):
            await run.check()
        assert (await fleet.tracking.get_run(run_id)).status is RunStatus.FAILED
        assert await containers(docker_engine, run_id) == []
        with pytest.raises(UsageError, match="has ended already: FAILED"):
            await fleet.attach(run_id)


async def test_output_that_the_engine_has_discarded_stays_in_the_file(
    docker_engine: DockerEngine, shell_image: str, new_store: Callable[[Path], str], tmp_path: Path
) -> None:
    store = new_store(tmp_path / "mlflow.db")
    command = "echo one; while [ ! -e /gate/open ]; do sleep 0.1; done; for i in $(seq 500); do echo line $i; done"
    uri = write_project(
        tmp_path / "demo", f"{command}; touch /gate/done; while [ -e /gate/open ]; do sleep 0.1; done; echo last",
        extra=f"docker_env: {json.dumps({'image': shell_image, 'volumes': [f'{tmp_path}/gate:/gate']})}\n",
    )  # fmt: skip
    gate = tmp_path / "gate"
    args = {"log-driver": "json-file", "log-opt": ["max-size=4k", "max-file=1"]}
    async with driver(uri, store, docker_args=args) as (process, run_id):
        process.kill()
        await process.wait()
    (gate / "open").touch()
    with anyio.fail_after(30):
        while not (gate / "done").exists():  # noqa: ASYNC110 - in a container
            await anyio.sleep(0.05)
    async with Fleet(tracking_uri=store) as fleet:
        run = await fleet.attach(run_id)
        (gate / "open").unlink()
        await run.wait()
        lines = [line async for line in run.logs()]
    assert (lines[0], lines[-1]) == ("one", "last")
    assert lines[1].startswith("mlfleet: lines may be missing or repeated here")
    assert lines[-2] == "line 500"


async def test_containers_of_dead_drivers_are_listed_and_pruned(
    docker_engine: DockerEngine, shell_image: str, new_store: Callable[[Path], str], tmp_path: Path
) -> None:
    store = new_store(tmp_path / "mlflow.db")
    gate = tmp_path / "gate"
    gate.mkdir()
    command = "echo one; while [ ! -e /gate/open ]; do sleep 0.1; done"
    uri = write_project(
        tmp_path / "demo", command,
        extra=f"docker_env: {json.dumps({'image': shell_image, 'volumes': [f'{gate}:/gate']})}\n",
    )  # fmt: skip
    async with driver(uri, store) as (living, kept_id), driver(uri, store) as (process, run_id):
        process.kill()
        await process.wait()
        shown = await listed("ps")
        assert (shown[kept_id], shown[run_id]) == (("running", True), ("running", False))
        assert await listed("prune", kept_id, run_id) == {}  # what still runs can be attached to
        assert set(await listed("prune", "--running", kept_id, run_id)) == {run_id}
        assert await containers(docker_engine, run_id) == []
        (gate / "open").touch()
        await living.wait()
    assert kept_id not in await listed("ps")


async def listed(*arguments: str) -> dict[str, tuple[str, bool]]:
    """Return the containers that the command prints: run id → state, supervised."""
    done = await anyio.run_process([sys.executable, "-m", "mlfleet", *arguments, "--json"])
    return {item["run_id"]: (item["state"], item["supervised"]) for item in json.loads(done.stdout)}


async def test_a_container_whose_lock_cannot_be_seen_counts_as_supervised(
    docker_engine: DockerEngine, shell_image: str, tmp_path: Path
) -> None:
    run_id, folder = uuid.uuid4().hex, tmp_path / "loop"
    folder.symlink_to(folder)  # it can be entered no more than that of another user
    labels = {"mlfleet.run-id": run_id, "mlfleet.driver": f"{socket.gethostname()}:{folder}/container.lock"}
    body = {"Image": shell_image, "Cmd": ["true"], "Labels": labels}
    made = await anyio.to_thread.run_sync(docker_engine.call, "POST", "/containers/create", body)
    try:
        async with DockerBackend() as backend:
            assert [run.supervised for run in await backend.list_runs() if run.run_id == run_id] == [True]
            assert await backend.prune([run_id], running=True) == []
    finally:
        await anyio.to_thread.run_sync(docker_engine.remove, made["Id"])


async def test_an_attached_run_can_be_cancelled(
    docker_engine: DockerEngine, shell_image: str, new_store: Callable[[Path], str], tmp_path: Path
) -> None:
    store = new_store(tmp_path / "mlflow.db")
    async with driver(docker_project(tmp_path / "demo", shell_image, "echo one; sleep 600"), store) as (
        process,
        run_id,
    ):
        process.kill()
        await process.wait()
    run = await mlfleet.attach(run_id, tracking_uri=store, timeouts=Timeouts(cancel_grace=0.5))
    await run.cancel()
    assert await run.get_status() is RunStatus.KILLED
    assert await containers(docker_engine, run_id) == []
    async with open_tracking(store) as tracking:
        assert (await tracking.get_run(run_id)).status is RunStatus.KILLED


@pytest.mark.parametrize("work", [TrackedRun.cancel, TrackedRun.wait])
async def test_a_container_that_ended_without_its_driver_keeps_its_end(
    docker_engine: DockerEngine,
    shell_image: str,
    new_store: Callable[[Path], str],
    tmp_path: Path,
    work: Callable[[TrackedRun], Awaitable[object]],
) -> None:
    store = new_store(tmp_path / "mlflow.db")
    uri = docker_project(tmp_path / "demo", shell_image, "echo one; sleep 2; exit 3")
    async with driver(uri, store) as (process, run_id):
        process.kill()
        await process.wait()
    await anyio.to_thread.run_sync(docker_engine.call, "POST", f"/containers/mlfleet-{run_id}/wait")
    async with Fleet(tracking_uri=store) as fleet:
        run = await fleet.get(run_id)
        assert isinstance(run, TrackedRun)
        await work(run)
    assert (run.info.status, run.info.tags["mlfleet.reason"]) == (RunStatus.FAILED, "exit code 3")
    assert await containers(docker_engine, run_id) == []


async def test_a_container_that_was_removed_meanwhile_has_failed(
    docker_engine: DockerEngine, shell_image: str, new_store: Callable[[Path], str], tmp_path: Path
) -> None:
    store = new_store(tmp_path / "mlflow.db")
    async with driver(docker_project(tmp_path / "demo", shell_image, "echo one; sleep 600"), store) as (
        process,
        run_id,
    ):
        process.kill()
        await process.wait()
    await anyio.to_thread.run_sync(docker_engine.remove, f"mlfleet-{run_id}")
    async with Fleet(tracking_uri=store) as fleet:
        run = await fleet.attach(run_id)
        with pytest.raises(ExecutionException, match=r"is not on the engine \(any more\)"):
            await run.check()
        assert (await fleet.tracking.get_run(run_id)).status is RunStatus.FAILED


async def test_runs_that_cannot_be_attached_to_say_so(tmp_path: Path) -> None:
    tracking = FakeTracking()
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.submit(write_project(tmp_path / "demo", "true"), env_manager="local")
        await run.wait()
        with pytest.raises(UsageError, match=r"has no tag mlfleet\.ref"):
            await fleet.attach(run.run_id)


async def test_an_interrupted_driver_leaves_no_container(
    docker_engine: DockerEngine, shell_image: str, new_store: Callable[[Path], str], tmp_path: Path
) -> None:
    store = new_store(tmp_path / "mlflow.db")
    command = "trap '' TERM; echo one; sleep 600; sleep 600"
    async with driver(docker_project(tmp_path / "demo", shell_image, command), store) as (process, run_id):
        process.send_signal(signal.SIGINT)
        await process.wait()
    assert await containers(docker_engine, run_id) == []
    async with open_tracking(store) as tracking:
        assert (await tracking.get_run(run_id)).status is RunStatus.KILLED


class Proxy:
    """Stands between us and the engine, so that the engine can go away without going away."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.path = folder / "engine.sock"
        self.answers = True
        self._engine = engine
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def up(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))

    async def down(self) -> None:
        assert self._server is not None
        self._server.close()
        self.path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there_reader, there_writer = await asyncio.open_unix_connection(self._engine)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, there_writer))
                group.create_task(self._pass_on(there_reader, writer))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            there_writer.close()
            self._tasks.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            if not self.answers and b"/kill?" in data:
                await asyncio.get_running_loop().create_future()  # until the connection is closed
            writer.write(data)
            await writer.drain()
        writer.close()


@pytest.fixture
async def proxy(docker_engine: DockerEngine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    if not docker_engine.url.startswith("unix://"):
        pytest.skip("the engine is not on a Unix socket")
    folder = Path(os.path.realpath("/tmp")) / f"mlfleet-{os.getpid()}"  # pytest's folders are too long for a socket
    folder.mkdir()
    proxy = Proxy(folder, docker_engine.url.removeprefix("unix://"))
    await proxy.up()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{proxy.path}")
    yield proxy
    await proxy.down()
    shutil.rmtree(folder)


async def first_line(run: FleetRun) -> str:
    async for line in run.logs():
        return line
    raise AssertionError(f"the run ended without a line of output: {await run.outcome()}")


async def test_an_engine_that_comes_back_loses_no_run_and_no_output(
    proxy: Proxy, docker_engine: DockerEngine, shell_image: str, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    uri = docker_project(
        tmp_path / "demo", shell_image, "echo one; while [ ! -e /gate/open ]; do sleep 0.1; done; echo two; exit 4"
    )
    async with Fleet(tracking=FakeTracking(), max_concurrent=2) as fleet:
        run = await fleet.submit(uri, docker_args={"volume": f"{gate}:/gate"})
        assert await first_line(run) == "one"
        await proxy.down()
        (gate / "open").touch()
        while (await anyio.to_thread.run_sync(docker_engine.inspect, f"mlfleet-{run.run_id}"))["State"]["Running"]:
            await anyio.to_thread.run_sync(docker_engine.call, "GET", "/version")
        assert await run.get_status() is RunStatus.RUNNING
        await proxy.up()
        outcome = await run.outcome()
        assert (outcome.exit_code, outcome.output) == (4, ("one", "two"))
        assert outcome.reason == "exit code 4: the Docker engine was stopped or restarted while the run was in it"
        assert await containers(docker_engine, run.run_id) == []


async def test_output_after_an_engine_was_away_is_copied_although_it_has_discarded_what_was_before(
    proxy: Proxy, docker_engine: DockerEngine, shell_image: str, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    command = "for i in $(seq 500); do echo line $i; done; while [ ! -e /gate/open ]; do sleep 0.1; done; seq 100"
    uri = docker_project(tmp_path / "demo", shell_image, command)
    args = {"volume": f"{gate}:/gate", "log-driver": "json-file", "log-opt": ["max-size=4k", "max-file=1"]}
    async with Fleet(tracking=FakeTracking()) as fleet:
        run = await fleet.submit(uri, docker_args=args)
        async for line in run.logs():
            if line == "line 500":
                break
        await proxy.down()
        (gate / "open").touch()
        while (await anyio.to_thread.run_sync(docker_engine.inspect, f"mlfleet-{run.run_id}"))["State"]["Running"]:
            await anyio.to_thread.run_sync(docker_engine.call, "GET", "/version")
        await proxy.up()
        await run.wait()
        lines = [line async for line in run.logs()]
    assert lines[:500] == [f"line {number}" for number in range(1, 501)]
    assert lines[500].startswith("mlfleet: lines may be missing or repeated here")
    assert lines[-2:] == ["99", "100"]


async def test_a_container_whose_engine_does_not_answer_is_not_killed(
    proxy: Proxy, docker_engine: DockerEngine, shell_image: str, tmp_path: Path
) -> None:
    uri, tracking = docker_project(tmp_path / "demo", shell_image, "echo one; sleep 600"), FakeTracking()
    async with Fleet(tracking=tracking) as fleet:
        context_of(fleet).fleet.backends["docker"] = DockerBackend(end_patience=0.3)
        run = await fleet.submit(uri, docker_args={"network": "none"})
        async for _ in run.logs():
            break
        proxy.answers = False
        await run.cancel(grace=0)
        outcome = await run.outcome()
        proxy.answers = True
    assert outcome.status is RunStatus.FAILED
    assert isinstance(outcome.error, RunLost)
    assert "may still run, it could not be stopped" in str(outcome.reason)
    (left,) = await containers(docker_engine, run.run_id)
    assert left["State"] == "running"
    await anyio.to_thread.run_sync(docker_engine.remove, f"mlfleet-{run.run_id}")
