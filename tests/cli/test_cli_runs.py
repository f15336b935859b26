"""``mlfleet ps``, ``logs``, ``wait`` and ``cancel`` from a process that did not start the runs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from components.command_line import Started, mlfleet, run_on, started
from components.mlflow_server import MlflowServer
from components.projects import pid_is_gone, write_project

LOCAL = ("--env-manager", "local")
# Each run says who it is, and goes on until the file `go` is there.
PATIENT = "echo $$ >> pids; echo begun {x}; while [ ! -e ../go ]; do sleep 0.05; done; echo done {x}"


@pytest.fixture
def server(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    return mlflow_server


@contextmanager
def sweeping(folder: Path, *arguments: str, command: str = PATIENT) -> Iterator[tuple[Started, str, list[str]]]:
    """A driver with two runs under way; gives it, the sweep's id, and the ids of the runs."""
    uri = write_project(folder, command, parameters="x: string")
    with started("sweep", uri, *LOCAL, "--jobs", "2", "--json", "--name", folder.name, *arguments) as driver:
        while driver.plain.count('"event": "started"') < 2:
            assert driver._read(), driver.plain
        events = [json.loads(line) for line in driver.plain.splitlines() if '"event"' in line and line.endswith("}")]
        sweep = next(event["run_id"] for event in events if event["event"] == "sweep")
        yield driver, sweep, [event["run_id"] for event in events if event["event"] == "started"]


@contextmanager
def running_one_at_a_time(uri: str) -> Iterator[str]:
    """A program whose second run waits for the first; gives the id of the second."""
    code = """
import asyncio, sys, mlfleet
async def main():
    async with mlfleet.Fleet(max_concurrent=1) as fleet:
        first = await fleet.submit(sys.argv[1], env_manager="local")
        second = await fleet.submit(sys.argv[1], env_manager="local")
        await anext(first.logs())
        print(second.run_id, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        try:
            yield program.stdout.readline().strip()
        finally:
            program.terminate()


def listed() -> dict[str, dict[str, Any]]:
    rows = json.loads(mlfleet("ps", "--json").stdout)
    return {row["run_id"]: row for row in rows if row["backend"] == "local"}


def sweeps() -> list[tuple[str, str, str, bool]]:
    rows = [row for row in json.loads(mlfleet("ps", "--json").stdout) if row["backend"] == "sweep"]
    return [(row["run_id"], row["sweep"], row["state"], row["supervised"]) for row in rows]


def end_of(driver: Started) -> dict[str, Any]:
    end: dict[str, Any] = json.loads([line for line in driver.plain.splitlines() if '"event": "end"' in line][-1])
    return end


def pids(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().split()]


@pytest.mark.timeout(90)  # eight programs after one another, on a machine that may be busy
def test_a_cancelled_run_is_killed_for_its_driver_too_and_not_tried_again(server: MlflowServer, tmp_path: Path) -> None:
    with sweeping(tmp_path / "single", "-P", "x=1,2", "--retries", "3") as (driver, sweep, (one, other)):
        assert {name: row["supervised"] for name, row in listed().items()} == {one: True, other: True}
        assert sweeps() == [(sweep, "single", "running", True)]
        done = mlfleet("cancel", one)
        assert (done.returncode, done.stdout) == (0, f"{one} KILLED\n")
        assert set(listed()) == {other}
        (tmp_path / "go").touch()
        assert driver.finish() == 1
    assert sweeps() == []
    end = end_of(driver)
    assert (end["finished"], end["killed"], end["failed"], end["retries"]) == (1, 1, 0, 0)
    assert run_on(server, one)["info"]["status"] == "KILLED"
    again = mlfleet("cancel", one, other)
    assert sorted(again.stdout.splitlines()) == sorted([f"{one} KILLED", f"{other} FINISHED"])


def test_a_cancelled_sweep_starts_nothing_more(server: MlflowServer, tmp_path: Path) -> None:
    with sweeping(tmp_path / "whole", "-P", "x=1,2,3,4,5,6") as (driver, sweep, _):
        done = mlfleet("cancel", "--sweep", "whole")
        assert (done.returncode, done.stdout) == (0, f"{sweep} KILLED\n")
        assert listed() == {}
        assert driver.finish() == 1
    end = end_of(driver)
    assert (end["status"], end["finished"], end["stopped"]) == ("KILLED", 0, "cancelled by another process")
    assert run_on(server, sweep)["info"]["status"] == "KILLED"
    assert all(pid_is_gone(pid) for pid in pids(tmp_path / "whole"))


@pytest.mark.timeout(90)  # eight programs after one another, on a machine that may be busy
def test_runs_whose_driver_was_killed_are_seen_waited_for_and_cancelled(server: MlflowServer, tmp_path: Path) -> None:
    with sweeping(tmp_path / "orphans", "-P", "x=1,2,3") as (driver, sweep, (one, other)):
        driver.process.kill()
        driver.finish()
        assert {name: row["supervised"] for name, row in listed().items()} == {one: False, other: False}
        assert sweeps() == [(sweep, "orphans", "left", False)]
        shown = mlfleet("ps").stdout
        assert re.search(rf"{sweep}  sweep   left .*  orphans  \S+/orphans  \(nobody looks after it\)", shown)
        assert len(re.findall(r"begun \d  \(nobody looks after it\)", shown)) == 2
        assert mlfleet("cancel", one).returncode == 0
        assert run_on(server, one)["info"]["status"] == "KILLED"
        with started("wait", other) as waiter:
            (tmp_path / "go").touch()
            assert waiter.finish() == 0
        assert waiter.plain.endswith(f"\n{other} FINISHED\n")
    # Nobody but the one who waited could have written it.
    assert run_on(server, other)["info"]["status"] == "FINISHED"
    lost = mlfleet("wait", sweep)
    assert lost.returncode == 2
    assert "no process drives the sweep 'orphans'" in lost.stderr
    assert mlfleet("cancel", "--sweep", sweep).stdout == f"{sweep} KILLED\n"
    assert sweeps() == []
    assert len(pids(tmp_path / "orphans")) == 2


def test_logs_follow_a_run_to_its_end(server: MlflowServer, tmp_path: Path) -> None:
    with sweeping(tmp_path / "talking", "-P", "x=1,2") as (driver, _, (one, other)):
        assert re.fullmatch(r"begun [12]\n", mlfleet("logs", one).stdout)
        with started("logs", "-f", one) as reader:
            reader.read_until("begun")
            (tmp_path / "go").touch()
            assert reader.finish() == 0
        assert re.fullmatch(r"begun ([12])\ndone \1\n", reader.plain)
        assert driver.finish() == 0
    assert mlfleet("logs", one).stdout == reader.plain
    assert mlfleet("logs", "--tail", "1", one).stdout == reader.plain.splitlines(keepends=True)[-1]
    assert mlfleet("wait", one, other).returncode == 0


def test_a_waiter_is_told_why_a_run_failed(server: MlflowServer, tmp_path: Path) -> None:
    failed = json.loads(mlfleet("run", write_project(tmp_path / "bad", "exit 3"), "--json").stdout)
    waited = mlfleet("wait", failed["run_id"])
    assert (waited.returncode, waited.stdout) == (1, f"{failed['run_id']} FAILED (exit code 3)\n")


def test_a_waiter_that_is_interrupted_leaves_the_run_alone(server: MlflowServer, tmp_path: Path) -> None:
    with sweeping(tmp_path / "left", "-P", "x=1,2") as (driver, _, (one, other)):
        for command, told in ((("wait", one), "waiting"), (("logs", "-f", other), "begun")):
            with started(*command) as waiter:
                waiter.read_until(told)
                waiter.signal(signal.SIGINT)
                assert waiter.finish() == 130
        assert set(listed()) == {one, other}
        (tmp_path / "go").touch()
        assert driver.finish() == 0
    assert end_of(driver)["finished"] == 2


def test_a_run_of_a_living_program_is_cancelled_from_outside(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "bound", "setsid sleep 600 & echo run=$MLFLOW_RUN_ID left=$! .; sleep 600")
    with started("run", uri, *LOCAL) as job:
        run_id, left = job.read_until(" .").partition("run=")[2].split()[:2]
        silent = mlfleet("logs", run_id)
        assert silent.returncode == 2
        assert "is not kept on this machine" in silent.stderr
        done = mlfleet("cancel", run_id)
        assert (done.returncode, done.stdout) == (0, f"{run_id} KILLED\n"), done.stderr
        assert pid_is_gone(int(left.removeprefix("left=")))
        assert job.finish() == 1
    assert "was cancelled" in job.plain
    assert run_on(server, run_id)["info"]["status"] == "KILLED"


def test_a_run_whose_command_has_not_begun_is_cancelled_by_its_driver(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "bound", "echo begun; sleep 600")
    with running_one_at_a_time(uri) as waiting:
        done = mlfleet("cancel", waiting)
        assert (done.returncode, done.stdout) == (0, f"{waiting} KILLED\n"), done.stderr
    assert run_on(server, waiting)["info"]["status"] == "KILLED"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["cancel"], 2, "give the ids of runs, or --sweep NAME"),
        (["cancel", "--sweep", "nothing like it"], 2, "there is no sweep 'nothing like it'"),
        (["wait"], 2, "Missing argument"),
        (["ps", "-b", "slurm", "-b", "databricks", "-c", "{}"], 2, "-c holds the settings of one backend"),
        (["wait", "0" * 32], 1, "RESOURCE_DOES_NOT_EXIST"),
        (["logs", "0" * 32], 1, "RESOURCE_DOES_NOT_EXIST"),
    ],
)
def test_mistakes_are_short_errors(server: MlflowServer, arguments: list[str], code: int, message: str) -> None:
    done = mlfleet(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
