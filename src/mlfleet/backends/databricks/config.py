"""The ``backend_config`` of the Databricks backend."""

from __future__ import annotations

import copy
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from mlfleet._text.documents import nearest
from mlfleet.backends.databricks.fields import Fields, check_value, read_fields
from mlfleet.errors import UsageError

__all__ = ["KEYS", "Compute", "DatabricksConfig", "TaskKind", "Upload", "UploadKind", "parse_config"]

T = TypeVar("T")
Chosen = TypeVar("Chosen", bound=StrEnum)


class UploadKind(StrEnum):
    """A kind of storage for projects and output."""

    VOLUME = "volume"
    WORKSPACE = "workspace"
    DBFS = "dbfs"


class TaskKind(StrEnum):
    """The kind of task to submit: a Python task with the bootstrap script, or a shell command of the cluster."""

    PYTHON = "python"
    SHELL_COMMAND = "shell_command"


# The keys that this module itself reads; `read_fields` knows the others, among them those of a cluster. Any key of a
# cluster at the top level means that the configuration is a cluster, as in mlflow.
KEYS = (
    "api_version", "dependencies", "environment_version", "existing_cluster_id", "libraries", "new_cluster", "profile",
    "run_name", "secret_scope", "task", "upload", "upload_path",
)  # fmt: skip
_ENVIRONMENT_VERSION = "4"


class _ApiVersion(StrEnum):
    LATEST = "2.2"
    PREVIOUS = "2.1"


_NO_FIELDS = Fields({}, {}, {}, {})
_PREFIXES = {"/Volumes/": UploadKind.VOLUME, "/dbfs/": UploadKind.DBFS, "/Workspace/": UploadKind.WORKSPACE}


@dataclass(frozen=True, slots=True)
class Compute:
    """The compute of a run: a new cluster, an existing one, or serverless compute.

    Attributes:
        new_cluster: The specification of the new cluster; None: another kind of compute.
        existing_cluster_id: The id of the existing cluster; None: another kind of compute.
        environment_version: The version of the serverless environment; None: its ``base_environment`` has one.
        dependencies: The requirements (lines for pip) of the serverless environment.
        environment: Further keys of the serverless environment, by name.
        libraries: The libraries of a cluster.
    """

    new_cluster: Mapping[str, Any] | None = None
    existing_cluster_id: str | None = None
    environment_version: str | None = _ENVIRONMENT_VERSION
    dependencies: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    libraries: tuple[Mapping[str, Any], ...] = ()

    @property
    def serverless(self) -> bool:
        """True if the run has serverless compute."""
        return self.new_cluster is None and self.existing_cluster_id is None


@dataclass(frozen=True, slots=True)
class Upload:
    """The place of projects and output in a workspace.

    Attributes:
        kind: The kind of storage.
        path: The folder's path for code that runs in Databricks; empty: a folder in the user's home.
    """

    kind: UploadKind = UploadKind.WORKSPACE
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabricksConfig:
    """The parsed ``backend_config``.

    Attributes:
        profile: A profile of ``~/.databrickscfg``; None: the tracking URI's profile, else databricks-sdk's choice.
        compute: The compute of the runs.
        upload: The place of projects and output.
        task: The kind of task to submit; ``shell_command`` is the one that mlflow submits.
        secret_scope: The secret scope for the secret variables of a run.
        run_name: The run's name in Databricks, without the run id; None: the project's name.
        api_version: The version of the Jobs API.
        passed_on: Further keys of the request, by name.
        task_settings: Further keys of the request's task, by name.
    """

    profile: str | None = None
    compute: Compute = field(default_factory=Compute)
    upload: Upload = field(default_factory=Upload)
    task: TaskKind = TaskKind.PYTHON
    secret_scope: str | None = None
    run_name: str | None = None
    api_version: str = "2.2"
    passed_on: Mapping[str, Any] = field(default_factory=dict)
    task_settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def script_upload(self) -> Upload:
        """The place of the bootstrap script: the user's home, unless the run is somebody else's, who cannot read that.

        Databricks does not run a script at a path below /dbfs.
        """
        is_shared = bool(self.upload.path) and self.upload.kind is not UploadKind.DBFS
        return self.upload if is_shared and "run_as" in self.passed_on else Upload()


def parse_config(config: Mapping[str, Any]) -> DatabricksConfig:
    """Parse ``backend_config``. Blocking: databricks-sdk is imported if it has keys that are passed on.

    Args:
        config: The keys of a cluster, or a mapping with ``new_cluster`` or ``existing_cluster_id``, or one with neither
            for serverless compute.

    Raises:
        UsageError: A key is unknown, or a value is wrong.
    """
    given = copy.deepcopy(dict(config))
    others = {str(key) for key in given} - set(KEYS)
    fields = read_fields() if others or given.get("new_cluster") else _NO_FIELDS
    if others & fields.cluster.keys():
        given = _as_new_cluster(given, fields)
    if "job_clusters" in given:
        raise UsageError(
            "backend_config: job_clusters belong to jobs, and a project is a one-time run: give new_cluster,"
            " existing_cluster_id, or neither for serverless compute"
        )
    known = {*KEYS, *fields.submit, *fields.task, *fields.environment}
    for key in given:
        if key not in known:
            raise UsageError(
                f"backend_config: the key {key!r} is unknown{nearest(str(key), [*known, *fields.cluster])}. Known are"
                f" {', '.join(sorted(known))}; or the keys of a cluster (spark_version, num_workers, node_type_id, …);"
                " a newer databricks-sdk may know more"
            )
    for key, kind in {**fields.submit, **fields.task, **fields.environment}.items():
        check_value(given.get(key), kind, key)
    compute = _compute(given, fields)
    task = _choice(given, "task", TaskKind) or TaskKind.PYTHON
    if task is TaskKind.SHELL_COMMAND and compute.new_cluster is None:
        raise UsageError("backend_config: task 'shell_command' runs on a new cluster only: give new_cluster")
    return DatabricksConfig(
        profile=_text(given, "profile"),
        compute=compute,
        upload=_upload(given),
        task=task,
        secret_scope=_text(given, "secret_scope"),
        run_name=_text(given, "run_name"),
        api_version=_choice(given, "api_version", _ApiVersion) or _ApiVersion.LATEST,
        passed_on=_chosen(given, fields.submit),
        task_settings=_task_settings(given, fields),
    )


def _chosen(given: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: given[key] for key in keys if given.get(key) is not None}


def _task_settings(given: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Return the settings of the task, which takes the variables that the request names."""
    chosen = _chosen(given, fields.task)
    sets = given.get("environment_variables")
    if sets and "environment_variables_key" not in chosen and "environment_variables_key" in fields.task:
        names = [each.get("environment_variables_key") for each in sets]
        if len(names) > 1:
            raise UsageError(
                f"backend_config: environment_variables has {len(names)} entries: name one of them in"
                f" environment_variables_key ({', '.join(map(str, names))})"
            )
        chosen["environment_variables_key"] = names[0]
    return chosen


def _as_new_cluster(given: dict[str, Any], fields: Fields) -> dict[str, Any]:
    if "new_cluster" in given or "existing_cluster_id" in given:
        stray = sorted(fields.cluster.keys() & given.keys())
        raise UsageError(f"backend_config: {', '.join(stray)} belong into new_cluster, which is given, too")
    rest = {key: value for key, value in given.items() if key not in fields.cluster}
    return {"new_cluster": {key: value for key, value in given.items() if key in fields.cluster}, **rest}


def _compute(given: Mapping[str, Any], fields: Fields) -> Compute:
    cluster: dict[str, Any] | None = _value(
        given, "new_cluster", dict, "a cluster such as {'spark_version': …, 'num_workers': 1, …}"
    )
    existing = _text(given, "existing_cluster_id")
    dependencies: list[Any] = (
        _value(given, "dependencies", list, "a list of lines for pip such as ['scikit-learn==1.5']") or []
    )
    libraries: list[Any] = (
        _value(given, "libraries", list, "a list such as [{'pypi': {'package': 'scikit-learn'}}]") or []
    )
    if cluster is not None and existing is not None:
        raise UsageError("backend_config: both new_cluster and existing_cluster_id are given: give one of them")
    if cluster is not None:
        _check_cluster(cluster, fields)
    on_cluster = cluster is not None or existing is not None
    serverless_only = ("dependencies", "environment_version", *fields.environment)
    unfit = [key for key in (serverless_only if on_cluster else ("libraries",)) if key in given]
    if unfit:
        where = (
            "serverless compute only; a cluster takes libraries"
            if on_cluster
            else "clusters only; give new_cluster or existing_cluster_id, or dependencies for serverless compute"
        )
        raise UsageError(f"backend_config: {' and '.join(unfit)} is for {where}")
    for line in dependencies:
        if not isinstance(line, str):
            raise UsageError(f"backend_config: dependencies holds {line!r}: give lines for pip")
    for library in libraries:
        if not isinstance(library, dict) or len(library) != 1:
            raise UsageError(f"backend_config: libraries holds {library!r}: give mappings such as {{'pypi': …}}")
    version, base = given.get("environment_version"), given.get("base_environment")
    if version and base:
        raise UsageError("backend_config: both environment_version and base_environment are given: give one of them")
    return Compute(
        new_cluster=cluster,
        existing_cluster_id=existing,
        environment_version=None if base else str(version or _ENVIRONMENT_VERSION),
        dependencies=tuple(dependencies),
        environment=_chosen(given, fields.environment),
        libraries=tuple(libraries),
    )


def _check_cluster(cluster: Mapping[str, Any], fields: Fields) -> None:
    """Check the keys whose mistakes Databricks reports only minutes later, or in words that do not name them."""
    for key in cluster:
        if key not in fields.cluster:
            hint = nearest(str(key), fields.cluster)
            if hint:
                raise UsageError(f"backend_config: new_cluster: the key {key!r} is unknown{hint}")
        check_value(cluster[key], fields.cluster.get(key), f"new_cluster: {key}")
    if "spark_version" not in cluster and "policy_id" not in cluster:
        raise UsageError(
            "backend_config: new_cluster has no spark_version: give a Databricks Runtime such as"
            " '15.4.x-cpu-ml-scala2.12', or a policy_id that sets it"
        )
    workers = cluster.get("num_workers")
    if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool) or workers < 0):
        raise UsageError(f"backend_config: new_cluster: num_workers is {workers!r}: give a whole number, 0 or more")
    if workers is not None and cluster.get("autoscale") is not None:
        raise UsageError("backend_config: new_cluster has both num_workers and autoscale: give one of them")


def _upload(given: Mapping[str, Any]) -> Upload:
    kind = _choice(given, "upload", UploadKind)
    path = _text(given, "upload_path") or ""
    if path.startswith("dbfs:/Volumes/"):
        path = path.removeprefix("dbfs:")
    elif path.startswith("dbfs:/"):
        path = "/dbfs/" + path.removeprefix("dbfs:").lstrip("/")
    found = next((kind for start, kind in _PREFIXES.items() if path.startswith(start)), None)
    if path and found is None:
        raise UsageError(
            f"backend_config: upload_path is {path!r}: give a folder below /Volumes/<catalog>/<schema>/<volume>,"
            " /Workspace or dbfs:/"
        )
    if ".." in path.split("/"):
        raise UsageError(f"backend_config: upload_path is {path!r}: give it without '..'")
    if found is UploadKind.VOLUME and not re.match(r"/Volumes/[^/]+/[^/]+/[^/]+", path):
        raise UsageError(
            f"backend_config: upload_path is {path!r}: a volume is /Volumes/<catalog>/<schema>/<volume>, or a"
            " folder in it"
        )
    if kind is not None and found is not None and kind != found:
        raise UsageError(
            f"backend_config: upload is {str(kind)!r}, but upload_path is {path!r}, which is a place of another kind"
        )
    if kind is UploadKind.VOLUME and not path:
        raise UsageError("backend_config: upload 'volume' needs upload_path: /Volumes/<catalog>/<schema>/<volume>")
    chosen = found or kind or UploadKind.WORKSPACE
    if chosen is UploadKind.DBFS and not path:
        path = "/dbfs/mlfleet"
    return Upload(chosen, posixpath.normpath(path) if path else "")


def _value(given: Mapping[str, Any], key: str, kind: Callable[..., T], expected: str) -> T | None:
    value = given.get(key)
    if value is not None and type(value) is not kind:
        raise UsageError(f"backend_config: {key} is {value!r}: give {expected}")
    return value


def _text(given: Mapping[str, Any], key: str) -> str | None:
    text = _value(given, key, str, "a string")
    if text is not None and not text.strip():
        raise UsageError(f"backend_config: {key} is empty: give a string, or leave it out")
    return text


def _choice(given: Mapping[str, Any], key: str, choices: type[Chosen]) -> Chosen | None:
    value = given.get(key)
    if value is None:
        return None
    if value not in [str(choice) for choice in choices]:
        raise UsageError(f"backend_config: {key} is {value!r}: give {' or '.join(repr(str(each)) for each in choices)}")
    return choices(value)
