"""Projects with docker_env through a Fleet, in containers of a real engine."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import shutil
import socket
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from components import missing
from components.docker import DockerEngine
from components.mlflow_server import MlflowServer
from components.projects import write_project
from mlfleet import FailureKind, Fleet, FleetRun, RunStatus, Timeouts
from mlfleet.errors import ExecutionException, MlfleetError, RunTimeout, SubmitError, UsageError
from mlfleet.testing import FakeTracking
from mlfleet.tracking import RunInfo, open_tracking

# A container takes 0.3 s on a free machine, and several when the machine is not.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
async def fleet(tracking: FakeTracking) -> AsyncIterator[Fleet]:
    async with Fleet(tracking=tracking, max_concurrent=200, timeouts=Timeouts(cancel_grace=1)) as fleet:
        yield fleet


def docker_project(folder: Path, image: str, command: str, *, parameters: str = "", **docker_env: object) -> str:
    extra = f"docker_env: {json.dumps({'image': image, **docker_env})}\n"
    return write_project(folder, command, parameters=parameters, extra=extra)


async def first_line(run: FleetRun) -> str:
    """The first line that the run prints; it runs when this returns."""
    async for line in run.logs():
        return line
    raise AssertionError(f"the run ended without a line of output: {await run.outcome()}")


async def inspect(engine: DockerEngine, run_id: str) -> dict[str, object]:
    return await anyio.to_thread.run_sync(engine.inspect, f"mlfleet-{run_id}")


async def containers(engine: DockerEngine, run_id: str) -> list[dict[str, object]]:
    return await anyio.to_thread.run_sync(engine.containers, f"mlfleet.run-id={run_id}")


async def test_a_project_runs_in_its_image(
    fleet: Fleet, tracking: FakeTracking, shell_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COPIED", "from here")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in.txt").write_text("mounted\n")
    uri = docker_project(
        tmp_path / "demo",
        shell_image,
        'echo {alpha} | cat - /data/in.txt; echo "$SET|$COPIED|$MLFLOW_RUN_ID"; [ ! -e MLproject ]; id -u',
        parameters="alpha: float",
        volumes=[f"{tmp_path}/data:/data:ro"],
        environment=[["SET", "it is"], "COPIED"],
    )
    run = await fleet.submit(uri, parameters={"alpha": 0.5}, docker_args={"user": "1000"})
    assert await run.wait(), await run.outcome()
    assert [line async for line in run.logs()] == ["0.5", "mounted", f"it is|from here|{run.run_id}", "1000"]
    recorded = tracking.runs[run.run_id]
    assert recorded.status is RunStatus.FINISHED
    assert recorded.tags["mlflow.project.env"] == "docker"
    assert recorded.tags["mlflow.project.backend"] == "local"
    assert recorded.tags["mlflow.docker.image.uri"] == shell_image
    assert recorded.tags["mlflow.docker.image.id"].startswith("sha256:")
    assert recorded.params == {"alpha": "0.5"}
    assert json.loads(recorded.tags["mlfleet.ref"])["data"]["container"] == f"mlfleet-{run.run_id}"
    assert tracking.requests["log"] == 2


async def test_a_volume_without_a_source_is_one_warning(
    fleet: Fleet, shell_image: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "there").mkdir()
    volumes = [f"{tmp_path}/there:/a", f"{tmp_path}/typo:/b"]
    uri = docker_project(tmp_path / "demo", shell_image, "ls -d /b", volumes=volumes)
    for _ in range(2):
        run = await fleet.submit(uri)
        assert await run.wait(), await run.outcome()
        (tmp_path / "typo").rmdir()
    warned = [record.getMessage() for record in caplog.records if "does not exist" in record.getMessage()]
    assert warned == [f"the source {tmp_path}/typo of a volume does not exist: the engine makes an empty folder"]


async def test_variables_of_the_caller_are_there_inside_and_need_not_be_copied(
    fleet: Fleet, tracking: FakeTracking, docker_engine: DockerEngine, shell_image: str, tmp_path: Path
) -> None:
    uri = docker_project(
        tmp_path / "demo", shell_image, 'echo "$SET|$COPIED|$MORE"', environment=[["SET", "it is"], "COPIED"]
    )
    env = {"SET": "by the caller", "COPIED": "from the call", "MORE": "hush-hush"}
    run = await fleet.submit(uri, env=env, docker_args={"rm": False})
    assert [line async for line in run.logs()] == ["by the caller|from the call|hush-hush"]
    assert await run.wait()
    assert "hush-hush" not in repr(tracking.runs[run.run_id])
    with pytest.raises(UsageError, match="copies variables that are not set here: COPIED"):
        await fleet.submit(uri, env={"MORE": "hush-hush"})


async def test_path_parameters_are_there_inside(fleet: Fleet, shell_image: str, tmp_path: Path) -> None:
    (tmp_path / "a file.txt").write_text("its content\n")
    uri = docker_project(tmp_path / "demo", shell_image, "cat {data}", parameters="data: path")
    run = await fleet.submit(uri, parameters={"data": str(tmp_path / "a file.txt")})
    assert [line async for line in run.logs()] == ["its content"]


async def test_one_event_stream_serves_a_hundred_containers_at_once(
    fleet: Fleet, docker_engine: DockerEngine, shell_image: str, tmp_path: Path
) -> None:
    uri = docker_project(
        tmp_path / "demo", shell_image, "echo ready; read line < /gate/pipe; exit {code}", parameters="code: float"
    )
    gate = tmp_path / "gate"
    gate.mkdir()
    os.mkfifo(gate / "pipe")
    info = partial(docker_engine.call, "GET", "/info")
    before = await anyio.to_thread.run_sync(info)
    runs = await asyncio.gather(
        *(
            fleet.submit(uri, parameters={"code": number % 3}, docker_args={"v": f"{gate}:/gate", "network": "none"})
            for number in range(100)
        )
    )
    waiters = asyncio.gather(*(run.outcome() for run in runs for _ in range(2)))
    for run in runs:
        assert await first_line(run) == "ready"
    now = await anyio.to_thread.run_sync(info)
    assert now["ContainersRunning"] - before["ContainersRunning"] == 100
    assert now["NEventsListener"] - before["NEventsListener"] == 1
    pipe = os.open(gate / "pipe", os.O_RDWR)
    try:
        os.write(pipe, b"go\n" * 100)
        outcomes = await waiters
    finally:
        os.close(pipe)
    assert [outcome.exit_code for outcome in outcomes[::2]] == [number % 3 for number in range(100)]
    assert outcomes[::2] == outcomes[1::2]
    left = [item for run in runs for item in await containers(docker_engine, run.run_id)]
    assert left == []


async def test_only_the_run_sees_its_secrets(
    docker_engine: DockerEngine,
    shell_image: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("DB_PASSWORD", "hush-one")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-five")
    monkeypatch.setenv("AZURE_STORAGE_ACCESS_KEY", "hush-of-no-use")

    class SecretTracking(FakeTracking):
        async def create_run(self, *arguments: Any, **options: Any) -> RunInfo:
            return replace(await super().create_run(*arguments, **options), artifact_uri="s3://bucket/artifacts")

        async def environ(self) -> tuple[dict[str, str], dict[str, str]]:
            plain, _ = await super().environ()
            return plain, {"MLFLOW_TRACKING_TOKEN": "hush-two"}

    tracking = SecretTracking()
    uri = docker_project(
        tmp_path / "demo",
        shell_image,
        "echo ready; read line < /gate/pipe; env | sed -n 's/.*=\\(h[u]sh\\)/\\1/p' | sort > /gate/seen",
        environment=["DB_PASSWORD"],
    )
    (tmp_path / "gate").mkdir()
    os.mkfifo(tmp_path / "gate" / "pipe")
    async with Fleet(tracking=tracking) as fleet:
        run = await fleet.submit(
            uri,
            docker_args={"env": "KEY=hush-three", "volume": f"{tmp_path}/gate:/gate"},
            docker_auth={"username": "me", "password": "hush-four"},
        )
        assert await first_line(run) == "ready"
        inspected = await inspect(docker_engine, run.run_id)
        everybody = await anyio.to_thread.run_sync(_command_lines)
        with open(tmp_path / "gate" / "pipe", "w") as pipe:
            pipe.write("go\n")
        assert await run.wait(), await run.outcome()
    assert (tmp_path / "gate" / "seen").read_text().split() == ["hush-five", "hush-one", "hush-three", "hush-two"]
    config = inspected["Config"]
    assert isinstance(config, dict)
    assert "hush" not in json.dumps({**inspected, "Config": {**config, "Env": []}})
    assert "hush" not in everybody
    assert "hush" not in caplog.text
    assert "hush" not in repr(tracking.runs[run.run_id]) + repr(run._supervisor.description) + repr(run)


def _command_lines() -> str:
    """Return the parts of processes that every user of this machine can read."""
    lines = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            lines.append(Path("/proc", entry, "cmdline").read_text(errors="replace"))
        except OSError:
            continue
    return "\n".join(lines)


@pytest.mark.parametrize(("after", "code"), [("", 137), (" || exit 5", 5)])
async def test_out_of_memory_is_reported(
    fleet: Fleet, tracking: FakeTracking, shell_image: str, tmp_path: Path, after: str, code: int
) -> None:
    # The kernel ends the one that says so, rather than the shell that tells of it.
    first = "echo 1000 >/proc/self/oom_score_adj"
    command = f"bash -c '{first}; x=$(yes | head -c 500000000); echo ${{{{#x}}}}'{after}"
    run = await fleet.submit(
        docker_project(tmp_path / "demo", shell_image, command), docker_args={"memory": "32m", "memory-swap": "32m"}
    )
    with pytest.raises(ExecutionException, match=r"out of memory \(its limit is 32 MiB\)"):
        await run.check()
    outcome = await run.outcome()
    assert (outcome.exit_code, outcome.kind) == (code, FailureKind.OOM)
    tags = tracking.runs[run.run_id].tags
    assert tags["mlfleet.failure_kind"] == "oom"
    assert tags["mlfleet.reason"].startswith("out of memory (its limit is 32 MiB)")


async def test_a_timeout_ends_the_container(
    fleet: Fleet, tracking: FakeTracking, docker_engine: DockerEngine, shell_image: str, tmp_path: Path
) -> None:
    uri = docker_project(tmp_path / "demo", shell_image, "trap '' TERM; echo here; sleep 600; sleep 600")
    run = await fleet.submit(uri, timeouts=Timeouts(run=0.5, cancel_grace=0.2))
    with pytest.raises(RunTimeout, match="run timeout of"):
        await run.check()
    assert tracking.runs[run.run_id].status is RunStatus.FAILED
    assert await containers(docker_engine, run.run_id) == []


async def test_output_can_be_inherited(
    fleet: Fleet, shell_image: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = docker_project(tmp_path / "demo", shell_image, "echo to stdout; echo to stderr >&2")
    run = await fleet.submit(uri, output="inherit")
    assert await run.wait()
    seen = capfd.readouterr()
    assert seen.out == "to stdout\n"
    assert seen.err == "to stderr\n"


async def test_a_terminal_can_be_requested(fleet: Fleet, shell_image: str, tmp_path: Path) -> None:
    uri = docker_project(tmp_path / "demo", shell_image, "[ -t 1 ] && echo a terminal")
    run = await fleet.submit(uri, docker_args={"t": True})
    assert [line async for line in run.logs()] == ["a terminal"]


async def test_much_output_and_binary_output_arrive_byte_for_byte(
    fleet: Fleet, shell_image: str, tmp_path: Path
) -> None:
    uri = docker_project(tmp_path / "demo", shell_image, "head -c 50000000 /dev/urandom; printf end")
    run = await fleet.submit(uri)
    assert await run.wait()
    assert run.output_path is not None
    assert run.output_path.stat().st_size == 50_000_003
    assert run.output_path.read_bytes()[-3:] == b"end"


async def test_a_tracking_server_on_loopback_is_reached(
    mlflow_server: MlflowServer, python_image: str, tmp_path: Path
) -> None:
    uri = docker_project(tmp_path / "demo", python_image, "python log.py")
    (tmp_path / "demo" / "log.py").write_text(
        "import json, os, time, urllib.request\n"
        "body = {'run_id': os.environ['MLFLOW_RUN_ID'], 'key': 'loss', 'value': 0.25, 'timestamp': 1, 'step': 0}\n"
        "url = os.environ['MLFLOW_TRACKING_URI'] + '/api/2.0/mlflow/runs/log-metric'\n"
        "request = urllib.request.Request(url, json.dumps(body).encode(), {'Content-Type': 'application/json'})\n"
        "urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)\n"
    )
    async with Fleet(tracking_uri=mlflow_server.url) as fleet:
        run = await fleet.submit(uri, build_image=True)
        assert await run.wait(), await run.outcome()
        info = await fleet.tracking.get_run(run.run_id)
    assert info.metrics == {"loss": 0.25}
    assert info.status is RunStatus.FINISHED


async def test_a_local_store_and_its_artifacts_are_mounted(
    new_store: Callable[[Path], str], python_image: str, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    store = new_store(tmp_path / "store" / "mlflow.db")
    uri = docker_project(tmp_path / "demo", python_image, "python log.py")
    (tmp_path / "demo" / "log.py").write_text(
        "import os, sqlite3\n"
        "path = os.environ['MLFLOW_TRACKING_URI'].partition('sqlite:///')[2]\n"
        "with sqlite3.connect(path) as store:\n"
        "    query = 'select artifact_uri from runs where run_uuid = ?'\n"
        "    folder = store.execute(query, (os.environ['MLFLOW_RUN_ID'],)).fetchone()[0]\n"
        "    store.execute('insert into tags values (?, ?, ?)', ('seen', 'inside', os.environ['MLFLOW_RUN_ID']))\n"
        "open(os.path.join(folder.removeprefix('file://'), 'made.txt'), 'w').write('inside')\n"
    )
    async with Fleet(tracking_uri=store) as fleet:
        run = await fleet.submit(uri, build_image=True)
        assert await run.wait(), await run.outcome()
    async with open_tracking(store) as tracking:
        info = await tracking.get_run(run.run_id)
    assert info.tags["seen"] == "inside"
    assert (Path(info.artifact_uri.removeprefix("file://")) / "made.txt").read_text() == "inside"


@pytest.mark.parametrize(
    ("docker_env", "options", "text"),
    [
        ({"environment": ["NOT_SET_ONE", "NOT_SET_TWO"]}, {}, "not set here: NOT_SET_ONE, NOT_SET_TWO"),
        ({"volumes": ["nonsense"]}, {}, "docker_env: volumes: 'nonsense' should be SOURCE:TARGET"),
        ({}, {"docker_args": {"memroy": "2g"}}, "did you mean 'memory'"),
        ({}, {"docker_args": {"restart": "always"}}, "'restart' cannot be used"),
        ({}, {"docker_auth": {"user": "me"}}, "docker_auth has user"),
        ({"image": "Not An Image"}, {}, "not the name of an image"),
    ],
)
async def test_mistakes_are_reported_before_anything_exists(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path, docker_env: dict[str, object], options: dict[str, object],
    text: str,
) -> None:  # fmt: skip
    image = str(docker_env.pop("image", "team/image"))
    uri = docker_project(tmp_path / "demo", image, "true", **docker_env)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=text):
        await fleet.submit(uri, **options)  # type: ignore[arg-type]
    assert not tracking.runs


async def test_a_state_folder_that_cannot_be_written_is_the_reason(
    fleet: Fleet, shell_image: str, docker_engine: DockerEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").touch()  # a file in the place of the folder
    monkeypatch.setenv("MLFLEET_STATE_DIR", str(tmp_path / "state"))
    run = await fleet.submit(docker_project(tmp_path / "demo", shell_image, "true"))
    outcome = await run.outcome()
    assert isinstance(outcome.error, SubmitError)
    assert outcome.reason is not None
    assert f"cannot be written to {tmp_path}/state/runs/{run.run_id}: Not a directory" in outcome.reason
    assert await containers(docker_engine, run.run_id) == []


async def test_the_docker_backend_needs_a_docker_env(fleet: Fleet, tracking: FakeTracking, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="docker_env with an image; this one has none"):
        await fleet.submit(write_project(tmp_path / "demo", "true"), backend="docker")
    assert not tracking.runs


async def failure(fleet: Fleet, uri: str, **options: object) -> str:
    run = await fleet.submit(uri, **options)  # type: ignore[arg-type]
    with pytest.raises(ExecutionException) as caught:
        await run.check()
    assert (await run.outcome()).status is RunStatus.FAILED
    return str(caught.value)


async def test_no_engine_is_one_clear_failure(
    tracking: FakeTracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    async with Fleet(tracking=tracking) as fleet:
        text = await failure(fleet, docker_project(tmp_path / "demo", "team/image", "true"))
    assert f"there is no Docker engine at unix://{tmp_path}/nothing.sock: start it, or set DOCKER_HOST" in text
    assert [run.status for run in tracking.runs.values()] == [RunStatus.FAILED]


async def test_a_wrong_docker_host_is_an_error(
    tracking: FakeTracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "ssh://me@there")
    async with Fleet(tracking=tracking) as fleet:
        text = await failure(fleet, docker_project(tmp_path / "demo", "team/image", "true"))
    assert "DOCKER_HOST is 'ssh://me@there': unix:///path and tcp://host:port are understood" in text


async def test_no_permission_is_one_clear_failure() -> None:
    # Not in pytest's folders, where only their owner comes in.
    with tempfile.TemporaryDirectory(dir="/tmp") as name, socket.socket(socket.AF_UNIX) as locked:
        folder = Path(name)
        folder.chmod(0o755)
        if os.getuid() == 0:  # mlfleet refuses a state folder in a place that is another user's
            os.chown(folder, _NOBODY, _NOBODY)
        locked.bind(f"{folder}/locked.sock")
        locked.listen()
        (folder / "locked.sock").chmod(0o600 if os.getuid() == 0 else 0)
        uri = docker_project(folder / "demo", "team/image", "true")
        environ = {
            **os.environ,
            "DOCKER_HOST": f"unix://{folder}/locked.sock",
            "MLFLEET_CACHE_DIR": f"{folder}/cache",
            "MLFLEET_STATE_DIR": f"{folder}/state",
        }
        done = await anyio.run_process([*_somebody_else(), sys.executable, "-c", _REASON, uri], env=environ)
    assert done.stdout.decode().strip() == (
        f"there is no permission to use the Docker engine at unix://{folder}/locked.sock: add this user to the group of"
        " the socket (usually 'docker') and log in again, or set DOCKER_HOST to an engine of this user's own"
    )


_NOBODY = 65534


def _somebody_else() -> list[str]:
    """Root may use every socket; nobody may not. It only has to be able to read the Python of the tests."""
    if os.getuid() != 0:
        return []
    program = shutil.which("setpriv") or missing("setpriv", "apt-get install util-linux")
    reading = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return [program, f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", *reading]


_REASON = """\
import asyncio, sys
from mlfleet import Fleet
from mlfleet.testing import FakeTracking

async def main():
    async with Fleet(tracking=FakeTracking()) as fleet:
        print((await (await fleet.submit(sys.argv[1])).outcome()).reason)

asyncio.run(main())
"""


async def test_a_refusal_of_the_engine_is_the_reason(
    fleet: Fleet, docker_engine: DockerEngine, shell_image: str, tmp_path: Path
) -> None:
    uri = docker_project(tmp_path / "demo", shell_image, "true")
    text = await failure(fleet, uri, docker_args={"runtime": "no-such-runtime"})
    assert "the engine does not run the container" in text
    assert "no-such-runtime" in text
    text = await failure(fleet, uri, docker_args={"gpus": "all"})
    assert "the engine cannot give GPUs to containers" in text
    taken = await fleet.submit(
        docker_project(tmp_path / "other", shell_image, "echo ready; sleep 600"),
        docker_args={"name": "mlfleet-test-taken"},
    )
    assert await first_line(taken) == "ready"
    assert "there is a container mlfleet-test-taken already" in await failure(
        fleet, uri, docker_args={"name": "mlfleet-test-taken"}
    )
    assert await taken.get_status() is RunStatus.RUNNING
    await taken.cancel()
    found = await anyio.to_thread.run_sync(docker_engine.containers, "mlfleet.run-id")
    assert not [item for item in found if item["Names"] == ["/mlfleet-test-taken"]]


async def test_an_image_without_a_shell_is_an_error(fleet: Fleet, docker_engine: DockerEngine, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("nothing"))
    name = "mlfleet-test/empty:1"
    await anyio.to_thread.run_sync(docker_engine.import_image, name, buffer.getvalue())
    try:
        text = await failure(fleet, docker_project(tmp_path / "demo", name, "true"), docker_args={"init": False})
        assert "has no shell (sh), which the project's command needs" in text
    finally:
        await anyio.to_thread.run_sync(docker_engine.remove_image, name)


async def test_errors_are_subclasses_of_ours(fleet: Fleet, shell_image: str, tmp_path: Path) -> None:
    run = await fleet.submit(docker_project(tmp_path / "demo", shell_image, "exit 9"))
    outcome = await run.outcome()
    assert (outcome.exit_code, outcome.reason, outcome.error) == (9, "exit code 9", None)
    nowhere = await fleet.submit(docker_project(tmp_path / "missing", "127.0.0.1:1/team/image:1", "true"))
    error = (await nowhere.outcome()).error
    assert isinstance(error, MlfleetError)
    assert "'127.0.0.1:1/team/image:1' is not on the engine and cannot be pulled" in str(error)
