"""The MLflow tracking of a scripted Databricks workspace: experiments as files of the workspace, runs, artifacts."""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fakes.flaky_proxy import Answer

__all__ = ["FakeMlflow", "error", "ok"]


def ok(body: Mapping[str, Any]) -> Answer:
    """Return an answer with a JSON body."""
    return Answer(200, json.dumps(body).encode(), {"content-type": "application/json"})


def error(status: int, code: str, message: str) -> Answer:
    """Return an error answer with Databricks' error code."""
    body = json.dumps({"error_code": code, "message": message}).encode()
    return Answer(status, body, {"content-type": "application/json"})


class FakeMlflow:
    """Experiments and runs of a workspace.

    Args:
        folders: The folders of the workspace, which experiments are created in.

    Attributes:
        experiments: The ids of the experiments by name.
        runs: The runs, as ``runs/get`` answers.
    """

    def __init__(self, folders: set[str]) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self._folders = folders
        self._ids = itertools.count(700)

    def answer(self, what: str, body: Mapping[str, Any]) -> Answer:
        """Return the answer to a request of the tracking API, such as ``runs/get``."""
        handler = getattr(self, "_" + what.replace("/", "_").replace("-", "_"), None)
        answer: Answer = handler(body) if handler is not None else error(404, "ENDPOINT_NOT_FOUND", what)
        return answer

    # ---- experiments ------------------------------------------------------------------------------------------------

    def _experiments_get_by_name(self, body: Mapping[str, Any]) -> Answer:
        found = self.experiments.get(body["experiment_name"])
        if found is None:
            return error(404, "RESOURCE_DOES_NOT_EXIST", f"Node {body['experiment_name']} does not exist.")
        name = body["experiment_name"]
        return ok({"experiment": {"experiment_id": found, "name": name, "lifecycle_stage": "active"}})

    def _experiments_create(self, body: Mapping[str, Any]) -> Answer:
        given = body["name"]
        if not given.startswith("/"):
            message = f"Got an invalid experiment name '{given}'. An experiment name must be an absolute path."
            return error(400, "INVALID_PARAMETER_VALUE", message)
        name = given.removeprefix("/Workspace")  # which the workspace does not keep
        folder = name.rpartition("/")[0]
        if f"/Workspace{folder}" not in self._folders:
            return error(404, "RESOURCE_DOES_NOT_EXIST", f"Parent directory {folder} does not exist.")
        if name in self.experiments:
            return error(400, "RESOURCE_ALREADY_EXISTS", f"Node named '{name}' already exists.")
        self.experiments[name] = str(next(self._ids))
        return ok({"experiment_id": self.experiments[name]})

    # ---- runs -------------------------------------------------------------------------------------------------------

    def _runs_create(self, body: Mapping[str, Any]) -> Answer:
        experiment = body["experiment_id"]
        if experiment not in self.experiments.values():
            return error(404, "RESOURCE_DOES_NOT_EXIST", f"No experiment was found with ID {experiment}.")
        run_id = uuid.uuid4().hex
        info = {
            "run_id": run_id,
            "run_name": body.get("run_name") or "fake-run",
            "experiment_id": experiment,
            "status": "RUNNING",
            "start_time": body.get("start_time") or int(time.time() * 1000),
            "artifact_uri": f"dbfs:/databricks/mlflow-tracking/{experiment}/{run_id}/artifacts",
            "lifecycle_stage": "active",
        }
        self.runs[run_id] = {"info": info, "data": {"tags": list(body.get("tags") or ()), "params": []}}
        return ok({"run": self.runs[run_id]})

    def _runs_get(self, body: Mapping[str, Any]) -> Answer:
        run = self.runs.get(body["run_id"])
        if run is None:
            return error(404, "RESOURCE_DOES_NOT_EXIST", f"Run '{body['run_id']}' not found.")
        return ok({"run": run})

    def _runs_log_batch(self, body: Mapping[str, Any]) -> Answer:
        data = self.runs[body["run_id"]]["data"]
        for kind in ("tags", "params"):
            given = {each["key"]: each["value"] for each in [*data[kind], *(body.get(kind) or ())]}
            data[kind] = [{"key": key, "value": value} for key, value in given.items()]
        return ok({})

    def _runs_update(self, body: Mapping[str, Any]) -> Answer:
        info = self.runs[body["run_id"]]["info"]
        info.update({key: value for key, value in body.items() if key != "run_id"})
        return ok({"run_info": info})

    def _runs_search(self, body: Mapping[str, Any]) -> Answer:
        """Return all runs of the experiments: the filter does not count."""
        return ok(
            {"runs": [run for run in self.runs.values() if run["info"]["experiment_id"] in body["experiment_ids"]]}
        )
