"""``mlfleet sweep`` as a person or a script uses it, against a real MLflow server."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from components.command_line import Started, mlfleet, on_terminal, read_json, run_on, started
from components.mlflow_server import MlflowServer
from components.projects import pid_is_gone, write_metric_logger, write_project

LOCAL = ("--env-manager", "local")


@pytest.fixture
def server(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    return mlflow_server


def measuring(folder: Path) -> str:
    """A project whose runs fail for x=3, and else log ``loss``: (x - 2)² + y."""
    log = write_metric_logger(folder)
    return write_project(
        folder, f"echo x is {{x}}; [ {{x}} != 3 ] && {log} loss $(( ({{x}} - 2) * ({{x}} - 2) + {{y}} ))",
        parameters="x: string\ny: string",
    )  # fmt: skip


def waiting(folder: Path, command: str = "exec sleep 600") -> str:
    return write_project(folder, f"echo $$ >> pids; echo waiting {{x}}; {command}", parameters="x: string")


def sweep_id(text: str) -> str:
    found = re.search(r"\(run\s+([0-9a-f]{32})\): ", text)  # a terminal may break the line
    assert found, text
    return found[1]


def children(server: MlflowServer, run_id: str) -> list[dict[str, Any]]:
    body = {"experiment_ids": ["0"], "filter": f"tags.`mlflow.parentRunId` = '{run_id}'"}
    answer = httpx.post(f"{server.url}/api/2.0/mlflow/runs/search", json=body, trust_env=False)
    found: list[dict[str, Any]] = answer.raise_for_status().json().get("runs", [])
    return found


def pids(folder: Path) -> list[int]:
    """The runs that came as far as to tell; one that is ended right after its start may not."""
    told = folder / "pids"
    return [int(line) for line in told.read_text().split()] if told.exists() else []


def test_lines_for_people_and_the_best_runs_on_stdout(server: MlflowServer, tmp_path: Path) -> None:
    uri = measuring(tmp_path / "best")
    done = mlfleet(
        "sweep", uri, *LOCAL, "-P", "x=1:4:1", "-P", "y=0,5", "--jobs", "3", "--metric", "loss", "--top", "2",
        "--name", "best",
    )  # fmt: skip
    assert done.returncode == 1
    run_id = sweep_id(done.stderr)
    assert re.sub(r"\d+ s   [0-9a-f]{32}", "TIME   ID", done.stdout).splitlines()[1:] == [
        "0     2  0  TIME   ID",
        "1     1  0  TIME   ID",
    ]
    assert done.stdout.split()[:5] == ["loss", "x", "y", "time", "run"]
    assert len(re.findall(r"^mlfleet: \[\d/8\] FINISHED point \d: x=\d y=\d loss=\d", done.stderr, re.M)) == 6
    # The reason, and the last that the run said.
    assert len(re.findall(r"^Failed: \[\d/8\] point \d: x=3 y=\d: exit code 1: x is 3$", done.stderr, re.M)) == 2
    assert f"(run {run_id}) is FAILED: 6 finished, 2 failed" in done.stderr
    assert f"{server.url}/#/experiments/0/runs/{run_id}" in done.stderr
    assert "--name best --resume" in done.stderr
    assert run_on(server, run_id)["info"]["status"] == "FAILED"
    assert len(children(server, run_id)) == 8


def test_json_is_one_object_a_line(server: MlflowServer, tmp_path: Path) -> None:
    uri = measuring(tmp_path / "lines")
    done = mlfleet(
        "sweep", uri, *LOCAL, "-P", "x=2,3", "-P", "y=1", "--json", "-q", "--retries", "1", "--metric", "loss"
    )
    events = [read_json(line, "event") for line in done.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert (done.returncode, done.stderr) == (1, "")
    assert kinds.index("sweep") < kinds.index("queued") < kinds.index("started") < kinds.index("result")
    assert (kinds.count("retried"), kinds.count("result"), kinds[-1]) == (1, 2, "end")
    results = {event["index"]: event for event in events if event["event"] == "result"}
    assert results[0]["metrics"] == {"loss": 1.0}
    assert results[0]["parameters"] == {"x": "2", "y": "1"}
    assert (results[1]["status"], results[1]["exit_code"], results[1]["attempts"]) == ("FAILED", 1, 2)
    assert results[1]["output"] == ["x is 3"]
    end = events[-1]
    assert (end["status"], end["finished"], end["failed"], end["retries"]) == ("FAILED", 1, 1, 1)
    assert [best["index"] for best in end["best"]] == [0]
    assert run_on(server, end["run_id"])["info"]["status"] == "FAILED"


@pytest.mark.timeout(90)  # seven processes after one another
def test_a_sweep_is_resumed_where_it_ended(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "again", "[ {x} != 2 -o -e ../mended ]", parameters="x: string")
    arguments = ("sweep", uri, *LOCAL, "-P", "x=1,2,3", "--name", "again", "--json", "-q")
    assert mlfleet(*arguments).returncode == 1
    refused = mlfleet(*arguments)
    assert refused.returncode == 2
    assert "there is a sweep 'again' already" in refused.stderr
    assert read_json(refused.stdout.splitlines()[-1], "event")["error"]["type"] == "UsageError"
    kept = mlfleet(*arguments, "--resume", "--no-retry-failed")
    assert kept.returncode == 1
    assert json.loads(kept.stdout.splitlines()[-1])["earlier"] == 3
    (tmp_path / "mended").touch()
    done = mlfleet(*arguments, "--resume")
    end = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, end["finished"], end["earlier"]) == (0, 3, 2)
    (tmp_path / "again" / "MLproject").write_text(Path(uri, "MLproject").read_text() + "# changed\n")
    assert mlfleet(*arguments, "--resume").returncode == 2
    assert mlfleet(*arguments, "--resume-changed").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to sweep over"),
        (["-P", "x=1,2", "--resume"], "--resume needs the sweep's --name"),
        (["-P", "x=1,2", "--retry-on", "oom"], "--retry-on needs --retries N"),
        (["-P", "x=a,b"], "'x': a number was expected, got 'a'"),
        (["--points", "nowhere.csv"], "nowhere.csv"),
        (["-P", "x=1,2", "--cpus", "100000"], "can never start on this machine"),
        (["-P", "x=1,2", "--name", "it's"], "the sweep's name"),
    ],
)
def test_mistakes_exit_with_2_and_make_no_run(
    server: MlflowServer, tmp_path: Path, arguments: list[str], message: str
) -> None:
    uri = write_project(tmp_path / "mistaken", "touch ran", parameters="x: float")
    done = mlfleet("sweep", uri, *LOCAL, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "mistaken" / "ran").exists()


def test_the_first_failure_can_stop_it(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "stopping", "[ {x} != 0 ] || exit 9", parameters="x: string")
    done = mlfleet("sweep", uri, *LOCAL, "-P", "x=0:50:1", "--jobs", "1", "--on-failure", "stop")
    assert done.returncode == 1
    assert "it ended early: 1 of at most 1 points failed; the last one: exit code 9" in done.stderr
    assert "50 not run" in done.stderr


def test_an_unknown_metric_is_reported(server: MlflowServer, tmp_path: Path) -> None:
    done = mlfleet("sweep", measuring(tmp_path / "m"), *LOCAL, "-P", "x=1,2", "-P", "y=1", "--metric", "los")
    assert (done.returncode, done.stdout) == (0, "")
    assert "Warning: no finished run has the metric 'los'; there are: loss" in done.stderr


def read_until_all_wait(terminal: Started, folder: Path, count: int) -> list[int]:
    """Read on until so many runs have begun."""
    while not (folder / "pids").exists() or len(pids(folder)) < count:
        assert terminal._read(), terminal.plain
    return pids(folder)


def test_a_terminal_shows_what_runs_and_ctrl_c_ends_it(server: MlflowServer, tmp_path: Path) -> None:
    uri = waiting(tmp_path / "live")
    arguments = ("sweep", uri, *LOCAL, "-P", "x=0:9:1", "--jobs", "3", "--name", "live")
    with on_terminal(*arguments) as terminal:
        terminal.read_until("waiting 2")  # the last line of an output
        assert "0/10" in terminal.plain
        assert "3 running" in terminal.plain
        assert re.search(r"2: x=2 +\d+ s  waiting 2", terminal.plain)
        begun = read_until_all_wait(terminal, tmp_path / "live", 3)
        terminal.press_ctrl_c()
        terminal.read_until("stopping; Ctrl-C again kills at once")
        assert terminal.finish() == 130
    assert all(pid_is_gone(pid) for pid in begun)
    assert "is KILLED: 0 finished, 0 failed, 3 killed, 7 not run" in " ".join(terminal.plain.split())
    assert "Traceback" not in terminal.plain
    assert terminal.seen.rfind("\x1b[?25h") > terminal.seen.rfind("\x1b[?25l")  # the cursor is visible again
    run_id = sweep_id(terminal.plain)
    assert run_on(server, run_id)["info"]["status"] == "KILLED"
    assert [run["info"]["status"] for run in children(server, run_id)] == ["KILLED"] * 3
    assert pids(tmp_path / "live") == begun


def test_a_second_ctrl_c_does_not_wait_for_the_grace(server: MlflowServer, tmp_path: Path) -> None:
    uri = waiting(tmp_path / "stubborn", "trap '' TERM; while :; do sleep 600; done")
    with on_terminal("sweep", uri, *LOCAL, "-P", "x=1,2", "--jobs", "2", "--cancel-grace", "1h") as terminal:
        terminal.read_until("waiting 1")
        begun = read_until_all_wait(terminal, tmp_path / "stubborn", 2)
        terminal.press_ctrl_c()
        terminal.read_until("stopping")
        terminal.press_ctrl_c()
        assert terminal.finish() == 130
    assert all(pid_is_gone(pid) for pid in begun)
    assert [run["info"]["status"] for run in children(server, sweep_id(terminal.plain))] == ["KILLED"] * 2


def test_failures_stay_above_the_live_view(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "above", "printf 'bad \\033[31m{x}\\033[2J\\n'; exit 4", parameters="x: string")
    with on_terminal("sweep", uri, *LOCAL, "-P", "x=1,2") as terminal:
        assert terminal.finish() == 1
    assert "point 0: x=1: exit code 4: bad 1" in terminal.plain
    assert "point 1: x=2: exit code 4: bad 2" in terminal.plain
    assert "\x1b[2J" not in terminal.seen  # what a run prints cannot clear the terminal


def test_sigterm_ends_a_sweep_that_writes_to_a_pipe(server: MlflowServer, tmp_path: Path) -> None:
    uri = waiting(tmp_path / "piped", "echo > begun; exec sleep 600")
    os.mkfifo(tmp_path / "piped" / "begun")
    with started("sweep", uri, *LOCAL, "-P", "x=1,2,3", "--jobs", "1", "--json") as job:
        (tmp_path / "piped" / "begun").read_text()
        job.signal(signal.SIGTERM)
        assert job.finish() == 143
    assert all(pid_is_gone(pid) for pid in pids(tmp_path / "piped"))
    end = json.loads([line for line in job.plain.splitlines() if '"end"' in line][-1])
    assert (end["status"], end["interrupted"], end["killed"]) == ("KILLED", "SIGTERM", 1)


def test_a_reader_that_goes_away_does_not_stop_the_sweep(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "unread", "touch ran-{x}", parameters="x: string")
    with started(
        "sweep", uri, *LOCAL, "-P", "x=0:5:1", "--json", before=("bash", "-c", '"$@" 2>/dev/null | true', "-")
    ) as job:
        job.finish()
    assert sorted(name for name in os.listdir(tmp_path / "unread") if name.startswith("ran")) == [
        f"ran-{n}" for n in range(6)
    ]
