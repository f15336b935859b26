"""``mlfleet logs``, ``wait`` and ``cancel`` for containers, with their driver alive and without."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from components.command_line import id_in, mlfleet, run_on, started
from components.docker import DockerEngine
from components.mlflow_server import MlflowServer
from components.projects import write_project

pytestmark = pytest.mark.timeout(120)  # several programs after one another, each with an engine to talk to


@pytest.fixture
def project(
    docker_engine: DockerEngine, shell_image: str, mlflow_server: MlflowServer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:  # fmt: skip
    """Its runs say one line and go on until the file ``gate/open`` is there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    (tmp_path / "gate").mkdir()
    environment = {"image": shell_image, "volumes": [f"{tmp_path}/gate:/gate"]}
    command = "echo one; while [ ! -e /gate/open ]; do sleep 0.1; done; echo two"
    return write_project(tmp_path / "demo", command, extra=f"docker_env: {json.dumps(environment)}\n")


def test_a_cancelled_container_is_killed_for_its_driver_too(project: str, mlflow_server: MlflowServer) -> None:
    with started("run", project, "--json", "--cancel-grace", "1s") as driver:
        run_id = id_in(driver.read_until("mlfleet: running") + driver.read_until(")"))
        with started("logs", "-f", run_id) as reader:
            reader.read_until("one")
            done = mlfleet("cancel", run_id)
            assert (done.returncode, done.stdout) == (0, f"{run_id} KILLED\n")
            assert reader.finish() == 0
        assert driver.finish() == 1
    assert '"status": "KILLED"' in driver.plain
    assert run_on(mlflow_server, run_id)["info"]["status"] == "KILLED"
    assert run_id not in mlfleet("ps", "--json").stdout


def test_the_waiter_for_a_container_without_a_driver_writes_its_status(
    project: str, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    with started("run", project, "--json") as driver:
        run_id = id_in(driver.read_until("mlfleet: running") + driver.read_until(")"))
        with started("logs", "-f", run_id) as reader:
            reader.read_until("one")
            driver.signal(signal.SIGKILL)
            driver.finish()
            with started("wait", run_id) as waiter:
                waiter.read_until("waiting")
                (tmp_path / "gate" / "open").touch()
                assert waiter.finish() == 0
            assert waiter.plain.endswith(f"{run_id} FINISHED\n")
    assert run_on(mlflow_server, run_id)["info"]["status"] == "FINISHED"


def test_logs_of_a_container_without_a_driver_are_those_up_to_now(project: str, tmp_path: Path) -> None:
    with started("run", project, "--json") as driver:
        run_id = id_in(driver.read_until("mlfleet: running") + driver.read_until(")"))
        with started("logs", "-f", run_id) as reader:
            reader.read_until("one")
        driver.signal(signal.SIGKILL)
        driver.finish()
    assert mlfleet("logs", run_id).stdout == "one\n"
    assert mlfleet("logs", run_id).stdout == "one\n"
    (tmp_path / "gate" / "open").touch()
    assert mlfleet("wait", run_id).returncode == 0
    assert mlfleet("logs", run_id).stdout == "one\ntwo\n"


def test_a_detached_container_is_supervised_to_its_end(
    project: str, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    done = mlfleet("run", project, "--detach", "--log-output", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    run_id = done.stdout.strip()
    with started("logs", "-f", run_id) as reader:
        reader.read_until("one")
        (tmp_path / "gate" / "open").touch()
        assert reader.finish() == 0
        assert reader.plain == "one\ntwo\n"
    assert mlfleet("wait", run_id).stdout == f"{run_id} FINISHED\n"
    assert run_id not in mlfleet("ps", "--json").stdout
