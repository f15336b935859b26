"""Runs as mlfleet sees them, and MLflow's JSON for them."""

from __future__ import annotations

import getpass
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

from mlfleet.errors import TrackingError
from mlfleet.runs import RunStatus

__all__ = [
    "BATCH_LIMIT",
    "SUBMISSION_TAG",
    "Lengths",
    "RunInfo",
    "batches",
    "checked_id",
    "deleted_experiment",
    "pairs",
    "run_info",
    "shortened",
    "user_name",
]

SUBMISSION_TAG = "mlfleet.submission"
"""The tag with a number used once, by which a run is found again whose creation was not answered."""

BATCH_LIMIT = 100
"""The number of parameters, and also of tags, that one request of ``runs/log-batch`` may hold."""

Lengths = tuple[int, int]
"""The longest value of a parameter, and of a tag, in characters."""

# MLflow's own rule for ids of runs (mlflow.utils.validation.RUN_ID_REGEX), in ASCII.
_is_id = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,255}").fullmatch


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run as the tracking server knows it.

    Attributes:
        run_id: The id of the run.
        experiment_id: The id of its experiment.
        name: The name of the run.
        status: The status that the server holds.
        artifact_uri: The URI of the run's artifacts.
        tags: All tags of the run.
        params: All parameters of the run.
        metrics: The latest value of each metric of the run.
        start_time: The time of its creation, in milliseconds since the epoch; None if that is not known.
        end_time: The time of its end, in milliseconds since the epoch; None as long as it has not ended.
        deleted: True if the run is in MLflow's trash, where nothing can be written to it.
    """

    run_id: str
    experiment_id: str
    name: str
    status: RunStatus
    artifact_uri: str
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    start_time: int | None = None
    end_time: int | None = None
    deleted: bool = False


def checked_id(value: object) -> str:
    """Return the id of a run or an experiment as a server or store gave it.

    Ids become parts of paths and commands, so one that could mean another place is not used.

    Raises:
        TrackingError: The id has other characters than those of MLflow's ids.
    """
    text = str(value)
    if not _is_id(text):
        raise TrackingError(
            f"the tracking server gave {text[:100]!r} as an id: ids consist of letters, digits, '-' and '_'"
        )
    return text


def run_info(raw: Mapping[str, Any]) -> RunInfo:
    """Return a run from the API's JSON.

    Raises:
        TrackingError: The JSON does not describe a run.
    """
    try:
        info, data = raw["info"], raw.get("data") or {}
        tags = {str(tag["key"]): str(tag.get("value", "")) for tag in data.get("tags") or ()}
        return RunInfo(
            # MLflow 1 says run_uuid.
            run_id=checked_id(info.get("run_id") or info["run_uuid"]),
            experiment_id=checked_id(info["experiment_id"]),
            name=str(info.get("run_name") or tags.get("mlflow.runName", "")),
            status=RunStatus(info["status"]),
            artifact_uri=str(info.get("artifact_uri", "")),
            tags=tags,
            params={str(param["key"]): str(param.get("value", "")) for param in data.get("params") or ()},
            metrics={str(metric["key"]): _float(metric.get("value", 0)) for metric in data.get("metrics") or ()},
            start_time=_time(info.get("start_time")),
            end_time=_time(info.get("end_time")),
            deleted=info.get("lifecycle_stage") == "deleted",
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrackingError(
            f"the tracking server described a run in a way that is not understood: {error!r}"
        ) from error


def deleted_experiment(name: str, experiment_id: str) -> TrackingError:
    """Return the error for an experiment that was deleted, whose name cannot be used until it is restored."""
    return TrackingError(
        f"the experiment {name!r} was deleted: restore it (mlflow experiments restore -x {experiment_id}), or take "
        "another name",
        code="RESOURCE_ALREADY_EXISTS",
    )


@cache
def user_name() -> str:
    """Return the name of this process's user. The first call may read a file: call it in a thread."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # the uid of a container need not have a name
        return "unknown"


def pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    """Return `values` in the form of the API."""
    return [{"key": key, "value": value} for key, value in values.items()]


def batches(params: Mapping[str, str], tags: Mapping[str, str]) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Split `params` and `tags` into parts that fit into one request each; none if both are empty."""
    left, right = iter(params.items()), iter(tags.items())
    count = math.ceil(max(len(params), len(tags)) / BATCH_LIMIT)
    return [(dict(islice(left, BATCH_LIMIT)), dict(islice(right, BATCH_LIMIT))) for _ in range(count)]


def shortened(
    params: Mapping[str, str], tags: Mapping[str, str], lengths: Lengths
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Cut the values of `params` and `tags` to `lengths`; returns both, and the names of those that were cut."""
    longest_param, longest_tag = lengths
    cut = [name for name, value in params.items() if len(value) > longest_param]
    cut += [name for name, value in tags.items() if len(value) > longest_tag]
    return (
        {name: value[:longest_param] for name, value in params.items()},
        {name: value[:longest_tag] for name, value in tags.items()},
        cut,
    )


def _time(value: Any) -> int | None:
    # A run that has not ended has 0 there, or nothing; protobuf writes 64-bit numbers as text.
    return int(value) or None if value is not None else None


def _float(value: Any) -> float:
    # JSON has no NaN: MLflow writes it, and the infinities, as text.
    return float(value) if value is not None else math.nan
