"""A sweep whose driver is killed, again and again, still runs every point to its end exactly once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from components.mlflow_server import MlflowServer
from components.projects import write_project
from mlfleet.runs import RunStatus
from mlfleet.tracking import open_tracking

DRIVER = Path(__file__).parent.parent / "components" / "sweep_driver.py"
POINTS = 24
JOBS = 4


def start(uri: str, server: MlflowServer, name: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(DRIVER), uri, server.url, name, str(POINTS), str(JOBS)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def living(mark: str) -> list[str]:
    """Processes that have `mark` among their arguments."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in line:
            found.append(f"{entry}: {line}")
    return found


@pytest.mark.timeout(240)  # an MLflow server starts, and a dozen drivers after one another
@pytest.mark.parametrize("seed", [0, 1])
async def test_each_point_once_however_often_the_driver_dies(
    mlflow_server: MlflowServer, tmp_path: Path, seed: int
) -> None:
    project = tmp_path / f"killed-{seed}"
    # A run appends a line when it is through: two lines of one point would be two successful runs of it.
    done = tmp_path / "done"
    uri = write_project(
        project, f"sleep 0.$((RANDOM % 10)); echo {{n}} $MLFLOW_RUN_ID >> {done}", parameters="n: float"
    )
    moments = random.Random(seed)
    log = tmp_path / "driver.log"
    kills = 0
    for _ in range(40):
        driver = start(uri, mlflow_server, project.name, log)
        killer = threading.Timer(moments.uniform(0.7, 3.0), os.kill, (driver.pid, signal.SIGKILL))
        killer.start()
        code = driver.wait()
        killer.cancel()
        if code == 0:
            break
        assert code == -signal.SIGKILL, log.read_text()
        kills += 1
    assert kills >= 2
    assert code == 0, log.read_text()
    lines = done.read_text().split("\n")[:-1]
    assert Counter(line.split()[0] for line in lines) == {str(n): 1 for n in range(POINTS)}, log.read_text()
    assert living(str(done)) == []

    async with open_tracking(mlflow_server.url) as tracking:
        parents = await tracking.search_runs(["0"], f"tags.`mlfleet.sweep.name` = '{project.name}'")
        assert [parent.status for parent in parents] == [RunStatus.FINISHED]
        assert json.loads(parents[0].tags["mlfleet.sweep.counts"]) == {"finished": POINTS, "failed": 0, "killed": 0}
        children = await tracking.search_runs(["0"], f"tags.`mlfleet.sweep.id` = '{parents[0].run_id}'")
    assert {child.status for child in children} <= {RunStatus.FINISHED, RunStatus.FAILED}
    finished = {child.tags["mlfleet.sweep.index"]: child.run_id for child in children if child.status == "FINISHED"}
    assert Counter(child.status for child in children)[RunStatus.FINISHED] == POINTS
    assert {tuple(line.split()) for line in lines} == {
        (child.params["n"], child.run_id) for child in children if child.status is RunStatus.FINISHED
    }
    assert len(finished) == POINTS
