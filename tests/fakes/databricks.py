"""A scripted Databricks workspace in memory, for what the emulator lacks: every state, paging, faults. It runs nothing.

Its answers follow https://docs.databricks.com/api/workspace/jobs; the tests set the states of its runs.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from fakes.databricks_tracking import FakeMlflow, error, ok
from fakes.flaky_proxy import Answer, FlakyProxy, Forward, Request, Rule

__all__ = ["FakeRun", "FakeWorkspace", "error", "not_found", "unknown_value"]

USER = "me@example.com"
TOKEN = "dapi-not-to-be-seen"
_ENDED = ("TERMINATED", "SKIPPED", "INTERNAL_ERROR")


@dataclass
class FakeRun:
    """A submitted run.

    Attributes:
        number: The run's id.
        body: The body of the submission.
        start_time: Milliseconds since the epoch.
        state: The state in the form of version 2.1 of the API.
        status: The state in the form of version 2.2; None: answers have only the older form.
        shows_state: True if answers have the older form.
        output: The answer of ``runs/get-output`` for the last attempt of the task.
        attempts: The number of attempts of the task.
        files: The files of the workspace, among them long arguments.
        cancelled: The number of requests to cancel the run.
        ended_at: The time of the end, by ``time.monotonic``; 0 before.
    """

    number: int
    body: Mapping[str, Any]
    start_time: int
    state: dict[str, Any] = field(default_factory=lambda: {"life_cycle_state": "PENDING", "result_state": None})
    status: dict[str, Any] | None = None
    shows_state: bool = True
    output: dict[str, Any] = field(default_factory=dict)
    attempts: int = 1
    files: Mapping[str, bytes] = field(default_factory=dict)
    cancelled: int = 0
    ended_at: float = 0.0

    @property
    def spec(self) -> dict[str, Any]:
        """The argument of the bootstrap script."""
        found: dict[str, Any] = json.loads(self.body["tasks"][0]["spark_python_task"]["parameters"][0])
        if "spec" in found:
            found = json.loads(self.files[found["spec"]])
        return found

    @property
    def active(self) -> bool:
        """True if the run has not ended."""
        return self.state["life_cycle_state"] not in _ENDED

    def set_state(self, life: str, result: str | None = None, message: str = "") -> None:
        """Set the state, which answers have in the older form only."""
        self.status, self.shows_state = None, True
        self.state = {"life_cycle_state": life, "result_state": result, "state_message": message}
        if not self.active:
            self.ended_at = time.monotonic()

    def as_response(self, url: str) -> dict[str, Any]:
        """Return the run as ``runs/get`` answers."""
        return {
            "run_id": self.number,
            "job_id": self.number + 10**6,
            "run_name": self.body.get("run_name"),
            "start_time": self.start_time,
            "state": self.state if self.shows_state else None,
            "status": self.status,
            "run_page_url": f"{url}/jobs/{self.number + 10**6}/runs/{self.number}",
            "tasks": [self._task(attempt) for attempt in range(self.attempts)],
        }

    def _task(self, attempt: int) -> dict[str, Any]:
        state = self.state if attempt == self.attempts - 1 else {"life_cycle_state": "TERMINATED"}
        return {
            "run_id": self.number + 10**9 * (attempt + 1),
            "task_key": "mlfleet",
            "attempt_number": attempt,
            "state": state if self.shows_state else None,
        }


class FakeWorkspace(FlakyProxy):
    """A scripted workspace, which listens at `url`.

    Attributes:
        runs: The runs by number.
        files: The contents by path, of volumes, workspace files and DBFS.
        folders: The folders that exist in the workspace.
        secrets: The contents by scope and key.
        secret_times: The times at which secrets were put, in milliseconds since the epoch, by key.
        fault: A rule that may answer a request in place of the workspace; None: the workspace answers all.
        on_submit: Called with each new run.
        on_cancel: Called with each run that is cancelled; None: the run is TERMINATED and CANCELED at once.
        token: The token that the workspace accepts.
        logins: The number of tokens issued to a service principal.
        dbfs: True if there is a DBFS root.
        unknown: A function that returns the answer for a run that does not exist, from its number.
        quota: The number of jobs that it takes in all; None: any number.
        cancels_ended: True if the workspace takes the cancellation of a run that has ended.
        mlflow: The tracking of the workspace.
        limits: The number of requests that the workspace takes per second, by a part of their path; of others it takes
            any number.
        refused: The number of requests that it has refused because of the limits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rule = self._respond
        self.fault: Rule | None = None
        self.runs: dict[int, FakeRun] = {}
        self.tokens: dict[str, int] = {}
        self.files: dict[str, bytes] = {}
        self.folders: set[str] = {f"/Workspace/Users/{USER}"}
        self.secrets: dict[tuple[str, str], str] = {}
        self.secret_times: dict[str, int] = {}
        self.on_submit: Callable[[FakeRun], None] = lambda run: None
        self.on_cancel: Callable[[FakeRun], None] | None = None
        self.token = TOKEN
        self.logins = 0
        self.dbfs = True
        self.unknown: Callable[[object], Answer] = unknown_value
        self.quota: int | None = None
        self.cancels_ended = False
        self.mlflow = FakeMlflow(self.folders)
        self.limits = {"jobs/runs/submit": 35}
        self.refused = 0
        self._recent: dict[str, list[float]] = {}
        self._answers: dict[str, int] = {}
        self._answered = asyncio.Event()
        self._handles: dict[int, tuple[str, bytearray]] = {}

    @property
    def only_run(self) -> FakeRun:
        """The workspace's only run."""
        (run,) = self.runs.values()
        return run

    def put_output(self, run: FakeRun, text: bytes, code: int = 0, *, stopped: bool = False) -> None:
        """Write the files that the bootstrap script of a run would write."""
        end = json.dumps({"exit_code": code, "parts": 1, "stopped": stopped}).encode()
        for name, content in {"000000": text, "end": end}.items():
            self.files[f"{run.spec['output']}/{name}"] = b"%d\n%b" % (len(content), content)
        self.folders.add(run.spec["output"])

    @asynccontextmanager
    async def open(self) -> AsyncIterator[FakeWorkspace]:
        """Listen during the block."""
        async with self.listen():
            self.mlflow.url = self.url
            yield self

    async def _respond(self, request: Request, forward: Forward) -> Answer | None:
        async def answer_healthy() -> Answer:
            return self.answer(request)

        answer = await (self.fault(request, answer_healthy) if self.fault is not None else answer_healthy())
        kind = urlsplit(request.target).path.split("/", 3)[-1]
        self._answers[kind] = self._answers.get(kind, 0) + 1
        answered, self._answered = self._answered, asyncio.Event()
        answered.set()
        return answer

    async def wait_answered(self, kind: str, count: int) -> None:
        """Wait until `count` more requests of a kind, such as ``runs/get``, have been answered."""
        kind = f"jobs/{kind}"
        wanted = self._answers.get(kind, 0) + count
        while self._answers.get(kind, 0) < wanted:
            await self._answered.wait()

    def answer(self, request: Request) -> Answer:
        """Return the answer of a healthy workspace."""
        parts = urlsplit(request.target)
        if parts.path.startswith(("/.well-known/", "/oidc/")):
            return self._login(parts.path)
        if parts.path.startswith("/storage/"):
            return self.mlflow.answer_storage(request)
        if request.headers.get("authorization") != f"Bearer {self.token}":
            if self.logins:
                return error(401, "401", "The token is expired.")
            return error(403, "403", "Invalid access token.")
        if (limit := self._exceeded_limit(parts.path)) is not None:
            self.refused += 1
            return error(429, "REQUEST_LIMIT_EXCEEDED", f"The limit of {limit} requests per second is exceeded.")
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        for prefix, answer in (
            ("/api/2.0/fs/files", self._volume),
            ("/api/2.0/fs/directories", self._volume_folder),
            ("/api/2.0/workspace-files/import-file", self._import_file),
        ):
            if path.startswith(prefix):
                return answer(request, path.removeprefix(prefix))
        what = path.split("/", 3)[3]
        body = json.loads(request.body) if request.body else query
        if what.startswith("mlflow/"):
            return self.mlflow.answer(what.removeprefix("mlflow/"), body)
        handler = getattr(self, "_" + what.replace("/", "_").replace("-", "_"), None)
        return handler(body) if handler is not None else error(404, "ENDPOINT_NOT_FOUND", path)

    def _exceeded_limit(self, path: str) -> int | None:
        """Count a request. Return the limit of its kind if that is exceeded, else None."""
        kind = next((kind for kind in self.limits if kind in path), None)
        if kind is None:
            return None
        now = time.monotonic()
        self._recent[kind] = [*(moment for moment in self._recent.get(kind, []) if moment > now - 1.0), now]
        return self.limits[kind] if len(self._recent[kind]) > self.limits[kind] else None

    def _login(self, path: str) -> Answer:
        """Return the URL where a service principal gets tokens, or issue one."""
        if path == "/oidc/token":
            self.logins += 1
            self.token = f"issued-{self.logins}"
            return ok({"access_token": self.token, "token_type": "Bearer", "expires_in": 3600})
        endpoints = {"authorization_endpoint": f"{self.url}/oidc/a", "token_endpoint": f"{self.url}/oidc/token"}
        return ok({"oidc_endpoint": f"{self.url}/oidc", **endpoints})

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def _jobs_runs_submit(self, body: dict[str, Any]) -> Answer:
        token = body["idempotency_token"]
        if token not in self.tokens:
            if self.quota is not None and len(self.runs) >= self.quota:
                text = "The quota for the number of jobs has been reached."
                text += f" The current quota is {self.quota} jobs created in past 3600 seconds."
                return error(400, "QUOTA_EXCEEDED", text)
            number = len(self.runs) + 1
            self.tokens[token] = number
            self.runs[number] = run = FakeRun(number, body, int(time.time() * 1000), files=self.files)
            self.on_submit(run)
        return ok({"run_id": self.tokens[token]})

    def _jobs_runs_get(self, body: dict[str, Any]) -> Answer:
        run = self.runs.get(int(body["run_id"]))
        return ok(run.as_response(self.url)) if run is not None else self.unknown(body["run_id"])

    def _jobs_runs_list(self, body: dict[str, Any]) -> Answer:
        limit, offset = int(body.get("limit", 20)), int(body.get("page_token", 0))
        assert limit <= 26, "Databricks takes 25"
        runs = sorted(self.runs.values(), key=lambda run: (run.start_time, run.number), reverse=True)
        earliest, latest = int(body.get("start_time_from", 0)), int(body.get("start_time_to", 2**63))
        runs = [run for run in runs if earliest <= run.start_time <= latest]
        if body.get("active_only") == "true":
            runs = [run for run in runs if run.active]
        shown = [run.as_response(self.url) for run in runs[offset : offset + limit]]
        for each in shown:
            del each["tasks"]
        more = {"next_page_token": str(offset + limit)} if offset + limit < len(runs) else {}
        return ok({**({"runs": shown} if shown else {}), **more})

    def _jobs_runs_cancel(self, body: dict[str, Any]) -> Answer:
        run = self.runs.get(int(body["run_id"]))
        if run is None:
            return self.unknown(body["run_id"])
        run.cancelled += 1
        if not run.active:
            if self.cancels_ended:
                return ok({})
            return error(400, "INVALID_STATE", "The run has ended.")
        if self.on_cancel is not None:
            self.on_cancel(run)
        else:
            run.set_state("TERMINATED", "CANCELED", "Run cancelled.")
        return ok({})

    def _jobs_runs_get_output(self, body: dict[str, Any]) -> Answer:
        attempt, number = divmod(int(body["run_id"]), 10**9)
        run = self.runs.get(number)
        if run is None or not attempt:
            return error(400, "INVALID_PARAMETER_VALUE", "Retrieving the output of runs with tasks is not supported.")
        output = run.output if attempt == run.attempts else {"logs": "of an earlier attempt\n", "error": "too early"}
        return ok({"metadata": {}, **output})

    # ---- files ------------------------------------------------------------------------------------------------------

    def _volume(self, request: Request, path: str) -> Answer:
        if request.method == "PUT":
            if path.rpartition("/")[0] not in self.folders:
                return error(404, "NOT_FOUND", "The parent directory does not exist.")
            if path in self.files and "overwrite=true" not in request.target:
                return error(409, "ALREADY_EXISTS", "The file exists.")
            self.files[path] = request.body
            return Answer(204)
        content = self.files.get(path)
        if content is None:
            return error(404, "NOT_FOUND", "The file does not exist.")
        if request.method == "DELETE":
            del self.files[path]
            return Answer(204)
        if request.method == "HEAD":
            return Answer(200, b"", {"content-length": str(len(content))})
        return Answer(200, content)

    def _volume_folder(self, request: Request, path: str) -> Answer:
        if request.method == "PUT":
            self.folders.add(path)
            return Answer(204)
        inside = [each for each in self.files if each.startswith(f"{path}/")]
        if path not in self.folders:
            return error(404, "NOT_FOUND", "The directory does not exist.")
        if request.method == "GET":
            return ok({"contents": [{"path": each, "is_directory": False} for each in inside]})
        if inside:
            return error(400, "INVALID_PARAMETER_VALUE", "The directory is not empty.")
        self.folders.remove(path)
        return Answer(204)

    def _workspace_delete(self, body: dict[str, Any]) -> Answer:
        return self._delete(body["path"], body)

    def _dbfs_delete(self, body: dict[str, Any]) -> Answer:
        return self._delete(f"/dbfs{body['path']}", body)

    def _delete(self, path: str, body: dict[str, Any]) -> Answer:
        inside = [each for each in self.files if each.startswith(f"{path}/")]
        if path not in self.files and not inside:
            return error(404, "RESOURCE_DOES_NOT_EXIST", f"Path ({path}) doesn't exist.")
        if inside and not body.get("recursive"):
            return error(400, "DIRECTORY_NOT_EMPTY", f"Folder ({path}) is not empty")
        for each in [*inside, path]:
            self.files.pop(each, None)
        return ok({})

    def _import_file(self, request: Request, path: str) -> Answer:
        if path.rpartition("/")[0] not in self.folders:
            return error(404, "RESOURCE_DOES_NOT_EXIST", "The parent folder does not exist.")
        if path in self.files and "overwrite=true" not in request.target:
            return error(409, "RESOURCE_ALREADY_EXISTS", "The file exists.")
        self.files[path] = request.body
        return ok({})

    def _workspace_mkdirs(self, body: dict[str, Any]) -> Answer:
        path = "/Workspace" + body["path"].removeprefix("/Workspace")
        if path.startswith("/Workspace/Users/") and not path.startswith(f"/Workspace/Users/{USER}"):
            return error(403, "PERMISSION_DENIED", f"{USER} may not create {body['path']}.")
        while path.count("/") > 1:
            self.folders.add(path)
            path = path.rpartition("/")[0]
        return ok({})

    def _workspace_get_status(self, body: dict[str, Any]) -> Answer:
        content = self.files.get(body["path"])
        if content is None:
            return error(404, "RESOURCE_DOES_NOT_EXIST", f"Path ({body['path']}) doesn't exist.")
        return ok({"path": body["path"], "object_type": "FILE", "size": len(content)})

    def _workspace_export(self, body: dict[str, Any]) -> Answer:
        content = self.files.get(body["path"])
        return Answer(200, content) if content is not None else error(404, "RESOURCE_DOES_NOT_EXIST", "No such file.")

    def _dbfs_create(self, body: dict[str, Any]) -> Answer:
        if not self.dbfs:
            return _no_dbfs()
        handle = len(self._handles) + 1
        self._handles[handle] = (f"/dbfs{body['path']}", bytearray())
        return ok({"handle": handle})

    def _dbfs_add_block(self, body: dict[str, Any]) -> Answer:
        data = base64.b64decode(body["data"])
        assert len(data) <= 2**20, "DBFS takes blocks of 1 MiB"
        self._handles[body["handle"]][1].extend(data)
        return ok({})

    def _dbfs_close(self, body: dict[str, Any]) -> Answer:
        path, content = self._handles[body["handle"]]
        self.files[path] = bytes(content)
        return ok({})

    def _dbfs_get_status(self, body: dict[str, Any]) -> Answer:
        if not self.dbfs:
            return _no_dbfs()
        content = self.files.get(f"/dbfs{body['path']}")
        if content is None:
            return error(404, "RESOURCE_DOES_NOT_EXIST", "No file or directory exists on that path.")
        return ok({"path": body["path"], "is_dir": False, "file_size": len(content)})

    def _dbfs_read(self, body: dict[str, Any]) -> Answer:
        content = self.files.get(f"/dbfs{body['path']}")
        if content is None:
            return error(404, "RESOURCE_DOES_NOT_EXIST", "No file or directory exists on that path.")
        piece = content[int(body["offset"]) : int(body["offset"]) + int(body["length"])]
        return ok({"bytes_read": len(piece), "data": base64.b64encode(piece).decode()})

    # ---- the rest ---------------------------------------------------------------------------------------------------

    def _preview_scim_v2_Me(self, body: dict[str, Any]) -> Answer:
        return ok({"userName": USER})

    def _secrets_put(self, body: dict[str, Any]) -> Answer:
        if body["scope"] != "ours":
            return error(404, "RESOURCE_DOES_NOT_EXIST", f"Scope {body['scope']} does not exist!")
        self.secrets[body["scope"], body["key"]] = body["string_value"]
        self.secret_times[body["key"]] = int(time.time() * 1000)
        return ok({})

    def _secrets_scopes_list(self, body: dict[str, Any]) -> Answer:
        return ok({"scopes": [{"name": "ours", "backend_type": "DATABRICKS"}, {"name": "theirs"}]})

    def _secrets_list(self, body: dict[str, Any]) -> Answer:
        if body["scope"] != "ours":
            return error(403, "PERMISSION_DENIED", f"{USER} may not list the scope {body['scope']}.")
        keys = [key for scope, key in self.secrets if scope == "ours"]
        return ok({"secrets": [{"key": key, "last_updated_timestamp": self.secret_times[key]} for key in keys]})

    def _secrets_delete(self, body: dict[str, Any]) -> Answer:
        there = self.secrets.pop((body["scope"], body["key"]), None)
        return ok({}) if there is not None else error(404, "RESOURCE_DOES_NOT_EXIST", "No such secret.")


def unknown_value(number: object) -> Answer:
    """Return one of the two answers that Databricks gives for a run that does not exist."""
    return error(400, "INVALID_PARAMETER_VALUE", f"Run {number} does not exist.")


def not_found(number: object) -> Answer:
    """Return the other one of the two answers."""
    return error(404, "RESOURCE_DOES_NOT_EXIST", f"Run {number} was not found.")


def _no_dbfs() -> Answer:
    return error(403, "PERMISSION_DENIED", "Public DBFS root is disabled. Access is denied on path: /mlfleet")
