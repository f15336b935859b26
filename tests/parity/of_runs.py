"""Cases of experiments, backends, environments, and of the MLflow run and its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from parity.case import Case, entry_point
from parity.places import Place

__all__ = ["CASES"]


def begun(place: Place) -> None:
    os.mkfifo(place.folder / "begun")


def own_run(place: Place) -> None:
    """``@run``: an MLflow run that is there already."""
    place.words["@there"] = place.ground.tracking.create_run(place.words["@experiment"])


def run_with_parameter(place: Place) -> None:
    own_run(place)
    place.ground.tracking.call("runs/log-parameter", run_id=place.words["@there"], key="a", value="2")


def parent(place: Place) -> None:
    """An MLflow run that is active where the call is made."""
    place.words["@parent"] = place.ground.tracking.create_run(place.words["@experiment"])


def other_environment(place: Place) -> None:
    """Make an environment in ``@case/other`` that is not the one in which mlflow or mlfleet is installed."""
    (place.folder / "other" / "bin").mkdir(parents=True)
    (place.folder / "other" / "bin" / "python").symlink_to(sys.executable)


def config(text: str) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        (place.folder / "config.json").write_text(text)

    return prepare


EXPERIMENTS = [
    Case("experiment-neither", own_experiment=True),
    Case("experiment-id-unknown", own_experiment=True, arguments={"experiment_id": "123456789"}),
    Case("experiment-name", own_experiment=True, arguments={"experiment_name": "@name"}),
    Case("experiment-name-new", own_experiment=True, arguments={"experiment_name": "@name/new"}),
    Case(
        "experiment-both", own_experiment=True, arguments={"experiment_name": "@name", "experiment_id": "@experiment"}
    ),
    Case("experiment-variable-name", own_experiment=True, environ={"MLFLOW_EXPERIMENT_NAME": "@name"}),
    Case("experiment-variable-id", own_experiment=True, environ={"MLFLOW_EXPERIMENT_ID": "@experiment"}),
    # Every other case names its experiment by its id.
    Case("experiment-argument-wins", environ={"MLFLOW_EXPERIMENT_NAME": "another"}),
]

BACKENDS = [
    Case("backend-unknown", ("no-run-left",), arguments={"backend": "nowhere"}),
    Case("backend-kubernetes-unconfigured", ("no-run-left",), arguments={"backend": "kubernetes"}),
    Case(
        "backend-databricks-wrong",
        ("no-run-left", "backend-config-untouched"),
        arguments={"backend": "databricks", "backend_config": {"nonsense": 1}},
    ),
    Case(
        "backend-plugin",
        ("plugin-own-run", "backend-config-untouched"),
        arguments={"backend": "spool", "backend_config": {"mode": "own run"}},
    ),
    Case("backend-config-dict", ("backend-config-untouched",), arguments={"backend_config": {}}),
    Case("backend-config-file", arguments={"backend_config": "@case/config.json"}, prepare=config("{}")),
    Case("backend-config-file-missing", arguments={"backend_config": "@case/config.json"}),
    Case("backend-config-file-malformed", arguments={"backend_config": "@case/config.json"}, prepare=config("{")),
    Case("backend-config-other-file", arguments={"backend_config": "@case/config.yaml"}),
    Case(
        "backend-config-unknown-key",
        ("backend-config-checked", "backend-config-untouched"),
        arguments={"backend_config": {"nodes": 2}},
    ),
    Case(
        "backend-config-with-run-id",
        ("backend-config-untouched", "existing-run-described"),
        arguments={"backend_config": {}, "run_id": "@there"},
        prepare=own_run,
    ),
]

PYTHON = entry_point("python -c 'import sys; print(sys.prefix)'")
LISTED = {"python_env.yaml": "build_dependencies: []\ndependencies: []\n"}

ENVIRONMENTS = [
    Case("env-manager-unknown", arguments={"env_manager": "nowhere"}),
    Case("env-manager-local", mlproject=PYTHON, files=LISTED),
    Case("env-manager-local-nothing-activated", ("own-environment",), environ={"PATH": "@path"}),
    Case(
        "env-manager-local-other-venv",
        mlproject=entry_point("command -v python"),
        environ={"PATH": "@case/other/bin:@path", "VIRTUAL_ENV": "@case/other"},
        prepare=other_environment,
    ),
    Case(
        "env-manager-local-other-conda",
        mlproject=entry_point("command -v python"),
        environ={"PATH": "@case/other/bin:@path", "CONDA_PREFIX": "@case/other"},
        prepare=other_environment,
    ),
    Case(
        "env-manager-uv",
        ("environment-entered", "uv-ignored"),
        mlproject=PYTHON,
        files=LISTED,
        arguments={"env_manager": "uv"},
        environ={"MLFLOW_ENV_ROOT": "@case/environments"},
    ),
    Case(
        "env-manager-virtualenv",
        ("pyenv-not-needed",),
        mlproject=PYTHON,
        files=LISTED,
        arguments={"env_manager": "virtualenv"},
    ),
    Case(
        "env-manager-requirements",
        ("lists-found",),
        files={"requirements.txt": "./nowhere\n"},
        arguments={"env_manager": "uv"},
        environ={"MLFLOW_ENV_ROOT": "@case/environments"},
    ),
    Case("env-manager-none", ("pyenv-not-needed",), mlproject=PYTHON, arguments={"env_manager": None}),
    Case("env-manager-conda-for-python", ("no-run-left",), files=LISTED, arguments={"env_manager": "conda"}),
    Case("env-manager-conda-for-nothing", ("no-run-left",), arguments={"env_manager": "conda"}),
    Case(
        "env-manager-broken",
        ("no-run-left",),
        mlproject=PYTHON,
        files={"python_env.yaml": "dependencies: [./nowhere]\n"},
        arguments={"env_manager": "virtualenv"},
    ),
]

# What a project does that ends its own run.
END = """\
import json, os, sys, urllib.request

body = json.dumps({"run_id": os.environ["MLFLOW_RUN_ID"], "status": sys.argv[1], "end_time": 1}).encode()
url = os.environ["MLFLOW_TRACKING_URI"] + "/api/2.0/mlflow/runs/update"
urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})).read()
"""

RUNS = [
    Case("run-fails", mlproject=entry_point("exit 3")),
    Case("run-is-killed", mlproject=entry_point("kill -9 $$")),
    Case("run-ends-itself", mlproject=entry_point("python end.py FINISHED"), files={"end.py": END}),
    Case(
        "run-ends-itself-failed",
        ("status-of-user-code",),
        mlproject=entry_point("python end.py FAILED"),
        files={"end.py": END},
    ),
    Case(
        "run-ends-itself-killed",
        ("status-of-user-code",),
        mlproject=entry_point("python end.py KILLED"),
        files={"end.py": END},
    ),
    Case(
        "run-ends-itself-and-fails",
        mlproject=entry_point("python end.py FINISHED; exit 1"),
        files={"end.py": END},
    ),
    Case(
        "run-leaves-a-process",
        ("leftovers-ended",),
        mlproject=entry_point("sleep 600 > /dev/null 2>&1 & echo $! > @case/left"),
    ),
    Case("run-name", arguments={"run_name": "my run"}),
    Case(
        "run-id", ("existing-run-described",), arguments={"run_id": "@there", "parameters": {"a": 1}}, prepare=own_run
    ),
    Case(
        "run-id-other-value",
        ("existing-run-parameters",),
        arguments={"run_id": "@there", "parameters": {"a": 1}},
        prepare=run_with_parameter,
    ),
    Case("run-id-unknown", arguments={"run_id": "0" * 32}),
    Case("run-parent", prepare=parent),
    Case("synchronous-false", arguments={"synchronous": False, "parameters": {}}),
    Case("synchronous-false-no-parameters", ("asynchronous-parameters",), arguments={"synchronous": False}),
    Case(
        "cancelled",
        ("cancel-told",),
        mlproject=entry_point("echo begun > @case/begun; sleep 60"),
        arguments={"synchronous": False, "parameters": {}},
        prepare=begun,
        cancel=True,
    ),
    Case("caller-variables", mlproject=entry_point("env"), environ={"MINE": "a b\nc", "MLFLOW_RUN_ID": None}),
]

CASES = [*EXPERIMENTS, *BACKENDS, *ENVIRONMENTS, *RUNS]
