"""An engine that is really stopped, killed and started again under its runs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio
import pytest

from components.docker import DockerEngine
from components.own_engine import OwnEngine
from components.projects import write_project
from mlfleet import FailureKind, Fleet, FleetRun, RunStatus
from mlfleet._retry import RetryPolicy
from mlfleet.backends.docker.client import Engine
from mlfleet.backends.docker.watch import ContainerWatch, Phase
from mlfleet.errors import RunLost
from mlfleet.testing import FakeTracking

pytestmark = pytest.mark.timeout(120)  # engines start and stop, on a busy machine

COMMAND = "echo one; while [ ! -e /gate/open ]; do sleep 0.1; done; echo two; exit 4"


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The command goes on when the file ``open`` is there."""
    (tmp_path / "gate").mkdir()
    return tmp_path / "gate"


@pytest.fixture
def uri(gate: Path, tmp_path: Path) -> str:
    environment = {"image": OwnEngine.image, "volumes": [f"{gate}:/gate"]}
    return write_project(tmp_path / "demo", COMMAND, extra=f"docker_env: {json.dumps(environment)}\n")


async def running(fleet: Fleet, uri: str) -> FleetRun:
    run = await fleet.submit(uri, docker_args={"network": "none"})
    async for line in run.logs():
        assert line == "one"
        return run
    raise AssertionError(f"the run ended without a line of output: {await run.outcome()}")


async def left(engine: OwnEngine) -> list[dict[str, object]]:
    return await anyio.to_thread.run_sync(engine.containers, "mlfleet.run-id")


async def test_a_run_survives_a_restart_with_live_restore(
    own_engine: Callable[..., OwnEngine], uri: str, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await anyio.to_thread.run_sync(own_engine, "--live-restore")
    monkeypatch.setenv("DOCKER_HOST", engine.url)
    async with Fleet(tracking=FakeTracking()) as fleet:
        run = await running(fleet, uri)
        await anyio.to_thread.run_sync(engine.stop)
        await anyio.to_thread.run_sync(engine.start)
        assert await run.get_status() is RunStatus.RUNNING
        (gate / "open").touch()
        outcome = await run.outcome()
    assert (outcome.exit_code, outcome.output) == (4, ("one", "two"))
    # And that the engine was away, if we were not yet back ourselves to see the end.
    assert str(outcome.reason).startswith("exit code 4")
    assert await left(engine) == []


async def test_a_run_that_ends_while_the_engine_is_away_is_concluded_when_it_is_back(
    own_engine: Callable[..., OwnEngine], uri: str, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await anyio.to_thread.run_sync(own_engine, "--live-restore")
    monkeypatch.setenv("DOCKER_HOST", engine.url)
    async with Fleet(tracking=FakeTracking()) as fleet:
        run = await running(fleet, uri)
        inspected = await anyio.to_thread.run_sync(engine.inspect, f"mlfleet-{run.run_id}")
        process = os.pidfd_open(inspected["State"]["Pid"])
        await anyio.to_thread.run_sync(engine.stop)
        (gate / "open").touch()
        await anyio.wait_readable(process)
        os.close(process)
        assert await run.get_status() is RunStatus.RUNNING
        await anyio.to_thread.run_sync(engine.start)
        outcome = await run.outcome()
    # The engine itself loses what was printed meanwhile, if the container has ended before it is back.
    assert (outcome.exit_code, outcome.output[0]) == (4, "one")
    assert outcome.reason == "exit code 4: the Docker engine was stopped or restarted while the run was in it"
    assert await left(engine) == []


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (signal.SIGTERM, "the Docker engine sent it SIGTERM, since it was stopped itself"),
        (signal.SIGKILL, "the Docker engine was stopped or restarted while the run was in it"),
    ],
)
async def test_a_run_that_is_stopped_with_the_engine_has_failed_with_a_reason(
    own_engine: Callable[..., OwnEngine], uri: str, monkeypatch: pytest.MonkeyPatch, how: signal.Signals, text: str
) -> None:
    engine = await anyio.to_thread.run_sync(own_engine)
    monkeypatch.setenv("DOCKER_HOST", engine.url)
    tracking = FakeTracking()
    async with Fleet(tracking=tracking) as fleet:
        run = await running(fleet, uri)
        await anyio.to_thread.run_sync(partial(engine.stop, how))
        await anyio.to_thread.run_sync(engine.start)
        outcome = await run.outcome()
    print(outcome)
    assert (outcome.status, outcome.kind) == (RunStatus.FAILED, FailureKind.INFRASTRUCTURE)
    assert text in str(outcome.reason)
    assert tracking.runs[run.run_id].status is RunStatus.FAILED
    assert await left(engine) == []


async def test_a_container_that_somebody_stops_has_failed_with_a_reason(
    docker_engine: DockerEngine, shell_image: str, tmp_path: Path
) -> None:
    extra = f"docker_env: {{image: '{shell_image}'}}\n"
    uri = write_project(tmp_path / "demo", "echo one; sleep 600", extra=extra)
    async with Fleet(tracking=FakeTracking()) as fleet:
        run = await running(fleet, uri)
        await anyio.to_thread.run_sync(docker_engine.call, "POST", f"/containers/mlfleet-{run.run_id}/stop")
        outcome = await run.outcome()
    assert outcome.reason == (
        "exit code 143 (SIGTERM): the Docker engine sent it SIGTERM, since it was stopped itself, or was asked to"
        " (docker stop or rm)"
    )


async def test_a_container_that_somebody_removes_has_failed_by_its_surroundings(
    docker_engine: DockerEngine, shell_image: str, tmp_path: Path
) -> None:
    extra = f"docker_env: {{image: '{shell_image}'}}\n"
    uri = write_project(tmp_path / "demo", "echo one; sleep 600", extra=extra)
    async with Fleet(tracking=FakeTracking()) as fleet:
        run = await running(fleet, uri)
        await anyio.to_thread.run_sync(docker_engine.remove, f"mlfleet-{run.run_id}")
        outcome = await run.outcome()
    assert (outcome.status, outcome.kind) == (RunStatus.FAILED, FailureKind.INFRASTRUCTURE)
    assert "removed by somebody else" in str(outcome.reason) or "(docker stop or rm)" in str(outcome.reason)


async def test_a_paused_container_can_be_cancelled(
    docker_engine: DockerEngine, shell_image: str, tmp_path: Path
) -> None:
    extra = f"docker_env: {{image: '{shell_image}'}}\n"
    uri = write_project(tmp_path / "demo", "echo one; sleep 600", extra=extra)
    async with Fleet(tracking=FakeTracking()) as fleet:
        run = await running(fleet, uri)
        await anyio.to_thread.run_sync(docker_engine.call, "POST", f"/containers/mlfleet-{run.run_id}/pause")
        assert await run.get_status() is RunStatus.RUNNING
        await run.cancel()
        assert (await run.outcome()).status is RunStatus.KILLED
    label = f"mlfleet.run-id={run.run_id}"
    assert await anyio.to_thread.run_sync(docker_engine.containers, label) == []


async def test_an_engine_that_stays_away_is_given_up(
    own_engine: Callable[..., OwnEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await anyio.to_thread.run_sync(own_engine, "--live-restore")
    monkeypatch.setenv("DOCKER_HOST", engine.url)
    body = {"Image": OwnEngine.image, "Cmd": ["sleep", "600"], "Labels": {"mlfleet.run-id": "r1"}}
    body["HostConfig"] = {"NetworkMode": "none"}
    made = await anyio.to_thread.run_sync(engine.call, "POST", "/containers/create", body)
    await anyio.to_thread.run_sync(engine.call, "POST", f"/containers/{made['Id']}/start")
    async with Engine() as client, ContainerWatch(client, retries=RetryPolicy(seconds=0.5)) as containers:
        cell = containers.track(made["Id"])
        await cell.until(lambda state: state.phase is Phase.RUNNING)
        await anyio.to_thread.run_sync(engine.stop)
        with pytest.raises(RunLost, match=r"the Docker engine was away for 0\.5 s: there is no Docker engine at"):
            await cell.until(lambda state: state.ended)
    await anyio.to_thread.run_sync(engine.start)
