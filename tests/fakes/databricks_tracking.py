"""The MLflow tracking of a scripted Databricks workspace: experiments as files of the workspace, runs, artifacts."""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from fakes.flaky_proxy import Answer, Request

__all__ = ["SIGNATURE", "FakeMlflow", "error", "ok"]

SIGNATURE = "signature-not-to-be-seen"


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
        url: The URL of the workspace, whose path ``/storage`` stands for the storage of a cloud.
        artifacts: The contents of artifacts by the id of their run or logged model, and their path.
        storage: The kind of the storage.
        page: The number of artifacts in an answer.
    """

    def __init__(self, folders: set[str]) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.url = ""
        self.artifacts: dict[tuple[str, str], bytes] = {}
        self.storage = "AWS_PRESIGNED_URL"
        self.page = 1000
        self._half: dict[str, bytes] = {}
        self._folders = folders
        self._ids = itertools.count(700)

    def answer(self, what: str, body: Mapping[str, Any]) -> Answer:
        """Return the answer to a request of the tracking API, such as ``runs/get``."""
        if what.startswith("logged-models/"):
            _, model, *rest = what.split("/")
            what, body = "/".join(["logged-models", *rest]), {**body, "model_id": model}
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

    # ---- artifacts --------------------------------------------------------------------------------------------------

    def _artifacts_list(self, body: Mapping[str, Any]) -> Answer:
        return self._listing(body["run_id"], body.get("path", ""), body)

    def _logged_models_artifacts_directories(self, body: Mapping[str, Any]) -> Answer:
        return self._listing(body["model_id"], body.get("artifact_directory_path", ""), body)

    def _listing(self, owner: str, path: str, body: Mapping[str, Any]) -> Answer:
        """Return the files of a folder page by page; of a file, the file itself."""
        start = f"{path}/" if path else ""
        names = [name for where, name in self.artifacts if where == owner]
        files = {name: name == path for name in names if name == path}
        files |= {start + name.removeprefix(start).partition("/")[0]: False for name in names if name.startswith(start)}
        entries = [{"path": name, "is_dir": (owner, name) not in self.artifacts} for name in sorted(files)]
        begin = int(body.get("page_token", 0))
        more = {"next_page_token": str(begin + self.page)} if begin + self.page < len(entries) else {}
        return ok({"files": entries[begin : begin + self.page], **more})

    def _artifacts_credentials_for_read(self, body: Mapping[str, Any]) -> Answer:
        return ok({"credential_infos": [self._sign(body["run_id"], path) for path in body["path"]]})

    def _artifacts_credentials_for_write(self, body: Mapping[str, Any]) -> Answer:
        return ok({"credential_infos": [self._sign(body["run_id"], path) for path in body["path"]]})

    def _logged_models_artifacts_credentials_for_download(self, body: Mapping[str, Any]) -> Answer:
        signed = [self._sign(body["model_id"], path) for path in body["paths"]]
        return ok({"credentials": [{"model_id": body["model_id"], "credential_info": each} for each in signed]})

    def _sign(self, owner: str, path: str) -> dict[str, Any]:
        url = f"{self.url}/storage/{owner}/{quote(path)}?sig={SIGNATURE}"
        headers = [{"name": "x-cloud-header", "value": "wanted"}]
        return {"run_id": owner, "path": path, "signed_uri": url, "type": self.storage, "headers": headers}

    def answer_storage(self, request: Request) -> Answer:
        """Return the answer of the cloud's storage, which takes signed URLs and no login."""
        parts = urlsplit(request.target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        owner, _, path = unquote(parts.path).removeprefix("/storage/").partition("/")
        if "authorization" in request.headers or query.pop("sig", None) != SIGNATURE:
            return Answer(403, b"<Error>not signed</Error>")
        if request.headers.get("x-cloud-header") != "wanted":
            return Answer(400, b"<Error>a header is missing</Error>")
        if request.method == "GET":
            content = self.artifacts.get((owner, path))
            return Answer(404, b"<Error>NoSuchKey</Error>") if content is None else Answer(200, content)
        if self.storage == "AZURE_ADLS_GEN2_SAS_URI":
            return self._change_adls(request, (owner, path), query)
        if self.storage == "AZURE_SAS_URI" and request.headers.get("x-ms-blob-type") != "BlockBlob":
            return Answer(400, b"<Error>MissingRequiredHeader</Error>")
        self.artifacts[owner, path] = request.body
        return Answer(201)

    def _change_adls(self, request: Request, key: tuple[str, str], query: Mapping[str, str]) -> Answer:
        half = self._half.get(key[1], b"")
        if query.get("resource") == "file" and request.method == "PUT":
            self._half[key[1]] = b""
        elif query.get("action") == "append" and query["position"] == str(len(half)):
            self._half[key[1]] = half + request.body
        elif query.get("action") == "flush" and query["position"] == str(len(half)):
            self.artifacts[key] = half
        else:
            return Answer(400, b"<Error>InvalidFlushPosition</Error>")
        return Answer(202)

    def _runs_search(self, body: Mapping[str, Any]) -> Answer:
        """Return all runs of the experiments: the filter does not count."""
        return ok(
            {"runs": [run for run in self.runs.values() if run["info"]["experiment_id"] in body["experiment_ids"]]}
        )
