"""A sweep whose driver is killed, again and again, still runs every point to its end exactly once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from components.mlflow_server import MlflowServer
from components.projects import write_project
from mlfleet.runs import RunStatus
from mlfleet.tracking import open_tracking

DRIVER = Path(__file__).parent.parent / "components" / "sweep_driver.py"
POINTS = 24
JOBS = 4
KILLS = 6


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


def kill_in_the_middle(driver: subprocess.Popen[bytes], reached: Callable[[], bool], later: float) -> int:
    """Kill a driver some seconds after it has come so far; its exit code."""
    while not reached() and driver.poll() is None:
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return driver.wait(later)
    driver.kill()
    return driver.wait()


@pytest.mark.timeout(240)  # an MLflow server starts, and a handful of drivers after one another
@pytest.mark.parametrize("seed", [0, 1])
async def test_each_point_once_however_often_the_driver_dies(
    mlflow_server: MlflowServer, tmp_path: Path, seed: int
) -> None:
    project = tmp_path / f"killed-{seed}"
    # A run appends a line when it is through: two lines of one point would be two successful runs of it.
    done = tmp_path / "done"
    done.touch()
    uri = write_project(
        project, f"sleep 0.$((RANDOM % 10)); echo {{n}} $MLFLOW_RUN_ID >> {done}", parameters="n: float"
    )
    moments = random.Random(seed)
    log = tmp_path / "driver.log"
    log.touch()
    # How many runs are through when the driver is killed. Those that it leaves behind go on, so a goal may be reached
    # already when the next driver begins; half of the points are left for the last kill in any case.
    goals = sorted(moments.sample(range(POINTS // 2), KILLS))
    for sessions, goal in enumerate(goals):
        # One is killed while it starts; the others have taken over what the one before has left.
        wanted = 0 if sessions == KILLS // 2 else log.read_text().count("entered") + 1

        def reached(goal: int = goal, wanted: int = wanted) -> bool:
            return log.read_text().count("entered") >= wanted and done.read_text().count("\n") >= goal

        driver = start(uri, mlflow_server, project.name, log)
        assert kill_in_the_middle(driver, reached, moments.uniform(0, 0.3)) == -signal.SIGKILL, log.read_text()
    code = start(uri, mlflow_server, project.name, log).wait()
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
