"""The keys of Databricks' requests, as databricks-sdk has them: a key that the installed SDK knows is known here."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from mlfleet._text.documents import nearest
from mlfleet.errors import UsageError

__all__ = ["Fields", "check_value", "read_fields"]

# What mlfleet itself sets, or what has no meaning for the one task of a run.
_OWN_SUBMIT = {"environments", "idempotency_token", "return", "run_name", "tasks"}
_OWN_TASK = {"depends_on", "environment_key", "existing_cluster_id", "libraries", "new_cluster", "run_if", "task_key"}
_OWN_ENVIRONMENT = {"client", "dependencies", "environment_version"}
# The API takes them for longer than databricks-sdk knows them (0.140).
_OLDER_SUBMIT = {"performance_target": str, "usage_policy_id": str}


@dataclass(frozen=True, slots=True)
class Fields:
    """The keys of ``runs/submit`` that a user may give, each with the type of its value.

    Attributes:
        submit: The keys of the request itself.
        task: The keys of its task.
        environment: The keys of the environment of serverless compute.
        cluster: The keys of a new cluster.
    """

    submit: Mapping[str, Any]
    task: Mapping[str, Any]
    environment: Mapping[str, Any]
    cluster: Mapping[str, Any]


@cache
def read_fields() -> Fields:
    """Return the keys that the installed databricks-sdk knows. Blocking: importing it takes half a second.

    Raises:
        UsageError: It is not installed.
    """
    try:
        from databricks.sdk.service import compute, jobs
    except ImportError as error:
        raise UsageError(
            f"backend_config cannot be checked without databricks-sdk: {error}. To do: pip install"
            " 'mlfleet[databricks]'"
        ) from error
    submit = {**_OLDER_SUBMIT, **_without(get_type_hints(jobs.JobsAPI.submit), _OWN_SUBMIT)}
    task = {
        name: kind
        for name, kind in _without(get_type_hints(jobs.SubmitTask), _OWN_TASK | submit.keys()).items()
        if not name.endswith("_task")
    }
    environment = _without(get_type_hints(compute.Environment), _OWN_ENVIRONMENT)
    return Fields(submit, task, environment, get_type_hints(compute.ClusterSpec))


def check_value(value: object, kind: Any, place: str) -> None:
    """Check the keys in a value, at any depth. Values that have no keys are left to Databricks.

    Args:
        value: The value.
        kind: Its type, as databricks-sdk annotates it.
        place: The place of the value in ``backend_config``, for messages.

    Raises:
        UsageError: A key is unknown, or the value is no mapping or no list where one belongs.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if value is None:
        return
    if origin in (Union, types.UnionType):
        check_value(value, next(each for each in arguments if each is not type(None)), place)
    elif origin is list:
        if not isinstance(value, list):
            raise UsageError(f"backend_config: {place} is {_shown(value)}: give a list")
        for index, item in enumerate(value):
            if item is None:
                raise UsageError(f"backend_config: {place}[{index}] is null: give a value, or leave it out")
            check_value(item, arguments[0], f"{place}[{index}]")
    elif origin is dict or dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UsageError(f"backend_config: {place} is {_shown(value)}: give a mapping")
        hints = get_type_hints(kind) if origin is None else None
        for key, each in value.items():
            if hints is not None and key not in hints:
                raise UsageError(
                    f"backend_config: {place}: the key {key!r} is unknown{nearest(str(key), hints)}. Known are"
                    f" {', '.join(sorted(hints))}; a newer databricks-sdk may know more"
                )
            check_value(each, arguments[1] if hints is None else hints[key], f"{place}: {key}")


def _without(hints: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: kind for name, kind in hints.items() if name not in names}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
