"""Detached runs: a process of their own supervises them, and outlives the one that submitted them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import mlfleet
from components.command_line import mlfleet as command_line
from components.projects import pid_is_gone, write_project
from fakes.scripted_server import Peer, scripted
from fakes.small_mlflow import SmallMlflow
from mlfleet import (
    FailureKind,
    Fleet,
    JobRef,
    MlfleetError,
    RunCancelled,
    RunEvent,
    RunStatus,
    Stage,
    Timeouts,
    UsageError,
    grid,
)
from mlfleet._process.guardian import MARKER_VARIABLE, RUN_VARIABLE
from mlfleet.otel import instrument
from mlfleet.testing import FakeTracking

LOCAL: dict[str, Any] = {"env_manager": "local"}
# It says who it is, and goes on until the file `go` is there.
PATIENT = "echo $$; while [ ! -e ../go ]; do sleep 0.05; done; echo done"


@dataclass(frozen=True, slots=True)
class Server:
    mlflow: SmallMlflow
    url: str

    def driver(self, run_id: str) -> psutil.Process:
        """The process that supervises a run."""
        tags = {tag["key"]: tag["value"] for tag in self.mlflow.runs[run_id]["data"]["tags"]}
        return psutil.Process(JobRef.from_json(tags[JobRef.TAG]).data["driver"])


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    mlflow = SmallMlflow()
    async with scripted(mlflow.script) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.place}")
        yield Server(mlflow, f"http://{server.place}")
        # Without the server they would try for a minute to write the status of their run.
        await until(lambda: not supervisors())


def supervisors() -> list[int]:
    """The processes of this test that supervise detached runs."""
    found = []
    for process in psutil.process_iter():
        try:
            is_one = any("detached_main" in word for word in process.cmdline())
            if is_one and process.environ().get("MLFLEET_STATE_DIR") == os.environ["MLFLEET_STATE_DIR"]:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


async def until(is_true: Callable[[], object]) -> None:
    """Wait for something that other processes do."""
    while not is_true():  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.05)


def write_slow_build(folder: Path) -> str:
    """Write a project whose environment takes ten minutes to build."""
    package = folder / "slow"
    package.mkdir(parents=True)
    (package / "setup.py").write_text("import time\ntime.sleep(600)\n")
    (folder / "python_env.yaml").write_text("dependencies:\n  - ./slow\n")
    return write_project(folder, "echo never", extra="python_env: python_env.yaml\n")


async def cli(*arguments: str) -> tuple[int, str, str]:
    done = await asyncio.to_thread(command_line, *arguments)
    return done.returncode, done.stdout, done.stderr


async def test_it_goes_on_when_its_fleet_is_left_and_is_found_by_its_id(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (MARKER_VARIABLE, RUN_VARIABLE):  # as if this process were a run itself
        monkeypatch.setenv(name, "above")
    async with Fleet(tracking_uri=server.url) as fleet:
        run = await fleet.submit(write_project(tmp_path / "demo", PATIENT), detach=True, **LOCAL)
        pid = int(await anext(run.logs()))
        assert fleet.runs == ()
        await fleet.cancel()
    assert server.driver(run.run_id).environ().keys().isdisjoint([MARKER_VARIABLE, RUN_VARIABLE])
    assert MARKER_VARIABLE not in psutil.Process(pid).environ()
    assert psutil.Process(pid).environ()[RUN_VARIABLE] == run.run_id
    with pytest.raises(UsageError, match=rf"detached and goes on.*mlfleet wait {run.run_id}"):
        await run.wait()
    assert server.mlflow.statuses == ["RUNNING"]
    (tmp_path / "go").touch()
    assert await cli("logs", "-f", run.run_id) == (0, f"{pid}\ndone\n", "")
    code, out, _ = await cli("wait", run.run_id)
    assert (code, out) == (0, f"{run.run_id} FINISHED\n")


async def test_it_gets_the_variables_of_its_caller_and_no_file_holds_them(server: Server, tmp_path: Path) -> None:
    state = Path(os.environ["MLFLEET_STATE_DIR"])
    async with Fleet(tracking_uri=server.url) as fleet:
        uri = write_project(tmp_path / "demo", "echo ${#TOKEN}; cat ../go; exit 3")
        os.mkfifo(tmp_path / "go")
        run = await fleet.submit(uri, env={"TOKEN": "correct-horse"}, detach=True, **LOCAL)
        assert await anext(run.logs()) == "13"
        command_lines = [psutil.Process(pid).cmdline() for pid in supervisors()]
        await asyncio.to_thread((tmp_path / "go").write_text, "")
        await run.wait()
    assert command_lines
    assert "correct-horse" not in json.dumps([command_lines, server.mlflow.runs])
    files = [path for path in state.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"correct-horse" in path.read_bytes()]


@pytest.mark.parametrize(
    ("command", "timeouts"),
    [("echo said", None), ("echo said; exit 3", None), ("echo said; sleep 100", Timeouts(run=0.3, cancel_grace=2))],
    ids=["finished", "failed", "timeout"],
)
async def test_its_handle_tells_what_that_of_any_run_tells(
    server: Server, tmp_path: Path, command: str, timeouts: Timeouts | None
) -> None:
    uri = write_project(tmp_path / "demo", command)
    seen, stages = [], []
    for detach in (False, True):
        events: list[RunEvent] = []
        async with Fleet(tracking_uri=server.url, on_event=events.append) as fleet:
            run = await fleet.submit(uri, detach=detach, timeouts=timeouts, parameters={"n": Decimal(1)}, **LOCAL)
            lines = [line async for line in run.logs()]
            outcome = await run.outcome()
            try:
                await run.check()
                error = ""
            except MlfleetError as raised:
                error = f"{type(raised).__name__} {raised}".replace(run.run_id, "ID")
            facts = (run.project_name, run.backend, run.parameters, await run.get_status(), list(run.times))
            seen.append((lines, outcome.status, outcome.reason, outcome.output, outcome.kind, error, facts))
            stages.append([event.stage for event in events])
    assert seen[0] == seen[1]
    assert stages[0] == stages[1]
    assert len(set(server.mlflow.statuses)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entry_point": "other"}, "other"),
        ({"parameters": {}}, "no value is given for 'x'"),
        ({"uri": "missing"}, "missing"),
        ({"backend": "nowhere"}, "nowhere"),
        ({"parameters": {"x": object()}}, "a string, a number, a boolean or a path was expected, got object"),
    ],
)
async def test_a_mistake_is_reported_as_by_any_submit(
    server: Server, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    uri = write_project(tmp_path / "demo", "echo {x}", parameters="x: string")
    given = {"uri": uri, "parameters": {"x": 1}, **options, **LOCAL}
    raised = []
    for detach in (False, True):
        with pytest.raises(MlfleetError, match=message) as caught:
            await mlfleet.submit(**given, detach=detach)
        raised.append((type(caught.value), str(caught.value), vars(caught.value)))
    assert raised[0] == raised[1]
    assert server.mlflow.runs == {}


async def test_a_warning_is_given_as_by_any_submit(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = write_project(tmp_path / "demo", "true", extra="colour: green\n")
    for detach in (False, True):
        run = await mlfleet.submit(uri, detach=detach, **LOCAL)
        assert await run.wait()
    first, second = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "colour" in first.getMessage()
    assert (first.name, first.getMessage()) == (second.name, second.getMessage())


async def test_a_cancelled_submit_leaves_nothing(tmp_path: Path) -> None:
    asked, cancelled = asyncio.Event(), asyncio.Event()

    async def answer_late(peer: Peer, answer: bytes) -> bool:
        asked.set()
        await cancelled.wait()
        await peer.send(answer)
        return True

    mlflow = SmallMlflow({"create": [answer_late]})
    uri = write_project(tmp_path / "demo", "touch ../begun")
    async with scripted(mlflow.script) as server, Fleet(tracking_uri=f"http://{server.place}") as fleet:
        task = asyncio.ensure_future(fleet.submit(uri, detach=True, **LOCAL))
        await asked.wait()
        task.cancel()
        cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert mlflow.statuses == ["KILLED"]
    await until(lambda: not supervisors())
    assert not (tmp_path / "begun").exists()


@pytest.mark.parametrize("how", ["cancelled at once", "closed fleet", "killed"])
async def test_a_submit_that_is_torn_before_the_process_answers_leaves_nothing(
    server: Server, tmp_path: Path, how: str
) -> None:
    uri = write_project(tmp_path / "demo", "sleep 600")
    if how == "killed":
        code = "import asyncio, mlfleet, os, sys\n"
        code += "from mlfleet._engine import detached\n"
        code += f"asyncio.run(mlfleet.submit({uri!r}, env_manager='local', detach=True))"
        driver = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=tmp_path)
        await until(supervisors)
        driver.kill()
        await driver.wait()
    else:
        async with Fleet(tracking_uri=server.url, on_exit="cancel") as fleet:
            task = asyncio.ensure_future(fleet.submit(uri, detach=True, **LOCAL))
            await until(supervisors)
            if how == "cancelled at once":
                task.cancel()
        with pytest.raises(asyncio.CancelledError if how == "cancelled at once" else RunCancelled):
            await task
    await until(lambda: not supervisors())
    assert set(server.mlflow.statuses) <= {"KILLED"}


async def test_cancel_ends_it_wherever_it_comes_from(server: Server, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo $$; exec sleep 600")
    async with Fleet(tracking_uri=server.url) as fleet:
        first, second = [await fleet.submit(uri, detach=True, **LOCAL) for _ in range(2)]
        pids = [int(await anext(run.logs())) for run in (first, second)]
        await first.cancel()
        code, out, _ = await cli("cancel", second.run_id)
        assert (code, out) == (0, f"{second.run_id} KILLED\n")
        assert await second.get_status() in (RunStatus.RUNNING, RunStatus.KILLED)
        for run in (first, second):
            with pytest.raises(RunCancelled):
                await run.check()
    assert all(pid_is_gone(pid) for pid in pids)
    assert server.mlflow.statuses == ["KILLED", "KILLED"]


async def test_cancel_from_elsewhere_ends_what_prepares_it(server: Server, tmp_path: Path) -> None:
    uri = write_slow_build(tmp_path / "demo")
    async with Fleet(tracking_uri=server.url) as fleet:
        events = fleet.events()
        run = await fleet.submit(uri, detach=True, env_manager="virtualenv")
        async for event in events:
            if event.stage is Stage.PREPARING:
                break
        code, out, _ = await cli("cancel", run.run_id)
        assert (code, out) == (0, f"{run.run_id} KILLED\n")
        assert (await run.outcome()).status is RunStatus.KILLED
    await until(lambda: not supervisors())
    assert server.mlflow.statuses == ["KILLED"]


async def test_it_goes_on_when_its_submitter_is_killed(server: Server, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", PATIENT)
    code = "import mlfleet, os, signal\n"
    code += f"run = mlfleet.run({uri!r}, env_manager='local', synchronous=False, detach=True)\n"
    code += "print(next(run.logs()), flush=True)\n"
    code += "os.kill(os.getpid(), signal.SIGKILL)"
    driver = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    out, _ = await driver.communicate()
    assert driver.returncode == -signal.SIGKILL
    assert not pid_is_gone(int(out))
    assert server.mlflow.statuses == ["RUNNING"]
    (tmp_path / "go").touch()
    await until(lambda: server.mlflow.statuses == ["FINISHED"])


@pytest.mark.parametrize("how", ["waits", "cancels", "leaves"])
async def test_it_goes_on_when_its_supervisor_is_killed_and_is_concluded_by_the_one_that_looks(
    server: Server, tmp_path: Path, how: str
) -> None:
    async with Fleet(tracking_uri=server.url) as fleet:
        run = await fleet.submit(write_project(tmp_path / "demo", PATIENT), detach=True, **LOCAL)
        pid = int(await anext(run.logs()))
        server.driver(run.run_id).kill()
        await until(lambda: not supervisors())
        assert not pid_is_gone(pid)
        if how == "cancels":
            await run.cancel()
            assert pid_is_gone(pid)
        (tmp_path / "go").touch()
        if how != "leaves":
            assert await run.wait() == (how == "waits")
    if how == "leaves":
        code, out, _ = await cli("wait", run.run_id)
        assert (code, out) == (0, f"{run.run_id} FINISHED\n")
    assert server.mlflow.statuses == ["KILLED" if how == "cancels" else "FINISHED"]


async def test_a_run_whose_supervisor_is_killed_before_its_command_fails(server: Server, tmp_path: Path) -> None:
    uri = write_slow_build(tmp_path / "demo")
    async with Fleet(tracking_uri=server.url) as fleet:
        events = fleet.events()
        runs = [await fleet.submit(uri, detach=True, env_manager="virtualenv") for _ in range(2)]
        async for event in events:
            if event.stage is Stage.PREPARING and event.run_id == runs[1].run_id:
                break
        server.driver(runs[0].run_id).kill()
        outcome = await runs[0].outcome()
        assert (outcome.status, outcome.kind) == (RunStatus.FAILED, FailureKind.INFRASTRUCTURE)
    server.driver(runs[1].run_id).kill()
    await until(lambda: not supervisors())
    code, out, _ = await cli("wait", runs[1].run_id)
    assert (code, out.split()[:2]) == (1, [runs[1].run_id, "FAILED"])
    assert server.mlflow.statuses == ["FAILED", "FAILED"]


async def test_secrets_are_in_no_argument_and_no_file(server: Server, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", PATIENT)
    secret = server.url.replace("http://", "http://me:S3cr3t@")
    async with Fleet(tracking_uri=secret) as fleet:
        run = await fleet.submit(uri, detach=True, docker_auth={"password": "S3cr3t"}, env={"KEY": "S3cr3t"}, **LOCAL)
        assert psutil.Process(int(await anext(run.logs()))).environ()["KEY"] == "S3cr3t"
        driver = server.driver(run.run_id)
        assert "S3cr3t" not in str(driver.cmdline())
        assert "S3cr3t" not in str(driver.environ())
        await run.cancel()
    files = [path for path in Path(os.environ["MLFLEET_STATE_DIR"]).rglob("*") if path.is_file()]
    assert files
    assert not any(b"S3cr3t" in path.read_bytes() for path in files)


async def test_the_command_line_prints_the_id_of_the_run(server: Server, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", PATIENT)
    code, out, err = await cli("run", uri, "--detach", "--env-manager", "local")
    (first,) = server.mlflow.runs
    assert (code, out) == (0, f"{first}\n")
    assert "goes on; mlfleet logs -f, wait and cancel take its id" in err
    code, out, _ = await cli("run", uri, "--detach", "--env-manager", "local", "--json", "-q")
    told = json.loads(out)
    _, second = server.mlflow.runs
    assert (code, told["run_id"], told["status"], told["project"]) == (0, second, "RUNNING", "demo")
    (tmp_path / "go").touch()
    code, out, _ = await cli("wait", first, second)
    assert (code, sorted(out.splitlines())) == (0, [f"{first} FINISHED", f"{second} FINISHED"])
    assert Path(told["output"]).read_text().endswith("done\n")


async def test_mistakes_in_the_command_line_are_one_error(server: Server, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo {x}", parameters="x: string")
    code, out, err = await cli("run", uri, "--detach", "--env-manager", "local")
    assert (code, out) == (2, "")
    assert err == "Error: the parameters of the entry point 'main' are wrong: no value is given for 'x'\n"
    code, out, err = await cli("run", uri, "--detach", "--dry-run")
    assert (code, out) == (2, "")
    assert "Error: --detach and --dry-run contradict each other: give one of them" in err
    assert server.mlflow.runs == {}


async def test_calls_that_contradict_detach_say_so(server: Server, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true")
    with pytest.raises(UsageError, match=r"does not wait for the end of the run: give synchronous=False"):
        await mlfleet.run_async(uri, detach=True)
    async with Fleet(tracking=FakeTracking()) as fleet:
        with pytest.raises(UsageError, match=r"cannot use the Tracking of this Fleet: give the Fleet a tracking_uri"):
            await fleet.submit(uri, detach=True)
        with pytest.raises(UsageError, match=r"^a sweep cannot be detached: give it a name"):
            fleet.sweep(uri, grid(x=[1]), detach=True)
        with pytest.raises(UsageError, match=r"give output='capture' with detach=True"):
            await fleet.submit(uri, detach=True, output="inherit")
    assert supervisors() == []


async def test_its_command_belongs_to_the_trace_of_the_process_that_submits_it(server: Server, tmp_path: Path) -> None:
    spans = InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    async with Fleet(tracking_uri=server.url) as fleet:
        instrument(fleet, tracer_provider=tracers)
        run = await fleet.submit(write_project(tmp_path / "ended", "echo $TRACEPARENT"), detach=True, **LOCAL)
        [parent] = [line async for line in run.logs()]
        goes_on = await fleet.submit(write_project(tmp_path / "goes_on", PATIENT), detach=True, **LOCAL)
        await anext(goes_on.logs())
    (tmp_path / "go").touch()
    found = {span.attributes["mlfleet.run.id"]: span for span in spans.get_finished_spans() if span.attributes}
    context = found[run.run_id].context
    assert context is not None
    assert parent == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    assert (found[run.run_id].attributes or {})["mlfleet.run.status"] == "FINISHED"
    assert (found[goes_on.run_id].attributes or {})["mlfleet.run.status"] == "RUNNING", "it goes on without the Fleet"
    tracers.shutdown()
    async with Fleet(tracking_uri=server.url) as fleet:
        assert (
            await (await fleet.get(goes_on.run_id)).wait() is True
        )  # else its supervisor waits for a server that is gone
