"""The request that starts a run, from a job. Pure."""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mlfleet._text.masking import MASK, is_secret_name, mask_uri
from mlfleet.backends.base import Job
from mlfleet.backends.databricks.config import DatabricksConfig, TaskKind
from mlfleet.errors import SubmitError

__all__ = [
    "PROJECT",
    "ROOT",
    "TASK_KEY",
    "Places",
    "bootstrap_argument",
    "bootstrap_spec",
    "files_of_project",
    "masked",
    "place",
    "public_variables",
    "request_body",
    "run_name",
    "too_long",
    "with_argument",
]

TASK_KEY = "mlfleet"
_LONGEST_ARGUMENT = 8000
"""Bytes; Databricks takes 10,000 of JSON for all parameters together."""
_LONGEST_NAME = 4096
# Databricks gives its own runs their identity; what belongs to this machine must not follow them.
_OF_THIS_MACHINE = ("DATABRICKS_HOST", "DATABRICKS_TOKEN", "DATABRICKS_CLIENT_ID", "DATABRICKS_CLIENT_SECRET")


@dataclass(frozen=True, slots=True)
class Places:
    """Where things of a run are, as code that runs in Databricks sees it.

    Attributes:
        script: the bootstrap script.
        archive: the packed project.
        sha256: of the archive, in hex.
        output: the folder for the run's output.
        secret: the key in the secret scope with the secret variables; None: there are none.
        argument: a file with the bootstrap's argument, where it is too long for a parameter.
    """

    script: str
    archive: str
    sha256: str
    output: str
    secret: str | None = None
    argument: str | None = None


def run_name(job: Job, config: DatabricksConfig) -> str:
    """The run's name in Databricks; by the id in it an attached run is found."""
    return f"{(config.run_name or job.project_name)[: _LONGEST_NAME - 40]} ({job.run_id})"


def public_variables(job: Job, config: DatabricksConfig) -> tuple[dict[str, str], dict[str, str]]:
    """The variables for the command: plain ones, and secret ones.

    Where the runs are in the workspace that tracks them, they have their own identity and need none of ours.
    """
    plain, secret = dict(job.environ), dict(job.secrets)
    if _own_identity(job, config):
        plain["MLFLOW_TRACKING_URI"] = "databricks"
        for name in _OF_THIS_MACHINE:
            plain.pop(name, None)
            secret.pop(name, None)
    return plain, secret


def bootstrap_spec(job: Job, config: DatabricksConfig, places: Places) -> dict[str, Any]:
    """What the bootstrap script is told.

    Raises:
        SubmitError: the command is none that a Spark job can be.
    """
    spec: dict[str, Any] = {
        "run": job.run_id,
        "archive": places.archive,
        "sha256": places.sha256,
        "root": ROOT,
        "name": PROJECT,
        "mode": "python" if job.spark_job is not None else "command",
        "command": _python_command(job) if job.spark_job is not None else job.command,
        "environ": public_variables(job, config)[0],
        "output": places.output,
        "grace": job.cancel_grace,
    }
    if downloads := _downloads(job.placed):
        spec["downloads"] = downloads
    if places.secret is not None:
        spec["secrets"] = {"scope": config.secret_scope, "key": places.secret}
    if _own_identity(job, config):
        spec["identity"] = True
    return spec


def bootstrap_argument(spec: Mapping[str, Any]) -> str:
    """The argument as text. Databricks would replace ``{{…}}`` in it, so that no such thing is there."""
    text = json.dumps(spec, separators=(",", ":"))
    # Inside of strings a brace may be written like this, and outside two opening ones never stand together.
    return text.replace("{{", "{\\u007b")


def request_body(
    job: Job, config: DatabricksConfig, places: Places, *, token: str, requirements: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The body of ``runs/submit``.

    Args:
        job: to be run.
        config: of the backend.
        places: where its things are.
        token: which makes a second submission of it the same.
        requirements: lines for pip, of what the project needs.
    """
    argument = bootstrap_argument(bootstrap_spec(job, config, places))
    if places.argument is not None:
        argument = bootstrap_argument({"spec": places.argument})
    body: dict[str, Any] = {"run_name": run_name(job, config), "idempotency_token": token, **config.passed_on}
    if config.task is TaskKind.SHELL_COMMAND:
        return body | _shell_command(config, places, argument, requirements)
    task: dict[str, Any] = {
        "task_key": TASK_KEY,
        "spark_python_task": {"python_file": places.script, "source": "WORKSPACE", "parameters": [argument]},
    }
    compute = config.compute
    if compute.serverless:
        task["environment_key"] = "default"
        dependencies = [*_with_mlflow(tuple(compute.dependencies) + requirements)]
        spec = {"environment_version": compute.environment_version, "dependencies": dependencies}
        body["environments"] = [{"environment_key": "default", "spec": spec}]
    elif compute.existing_cluster_id is not None:
        task["existing_cluster_id"] = compute.existing_cluster_id
        # mlflow is not added: what is installed on somebody's cluster stays there.
        libraries = _libraries(config, requirements)
    else:
        task["new_cluster"] = _cluster(config, places)
        libraries = _libraries(config, _with_mlflow(requirements, *_packages(config)))
    if not compute.serverless and libraries:
        task["libraries"] = libraries
    return body | {"tasks": [task]}


def masked(told: Any, name: str = "") -> Any:
    """A request for people to see: what its keys call a secret, and credentials in URIs, replaced."""
    if isinstance(told, Mapping):
        return {key: masked(value, str(key)) for key, value in told.items()}
    if isinstance(told, list):
        return [masked(value) for value in told]
    if not isinstance(told, str):
        return told
    # By a reference like {{secrets/scope/key}} Databricks names a secret without telling it.
    if is_secret_name(name.replace(".", "_")) and name != "idempotency_token" and not told.startswith("{{secrets/"):
        return MASK
    return mask_uri(told)


def with_argument(places: Places, path: str) -> Places:
    """The same places, with the bootstrap's argument in a file."""
    return replace(places, argument=path)


def too_long(argument: str) -> bool:
    """Whether an argument must go into a file."""
    return len(argument.encode()) > _LONGEST_ARGUMENT


def _own_identity(job: Job, config: DatabricksConfig) -> bool:
    return config.profile is None and job.environ.get("MLFLOW_TRACKING_URI", "").startswith("databricks")


def _shell_command(
    config: DatabricksConfig, places: Places, argument: str, requirements: tuple[str, ...]
) -> dict[str, Any]:
    """The form that the reference sends: one task, without a key, on a new cluster."""
    script = (
        f'export PATH="$PATH:$DB_HOME/python/bin" && exec python {shlex.quote(places.script)} {shlex.quote(argument)}'
    )
    return {
        "new_cluster": _cluster(config, places),
        "libraries": _libraries(config, _with_mlflow(requirements, *_packages(config))),
        "shell_command_task": {"command": ["bash", "-c", script], "env_vars": {}},
    }


def _cluster(config: DatabricksConfig, places: Places) -> dict[str, Any]:
    cluster = dict(config.compute.new_cluster or {})
    if places.secret is not None:
        # Databricks puts the secret in when it starts the cluster; nobody can read it there.
        reference = f"{{{{secrets/{config.secret_scope}/{places.secret}}}}}"
        cluster["spark_env_vars"] = {**cluster.get("spark_env_vars", {}), "MLFLEET_SECRETS": reference}
    return cluster


def _libraries(config: DatabricksConfig, requirements: tuple[str, ...]) -> list[dict[str, Any]]:
    return [*map(dict, config.compute.libraries), *({"pypi": {"package": line}} for line in requirements)]


def _packages(config: DatabricksConfig) -> tuple[str, ...]:
    return tuple(str((library.get("pypi") or {}).get("package") or "") for library in config.compute.libraries)


def _with_mlflow(requirements: tuple[str, ...], *others: str) -> tuple[str, ...]:
    if any("mlflow" in line for line in (*requirements, *others)):
        return requirements
    return (*requirements, "mlflow")


def _python_command(job: Job) -> str:
    words = job.command
    try:
        first, file, *_ = shlex.split(words)
    except ValueError:
        first, file = "", ""
    if first not in ("python", "python3") or not file or file.startswith("-"):
        found = words.strip()[:200]
        text = f"a databricks_spark_job runs a Python file, its command must be 'python FILE …', not {found!r}"
        raise SubmitError(text, backend="databricks")
    if posixpath.isabs(file) or ".." in file.split("/"):
        raise SubmitError(
            f"the Python file {file!r} of the databricks_spark_job is outside the project", backend="databricks"
        )
    return words


ROOT = "/.mlfleet-run"
"""Stands in commands for the folder of the run, whose name the bootstrap script alone knows."""

PROJECT = "project"
"""The folder of the project, in that of the run."""

_THERE = ("/Volumes/", "/Workspace/", "/dbfs/")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def place(path: str, index: int, folder: Path) -> str | None:
    """See `mlfleet.backends.base.Backend.place`."""
    if path.startswith("dbfs:/Volumes/"):
        return path.removeprefix("dbfs:")
    if path.startswith(_THERE):
        return path
    if not path.startswith("/"):
        return f"{ROOT}/param_{index}/{_name(path)}"
    if not Path(path).exists():
        return None
    if Path(path).is_relative_to(folder):
        return posixpath.normpath(posixpath.join(ROOT, PROJECT, str(Path(path).relative_to(folder))))
    raise ValueError(
        f"{path!r} is on this machine, where Databricks cannot read it: put it into the project or a volume"
        " (/Volumes/…), or give a URI such as s3://… that can be read there"
    )


def _downloads(placed: Mapping[str, str]) -> dict[str, str]:
    """What the run must download: place below its folder → URI."""
    start = f"{ROOT}/param_"
    return {there.removeprefix(f"{ROOT}/"): uri for there, uri in placed.items() if there.startswith(start)}


def files_of_project(placed: Iterable[str]) -> tuple[str, ...]:
    """Which of its own files a project is to read, relative to its folder."""
    start = f"{ROOT}/{PROJECT}/"
    return tuple(there.removeprefix(start) for there in placed if there.startswith(start))


def _name(uri: str) -> str:
    """The file's own name, for the sake of its ending; without what a shell could mistake."""
    name = posixpath.basename(unquote(urlsplit(uri).path).rstrip("/"))
    return _UNSAFE.sub("_", name).lstrip(".") or "data"
