"""What a person sees on a terminal, and what Ctrl-C and its like leave behind: nothing, and a truthful status."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

import pytest

from components.command_line import id_in, on_terminal, run_on, started
from components.mlflow_server import MlflowServer
from components.projects import pid_is_gone, write_project
from fakes.scripted_server import Peer, scripted
from fakes.small_mlflow import SmallMlflow

LOCAL = ("--env-manager", "local")
# Neither the shell nor what it starts heeds SIGTERM.
STUBBORN = """trap '' TERM
bash -c 'echo grandchild $$ is ready; while :; do sleep 600; done' &
wait
"""


@pytest.fixture
def server(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    return mlflow_server


def grandchild(text: str) -> int:
    return int(text.partition("grandchild ")[2].split()[0])


def test_ctrl_c_ends_every_process_of_the_run_and_marks_it_killed(server: MlflowServer, tmp_path: Path) -> None:
    with on_terminal("run", write_project(tmp_path / "demo", STUBBORN), *LOCAL, "--cancel-grace", "0.5s") as terminal:
        pid = grandchild(terminal.read_until("is ready"))
        terminal.press_ctrl_c()
        terminal.read_until("stopping; Ctrl-C again kills at once")
        assert terminal.finish() == 130
    assert pid_is_gone(pid)
    assert run_on(server, id_in(terminal.plain))["info"]["status"] == "KILLED"
    assert "is KILLED" in terminal.plain
    assert "Error" not in terminal.plain
    assert "Traceback" not in terminal.plain


def test_a_second_ctrl_c_does_not_wait_for_the_grace(server: MlflowServer, tmp_path: Path) -> None:
    with on_terminal("run", write_project(tmp_path / "demo", STUBBORN), *LOCAL, "--cancel-grace", "1h") as terminal:
        pid = grandchild(terminal.read_until("is ready"))
        terminal.press_ctrl_c()
        terminal.read_until("stopping")
        terminal.press_ctrl_c()
        assert terminal.finish() == 130
    assert pid_is_gone(pid)
    assert run_on(server, id_in(terminal.plain))["info"]["status"] == "KILLED"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)])
def test_other_signals_end_the_run_too(server: MlflowServer, tmp_path: Path, number: signal.Signals, code: int) -> None:
    with started("run", write_project(tmp_path / "demo", STUBBORN), *LOCAL, "--cancel-grace", "0.5") as job:
        pid = grandchild(job.read_until("is ready"))
        job.signal(number)
        assert job.finish() == code
    assert pid_is_gone(pid)
    assert run_on(server, id_in(job.plain))["info"]["status"] == "KILLED"


def test_a_third_ctrl_c_does_not_even_wait_for_a_server_that_never_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        project = write_project(tmp_path / "demo", "echo never")
        with on_terminal("run", project, *LOCAL, "--tracking-uri", uri) as terminal:
            connection, _ = silent.accept()  # the request for the MLflow run is on its way
            with connection:
                for told in ("stopping", "killing", "^C"):
                    terminal.press_ctrl_c()
                    terminal.read_until(told)
                assert terminal.finish() == -signal.SIGINT
    assert "never" not in terminal.plain


async def test_a_third_signal_writes_the_status_before_it_exits(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def hang(peer: Peer, answer: bytes) -> bool:
        asked.set()
        return bool(await peer.closed())

    mlflow = SmallMlflow({"get": [hang] * 100})  # a run is read before its status is written
    project = write_project(tmp_path / "demo", STUBBORN)
    async with scripted(mlflow.script) as server:
        with started("run", project, *LOCAL, "--tracking-uri", f"http://{server.place}") as job:
            await asyncio.to_thread(job.read_until, "is ready")
            job.signal(signal.SIGTERM)
            await asyncio.to_thread(job.read_until, "stopping")
            job.signal(signal.SIGTERM)
            await asked.wait()  # it has ended
            assert mlflow.statuses == ["RUNNING"]
            job.signal(signal.SIGTERM)
            assert await asyncio.to_thread(job.finish) == -signal.SIGTERM
    assert mlflow.statuses == ["KILLED"]


def test_ctrl_c_while_the_environment_is_built_marks_the_run_killed(server: MlflowServer, tmp_path: Path) -> None:
    package = tmp_path / "demo" / "slow"
    package.mkdir(parents=True)
    # The build of a package runs its setup.py.
    (package / "setup.py").write_text("import time\ntime.sleep(600)\n")
    uri = write_project(tmp_path / "demo", "echo never", extra="python_env: python_env.yaml\n")
    (tmp_path / "demo" / "python_env.yaml").write_text(f"dependencies:\n  - {package}\n")
    with on_terminal("run", uri, "--env-manager", "virtualenv", "--run-name", "unbuilt") as terminal:
        terminal.read_until("building the environment")
        terminal.press_ctrl_c()
        assert terminal.finish() == 130
    assert "is KILLED" in terminal.plain
    assert "never" not in terminal.plain


def test_the_spinner_is_gone_before_the_project_writes(server: MlflowServer, tmp_path: Path) -> None:
    with on_terminal("run", write_project(tmp_path / "demo", "echo first line; printf progress"), *LOCAL) as terminal:
        assert terminal.finish() == 0
    assert "preparing the environment" in terminal.plain
    before, _, after = terminal.seen.partition("mlfleet: running")
    assert before.endswith("\x1b[2K")  # the spinner's line is empty
    assert "\x1b[?25h" in before  # and the cursor visible again
    assert "first line\r\nprogress" in after
    assert "\x1b" not in after


def test_errors_are_red_on_a_terminal_and_plain_with_no_color(tmp_path: Path) -> None:
    with on_terminal("run", str(tmp_path / "nowhere"), "--dry-run") as terminal:
        assert terminal.finish() == 2
    assert "\x1b[31m\x1b[1mError:\x1b[0m " in terminal.seen
    with on_terminal("run", str(tmp_path / "nowhere"), "--dry-run", env={"NO_COLOR": "1"}) as terminal:
        assert terminal.finish() == 2
    assert "\x1b[31m" not in terminal.seen
    assert "Error: " in terminal.seen


def test_a_dumb_terminal_gets_lines(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true")
    with on_terminal("run", uri, *LOCAL, env={"TERM": "dumb", "NO_COLOR": "1"}) as terminal:
        assert terminal.finish() == 0
    assert "\x1b" not in terminal.seen
    assert "mlfleet: running" in terminal.seen
