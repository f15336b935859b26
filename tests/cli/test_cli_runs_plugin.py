"""``mlfleet ps``, ``prune``, ``wait``, ``logs`` and ``cancel`` for the backend of a plugin."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from components.command_line import mlfleet, run_on
from components.mlflow_server import MlflowServer
from components.plugins import install_plugin, on_path
from mlfleet.runs import JobRef

# Its runs are folders, whose files say what a machine elsewhere would: `state`, `withdrawn`, `output`.
SHELF = """
import os
from datetime import UTC, datetime
from pathlib import Path

from mlfleet import Outcome, RunStatus
from mlfleet.backends.base import Backend, ListedRun


class Shelf(Backend):
    name = "shelf"

    @property
    def _folder(self):
        return Path(os.environ["SHELF"], self.name)

    async def submit(self, job):
        raise NotImplementedError

    async def attach(self, ref):
        return Run(ref.run_id, self._folder / ref.run_id)

    async def list_runs(self):
        return [
            ListedRun(
                run_id=folder.name, backend=self.name, created=datetime(2026, 1, 2, tzinfo=UTC),
                state=(folder / "state").read_text(), supervised=False, detail={"project": "demo", "rack": 7},
            )
            for folder in self._folder.iterdir()
        ]

    async def prune(self, run_ids=(), *, running=False, dry_run=False):
        runs = [run for run in await self.list_runs() if running or run.state == "over"]
        for run in [] if dry_run else runs:
            (self._folder / run.run_id).rename(self._folder.parent / f"removed-{run.run_id}")
        return runs

    async def is_abandoned(self, ref):
        return (self._folder / ref.run_id / "state").read_text() == "over"

    async def withdraw(self, ref):
        waits = (self._folder / ref.run_id / "state").read_text() == "waits"
        if waits:
            (self._folder / ref.run_id / "withdrawn").touch()
        return waits


class Vault(Shelf):
    name = "vault"
    needs_login = True


class Run:
    def __init__(self, run_id, folder):
        self.run_id, self._folder = run_id, folder

    async def started(self):
        pass

    async def wait(self):
        return True

    async def outcome(self):
        return Outcome(RunStatus.FINISHED, 0)

    async def get_status(self):
        return RunStatus.FINISHED

    async def cancel(self, *, grace=None):
        pass

    async def logs(self, *, follow=True):
        for line in (self._folder / "output").read_text().splitlines():
            yield line
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    entries = "shelf = mlfleet_shelf:Shelf\nvault = mlfleet_shelf:Vault"
    install_plugin(folder, "mlfleet_shelf", SHELF, group="mlfleet.backends", entry=entries)
    return folder / "installed"


@pytest.fixture
def environ(installed: Path, mlflow_server: MlflowServer, tmp_path: Path) -> dict[str, str]:
    for name in ("shelf", "vault"):
        (tmp_path / name).mkdir()
    return on_path(installed, SHELF=str(tmp_path), MLFLOW_TRACKING_URI=mlflow_server.url)


def make_run(server: MlflowServer, folder: Path, state: str) -> str:
    """Make the MLflow run of a job on the shelf whose process is gone."""
    url, post = f"{server.url}/api/2.0/mlflow/runs", {"experiment_id": "0"}
    run_id: str = httpx.post(f"{url}/create", json=post, trust_env=False).json()["run"]["info"]["run_id"]
    tag = {"run_id": run_id, "key": JobRef.TAG, "value": JobRef(folder.name, run_id).to_json()}
    httpx.post(f"{url}/set-tag", json=tag, trust_env=False).raise_for_status()
    (folder / run_id).mkdir()
    (folder / run_id / "state").write_text(state)
    (folder / run_id / "output").write_text("one\ntwo\n")
    return run_id


def test_its_runs_are_listed_and_pruned(environ: dict[str, str], mlflow_server: MlflowServer, tmp_path: Path) -> None:
    over = make_run(mlflow_server, tmp_path / "shelf", "over")
    runs = make_run(mlflow_server, tmp_path / "shelf", "runs")
    hidden = make_run(mlflow_server, tmp_path / "vault", "over")

    def listed(*arguments: str) -> dict[str, str]:
        rows = json.loads(mlfleet(*arguments, "--json", env=environ).stdout)
        assert all(row["rack"] == 7 for row in rows if row["backend"] in ("shelf", "vault"))
        return {row["run_id"]: row["state"] for row in rows if row["backend"] in ("shelf", "vault")}

    assert listed("ps") == {over: "over", runs: "runs"}
    # A login is begun for a backend that is asked for only.
    assert listed("ps", "-b", "vault") == {over: "over", runs: "runs", hidden: "over"}
    assert f"{over}  shelf   over      2026-01-0" in mlfleet("ps", env=environ).stdout
    assert "demo  7  (nobody looks after it)" in mlfleet("ps", env=environ).stdout
    assert listed("prune", "--dry-run") == {over: "over"}
    assert listed("prune") == {over: "over"}
    assert listed("ps", "-b", "vault") == {runs: "runs", hidden: "over"}
    unknown = mlfleet("ps", "-b", "shelv", env=environ)
    assert unknown.returncode == 2
    assert "Did you mean 'shelf'?" in unknown.stderr


def test_the_status_of_an_abandoned_run_is_written_by_the_one_that_waits(
    environ: dict[str, str], mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    run_id = make_run(mlflow_server, tmp_path / "shelf", "over")
    assert mlfleet("logs", run_id, env=environ).stdout == "one\ntwo\n"
    done = mlfleet("wait", run_id, env=environ)
    assert (done.returncode, done.stdout) == (0, f"{run_id} FINISHED\n")
    assert run_on(mlflow_server, run_id)["info"]["status"] == "FINISHED"


def test_a_run_that_has_not_begun_is_withdrawn(
    environ: dict[str, str], mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    run_id = make_run(mlflow_server, tmp_path / "shelf", "waits")
    done = mlfleet("cancel", run_id, env=environ)
    assert (done.returncode, done.stdout) == (0, f"{run_id} KILLED\n")
    assert (tmp_path / "shelf" / run_id / "withdrawn").exists()
    assert run_on(mlflow_server, run_id)["info"]["status"] == "KILLED"
