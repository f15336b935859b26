"""The request that submits a job as a run. Pure."""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mlfleet._project.command import substitute
from mlfleet._text.masking import MASK, is_secret_name, mask_uri
from mlfleet.backends.base import Job
from mlfleet.backends.databricks.config import DatabricksConfig, TaskKind
from mlfleet.errors import SubmitError

__all__ = [
    "ARGUMENT",
    "PROJECT",
    "ROOT",
    "RunPaths",
    "argument_file",
    "bootstrap_argument",
    "mask_request",
    "place_path",
    "project_files",
    "request_body",
    "variables",
]

_TASK_KEY = "mlfleet"
ARGUMENT = "argument.json"
"""The file with the argument of the bootstrap script that is too long for a parameter of the task."""

ROOT = "/.mlfleet-run"
"""The placeholder in commands for the folder of the run, which the bootstrap script creates and puts in its place."""

PROJECT = "project"
"""The name of the project's folder in the folder of the run."""

_REMOTE_PREFIXES = ("/Volumes/", "/Workspace/", "/dbfs/")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_LONGEST_ARGUMENT = 8000  # bytes; Databricks takes 10,000 bytes of JSON for all parameters together
_LONGEST_NAME = 4096
# Databricks gives its own runs their identity: the login of this machine must not be passed to them.
_LOCAL_VARIABLES = ("DATABRICKS_HOST", "DATABRICKS_TOKEN", "DATABRICKS_CLIENT_ID", "DATABRICKS_CLIENT_SECRET")


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The paths of a run's files, for code that runs in Databricks.

    Attributes:
        script: The path of the bootstrap script.
        archive: The path of the packed project.
        sha256: The SHA-256 of the archive, in hex.
        output: The folder for the run's output.
        secret: The key in the secret scope with the secret variables; None: the run has none.
    """

    script: str
    archive: str
    sha256: str
    output: str
    secret: str | None = None


def _run_name(job: Job, config: DatabricksConfig) -> str:
    """Return the run's name in Databricks, which ends with the run id, so that `attach` finds it."""
    return f"{(config.run_name or job.project_name)[: _LONGEST_NAME - 40]} ({job.run_id})"


def variables(job: Job, config: DatabricksConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Return the plain and the secret environment variables of the command.

    Runs in the workspace that tracks them have their own identity, and get no login of this machine.
    """
    plain, secret = dict(job.environ), dict(job.secrets)
    if _uses_own_identity(job, config):
        plain["MLFLOW_TRACKING_URI"] = "databricks"
        for name in _LOCAL_VARIABLES:
            plain.pop(name, None)
            secret.pop(name, None)
    return plain, secret


def _bootstrap_spec(job: Job, config: DatabricksConfig, paths: RunPaths) -> dict[str, Any]:
    """Return the argument of the bootstrap script, as a mapping.

    Raises:
        SubmitError: The command cannot be run as a Spark job.
    """
    spec: dict[str, Any] = {
        "run": job.run_id,
        "archive": paths.archive,
        "sha256": paths.sha256,
        "root": ROOT,
        "name": PROJECT,
        "mode": "python" if job.spark_job is not None else "command",
        "command": _python_command(job) if job.spark_job is not None else job.command,
        "environ": variables(job, config)[0],
        "output": paths.output,
        "grace": job.cancel_grace,
    }
    if downloads := _downloads(job.placed):
        spec["downloads"] = downloads
    if paths.secret is not None:
        spec["secrets"] = {"scope": config.secret_scope, "key": paths.secret}
    if _uses_own_identity(job, config):
        spec["identity"] = True
    return spec


def bootstrap_argument(spec: Mapping[str, Any]) -> str:
    """Return the argument as JSON without ``{{``, since Databricks would replace ``{{…}}`` in a parameter."""
    text = json.dumps(spec, separators=(",", ":"))
    # JSON may escape a brace in a string, and two opening braces in a row occur only in strings.
    return text.replace("{{", "{\\u007b")


def argument_file(job: Job, config: DatabricksConfig, paths: RunPaths) -> bytes | None:
    """Return the content of the file `ARGUMENT` in the folder for the output; None if the run needs no such file."""
    argument = bootstrap_argument(_bootstrap_spec(job, config, paths)).encode()
    return argument if len(argument) > _LONGEST_ARGUMENT else None


def request_body(
    job: Job, config: DatabricksConfig, paths: RunPaths, *, token: str, requirements: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the body of ``runs/submit``.

    Args:
        job: The job to submit.
        config: The job's configuration.
        paths: The paths of the run's files.
        token: The idempotency token: a second submission with the same one starts nothing.
        requirements: The project's requirements, as lines for pip.
    """
    is_in_file = argument_file(job, config, paths) is not None
    spec = {"spec": f"{paths.output}/{ARGUMENT}"} if is_in_file else _bootstrap_spec(job, config, paths)
    argument = bootstrap_argument(spec)
    body: dict[str, Any] = {"run_name": _run_name(job, config), "idempotency_token": token, **config.passed_on}
    if config.task is TaskKind.SHELL_COMMAND:
        return body | {**config.task_settings, **_shell_command(config, paths, argument, requirements)}
    task: dict[str, Any] = {
        "task_key": _TASK_KEY,
        "spark_python_task": {"python_file": paths.script, "source": "WORKSPACE", "parameters": [argument]},
        **config.task_settings,
    }
    compute = config.compute
    if compute.serverless:
        task["environment_key"] = "default"
        dependencies = [*_with_mlflow(tuple(compute.dependencies) + requirements)]
        spec = {"dependencies": dependencies, **compute.environment}
        if compute.environment_version is not None:
            spec["environment_version"] = compute.environment_version
        body["environments"] = [{"environment_key": "default", "spec": spec}]
    elif compute.existing_cluster_id is not None:
        task["existing_cluster_id"] = compute.existing_cluster_id
        # Do not add mlflow: a library stays installed on an existing cluster after the run.
        libraries = _libraries(config, requirements)
    else:
        task["new_cluster"] = _cluster(config, paths)
        libraries = _libraries(config, _with_mlflow(requirements, *_packages(config)))
    if not compute.serverless and libraries:
        task["libraries"] = libraries
    return body | {"tasks": [task]}


def mask_request(value: Any, name: str = "") -> Any:
    """Return a request with secrets masked: values whose keys say so, and credentials in URIs.

    Args:
        value: The request, or a value in it.
        name: The key of the value; empty: it has none.
    """
    if isinstance(value, Mapping):
        return {key: mask_request(each, str(key)) for key, each in value.items()}
    if isinstance(value, list):
        return [mask_request(each) for each in value]
    if not isinstance(value, str):
        return value
    # A reference such as {{secrets/scope/key}} names a secret and does not contain it.
    if is_secret_name(name.replace(".", "_")) and name != "idempotency_token" and not value.startswith("{{secrets/"):
        return MASK
    return mask_uri(value)


def _uses_own_identity(job: Job, config: DatabricksConfig) -> bool:
    """Return True if the run is tracked by the workspace that it runs in."""
    return config.profile is None and job.environ.get("MLFLOW_TRACKING_URI", "").startswith("databricks")


def _shell_command(
    config: DatabricksConfig, paths: RunPaths, argument: str, requirements: tuple[str, ...]
) -> dict[str, Any]:
    """Return the part of the request that mlflow sends: one task, without a key, on a new cluster."""
    script = (
        f'export PATH="$PATH:$DB_HOME/python/bin" && exec python {shlex.quote(paths.script)} {shlex.quote(argument)}'
    )
    return {
        "new_cluster": _cluster(config, paths),
        "libraries": _libraries(config, _with_mlflow(requirements, *_packages(config))),
        "shell_command_task": {"command": ["bash", "-c", script], "env_vars": {}},
    }


def _cluster(config: DatabricksConfig, paths: RunPaths) -> dict[str, Any]:
    cluster = dict(config.compute.new_cluster or {})
    if paths.secret is not None:
        # Databricks replaces the reference when it starts the cluster, and shows only the reference.
        reference = f"{{{{secrets/{config.secret_scope}/{paths.secret}}}}}"
        cluster["spark_env_vars"] = {**cluster.get("spark_env_vars", {}), "MLFLEET_SECRETS": reference}
    return cluster


def _libraries(config: DatabricksConfig, requirements: tuple[str, ...]) -> list[dict[str, Any]]:
    for line in requirements:
        if line.startswith("-") or " --" in line:
            raise SubmitError(
                f"the project's environment has the option {mask_uri(line)!r}, which the libraries of a cluster do not"
                " take: name the package in backend_config {'libraries': [{'pypi': {'package': …, 'repo': …}}]}, or use"
                " serverless compute",
                backend="databricks",
            )
    return [*map(dict, config.compute.libraries), *({"pypi": {"package": line}} for line in requirements)]


def _packages(config: DatabricksConfig) -> tuple[str, ...]:
    return tuple(str((library.get("pypi") or {}).get("package") or "") for library in config.compute.libraries)


def _with_mlflow(requirements: tuple[str, ...], *others: str) -> tuple[str, ...]:
    if any("mlflow" in line for line in (*requirements, *others)):
        return requirements
    return (*requirements, "mlflow")


def _python_command(job: Job) -> str:
    # The bootstrap splits it into words and runs the file in its own process: there is no bash for its variables.
    try:
        words = substitute(job.command)
    except ValueError:
        words = []
    first, file = (*words, "", "")[:2]
    if first not in ("python", "python3") or not file or file.startswith("-"):
        found = job.command.strip()[:200]
        text = f"a databricks_spark_job runs a Python file: its command must be 'python FILE …', not {found!r}"
        raise SubmitError(text, backend="databricks")
    if posixpath.isabs(file) or ".." in file.split("/"):
        raise SubmitError(
            f"the Python file {file!r} of the databricks_spark_job is outside the project", backend="databricks"
        )
    return job.command if words == shlex.split(job.command) else shlex.join(words)


def place_path(path: str, index: int, folder: Path) -> str | None:
    """Return the path in Databricks of what a ``path`` parameter names; see `mlfleet.backends.base.Backend.place`."""
    if path.startswith("dbfs:/Volumes/"):
        return path.removeprefix("dbfs:")
    if path.startswith(_REMOTE_PREFIXES):
        return path
    if not path.startswith("/"):
        return f"{ROOT}/param_{index}/{_file_name(path)}"
    if not Path(path).exists():
        return None
    if Path(path).is_relative_to(folder):
        return posixpath.normpath(posixpath.join(ROOT, PROJECT, str(Path(path).relative_to(folder))))
    raise ValueError(
        f"{path!r} is on this machine, where Databricks cannot read it: put it into the project or a volume"
        " (/Volumes/…), or give a URI such as s3://… that can be read there"
    )


def _downloads(placed: Mapping[str, str]) -> dict[str, str]:
    """Return the URIs that the run must download, by their path below the folder of the run."""
    start = f"{ROOT}/param_"
    return {there.removeprefix(f"{ROOT}/"): uri for there, uri in placed.items() if there.startswith(start)}


def project_files(placed: Iterable[str]) -> tuple[str, ...]:
    """Return the files of the project that the command reads, relative to the project's folder."""
    start = f"{ROOT}/{PROJECT}/"
    return tuple(there.removeprefix(start) for there in placed if there.startswith(start))


def _file_name(uri: str) -> str:
    """Return the file's name in a URI, whose suffix the command may need, without characters special to a shell."""
    name = posixpath.basename(unquote(urlsplit(uri).path).rstrip("/"))
    return _UNSAFE.sub("_", name).lstrip(".") or "data"
