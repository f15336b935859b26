"""The examples run as their pages say, and leave in MLflow what those promise."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components import missing
from components.mlflow_server import MlflowServer
from components.projects import write_metric_logger, write_project
from mlfleet.runs import RunStatus
from mlfleet.tracking import open_tracking

ROOT = Path(__file__).parent.parent


def mlfleet(*arguments: str, tracking_uri: str) -> str:
    """The output of the project that ``mlfleet run …`` ran from the root of the checkout."""
    done = subprocess.run(
        [sys.executable, "-m", "mlfleet", "run", *arguments],
        cwd=ROOT,
        env={**os.environ, "MLFLOW_TRACKING_URI": tracking_uri},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(300)  # installs mlflow-skinny and what it needs into a fresh environment
async def test_the_quickstart_trains_and_logs(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    shown = mlfleet(
        "examples/quickstart", "-P", "alpha=0.5", "-P", "epochs=5", "--experiment-name", "quickstart",
        tracking_uri=mlflow_server.url,
    )  # fmt: skip
    assert "elastic net with alpha=0.5, l1_ratio=0.1" in shown
    async with open_tracking(mlflow_server.url) as tracking:
        experiment = await tracking.experiment_id("quickstart")
        (run,) = await tracking.search_runs([experiment])
        model = await tracking.download(f"runs:/{run.run_id}/model.json", tmp_path)
    assert run.status is RunStatus.FINISHED
    assert run.params == {
        "alpha": "0.5",
        "l1_ratio": "0.1",
        "epochs": "5",
        "rows": "300",
        "features": "8",
        "seed": "7",
    }
    assert {"train_rmse", "rmse", "mae", "r2"} <= set(run.metrics)
    assert f"rmse {run.metrics['rmse']:.4f}" in shown
    weights = json.loads(model.read_text())["weights"]
    # The penalty draws the weights to zero; the ones that matter stay the large ones.
    assert sorted(range(8), key=lambda index: -abs(weights[index]))[:3] == [0, 1, 4]


@pytest.mark.timeout(180)  # six processes that import mlflow one after the other
async def test_each_step_of_multistep_is_a_run_below_the_main_run(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    shown = mlfleet(
        "examples/multistep", "--env-manager", "local", "-P", "alphas=0.01,1", "--experiment-name", "multistep",
        tracking_uri=mlflow_server.url,
    )  # fmt: skip
    assert "the best is alpha=0.01" in shown
    async with open_tracking(mlflow_server.url) as tracking:
        experiment = await tracking.experiment_id("multistep")
        runs = await tracking.search_runs([experiment])
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.tags]
        steps = {run.run_id: run for run in runs if run is not parent}
        (loaded,) = [run for run in steps.values() if run.tags["mlflow.project.entryPoint"] == "load"]
        data = await tracking.download(f"runs:/{loaded.run_id}/data.csv", tmp_path)
    assert {run.status for run in runs} == {RunStatus.FINISHED}
    assert {run.tags["mlflow.parentRunId"] for run in steps.values()} == {parent.run_id}
    assert sorted(run.tags["mlflow.project.entryPoint"] for run in steps.values()) == [
        "load",
        "train",
        "train",
        "transform",
    ]
    assert len(data.read_text().splitlines()) == 201
    trained = [run for run in steps.values() if "rmse" in run.metrics]
    best = min(trained, key=lambda run: run.metrics["rmse"])
    assert parent.metrics == {"best_alpha": 0.01, "best_rmse": best.metrics["rmse"]}


@pytest.mark.timeout(180)  # seven processes that import mlflow, two at a time
async def test_optuna_decides_by_what_has_finished(mlflow_server: MlflowServer) -> None:
    if importlib.util.find_spec("optuna") is None:
        missing("Optuna", "pip install optuna")
    done = subprocess.run(
        [sys.executable, "examples/optuna/search.py", "--trials", "6", "--env-manager", "local"],
        cwd=ROOT,
        env={**os.environ, "MLFLOW_TRACKING_URI": mlflow_server.url},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert lines[-1].startswith("best: rmse=")
    async with open_tracking(mlflow_server.url) as tracking:
        experiment = await tracking.experiment_id("optuna")
        runs = await tracking.search_runs([experiment])
    parent = next(run for run in runs if run.name == "tpe")
    trials = [run for run in runs if run.tags.get("mlflow.parentRunId") == parent.run_id]
    assert [run.status for run in [parent, *trials]] == [RunStatus.FINISHED] * 7
    best = min(run.metrics["rmse"] for run in trials)
    assert lines[-1].startswith(f"best: rmse={best:.4f}")


NOTEBOOK = """\
import nbclient, nbformat
notebook = nbformat.read("mlfleet.ipynb", 4)
nbclient.NotebookClient(notebook, timeout=60).execute()
nbformat.write(notebook, "done.ipynb")
"""


@pytest.mark.timeout(90)  # a kernel starts, on a machine that may be busy
async def test_the_notebook_shows_progress_results_and_the_report(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    if importlib.util.find_spec("nbclient") is None:
        missing("nbclient", "pip install 'mlfleet[dev]'")
    # Its project, with the same parameters and metric, trains nothing.
    log = write_metric_logger(tmp_path / "quickstart")
    command = f"{log} rmse {{alpha}} && test {{epochs}} != inf"
    write_project(tmp_path / "quickstart", command, parameters="alpha: float\nepochs: {type: string, default: '20'}")
    folder = tmp_path / "notebook"
    shutil.copytree(ROOT / "examples" / "notebook", folder)
    variables = {**os.environ, "MLFLOW_TRACKING_URI": mlflow_server.url}
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = [cell for cell in json.loads((folder / "done.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    shown = [["".join(output["data"]["text/html"]) for output in cell["outputs"]] for cell in cells]
    assert [len(outputs) for outputs in shown] == [0, 2, 2, 1]
    assert "is FINISHED" in shown[1][0]
    assert "FINISHED</b>" in shown[1][1]
    assert "9/9" in shown[2][0]
    assert "point 8: alpha=1 epochs=inf: exit code 1" in shown[2][0]
    assert "6 finished, 3 failed" in shown[2][1]
    assert "lowest rmse" in shown[2][1]
    assert "Metric against each parameter" in shown[3][0]
