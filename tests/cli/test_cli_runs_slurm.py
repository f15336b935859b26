"""The command line on a real Slurm, with an MLflow server and with drivers that are killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from components.command_line import id_in, mlfleet, run_on, started
from components.mlflow_server import MlflowServer
from components.projects import write_project
from components.slurm import Slurm

pytestmark = pytest.mark.timeout(120)  # several programs after one another, each with a queue to wait in


@pytest.fixture
def options(slurm: Slurm, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    config = {"tracking-uri": mlflow_server.url, "latency": 5}
    return ("-b", "slurm", "--env-manager", "local", "-c", json.dumps(config))


@pytest.fixture
def gated(tmp_path: Path) -> str:
    """A project whose runs say one line and go on until the file ``open`` is there."""
    return write_project(tmp_path / "demo", f"echo one; until [ -e {tmp_path}/open ]; do sleep 0.05; done; echo two")


def test_a_run_prints_its_output_and_its_status_and_logs_keeps_it(
    options: tuple[str, ...], mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    project = write_project(tmp_path / "demo", "echo {x} $MLFLOW_RUN_ID; ls", parameters="x: float")
    done = mlfleet("run", project, *options, "-P", "x=3")
    assert done.returncode == 0, done.stderr
    run_id = id_in(done.stderr)
    assert done.stdout.splitlines() == [f"3 {run_id}", "MLproject"]
    run = run_on(mlflow_server, run_id)
    assert run["info"]["status"] == "FINISHED"
    assert {each["key"]: each["value"] for each in run["data"]["tags"]}["mlfleet.slurm.job"].isdecimal()


def test_a_sweep_as_an_array_finishes(options: tuple[str, ...], slurm: Slurm, tmp_path: Path) -> None:
    project = write_project(tmp_path / "demo", "echo {x}", parameters="x: float")
    config = json.dumps({**json.loads(options[-1]), "array": True})
    done = mlfleet("sweep", project, *options[:-1], config, "-P", "x=1,2,3,4")
    assert done.returncode == 0, done.stderr
    assert "4 finished, 0 failed" in done.stderr
    assert len(list((slurm.work_dir / "arrays").iterdir())) == 1


def test_the_default_store_and_a_server_on_loopback_are_refused_with_the_key_that_helps(
    options: tuple[str, ...], gated: str, tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = mlfleet("run", gated, *options[:-2])
    assert done.returncode == 2
    assert "is on loopback" in done.stderr
    assert "Give tracking-uri in backend_config" in done.stderr
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    done = mlfleet("run", gated, *options[:-2])
    assert done.returncode == 2
    assert "is a file of SQLite" in done.stderr
    assert not (tmp_path / "mlflow.db").exists()


def test_a_dry_run_shows_sbatch_and_the_script_and_makes_nothing(
    options: tuple[str, ...], gated: str, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_WORD", "hush-hush")
    done = mlfleet("run", gated, *options, "--dry-run", "--env", "SECRET_WORD")
    assert done.returncode == 0, done.stderr
    assert "sbatch --parsable --job-name=mlfleet-" in done.stdout
    assert "SECRET_WORD=***" in done.stdout
    assert "hush-hush" not in done.stdout
    assert not slurm.work_dir.exists()


def test_a_run_without_a_driver_is_listed_followed_and_concluded(
    options: tuple[str, ...], gated: str, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    with started("run", gated, *options, "--json") as driver:
        run_id = id_in(driver.read_until("mlfleet: running") + driver.read_until(")"))
        with started("logs", "-f", run_id) as reader:
            reader.read_until("one")
            driver.signal(signal.SIGKILL)
            driver.finish()
            assert run_id in mlfleet("ps", "-b", "slurm").stdout
            (tmp_path / "open").touch()
            reader.read_until("two")
            assert reader.finish() == 0
    done = mlfleet("wait", run_id)
    assert (done.returncode, done.stdout) == (0, f"{run_id} FINISHED\n")
    assert run_on(mlflow_server, run_id)["info"]["status"] == "FINISHED"


def test_a_run_without_a_driver_is_cancelled(
    options: tuple[str, ...], gated: str, mlflow_server: MlflowServer, slurm: Slurm
) -> None:
    with started("run", gated, *options, "--json") as driver:
        run_id = id_in(driver.read_until("mlfleet: running") + driver.read_until(")"))
        with started("logs", "-f", run_id) as reader:
            reader.read_until("one")
            driver.signal(signal.SIGKILL)
            driver.finish()
            done = mlfleet("cancel", run_id)
            assert reader.finish() == 0
    assert (done.returncode, done.stdout) == (0, f"{run_id} KILLED\n")
    assert run_on(mlflow_server, run_id)["info"]["status"] == "KILLED"
    assert slurm.jobs() == []


def test_a_sweep_whose_driver_is_killed_is_resumed(options: tuple[str, ...], tmp_path: Path, slurm: Slurm) -> None:
    begun, executions = tmp_path / "begun", tmp_path / "executions"
    os.mkfifo(begun)
    command = f"echo {{x}} >> {executions}; echo > {begun}; until [ -e {tmp_path}/open ]; do sleep 0.05; done"
    project = write_project(tmp_path / "points", command, parameters="x: float")
    sweep = ("sweep", project, *options, "-P", "x=1,2,3", "--name", "lr")
    # Open for writing as well: else the pipe ends whenever no command has it open, and the next line may be lost.
    pipe = os.open(begun, os.O_RDWR)
    with started(*sweep) as driver:
        lines = 0
        while lines < 3:
            lines += os.read(pipe, 100).count(b"\n")
        os.close(pipe)
        driver.signal(signal.SIGKILL)
        driver.finish()
    (tmp_path / "open").touch()
    done = mlfleet(*sweep, "--resume")
    assert done.returncode == 0, done.stderr
    assert "3 finished, 0 failed" in done.stderr
    assert sorted(executions.read_text().split()) == ["1", "2", "3"]


def test_ctrl_c_cancels_the_job(options: tuple[str, ...], gated: str, slurm: Slurm) -> None:
    with started("run", gated, *options) as driver:
        driver.read_until("one")
        driver.signal(signal.SIGINT)
        assert driver.finish() == 130
    assert slurm.jobs() == []
