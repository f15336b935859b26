"""MLflow's JSON for runs, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

from mlfleet.errors import TrackingError
from mlfleet.runs import RunStatus
from mlfleet.tracking.base import RunInfo

__all__ = [
    "BATCH_LIMIT",
    "SUBMISSION_TAG",
    "Lengths",
    "batches",
    "deleted_experiment",
    "pairs",
    "run_info",
    "shortened",
]

SUBMISSION_TAG = "mlfleet.submission"
"""The tag with a number used once, by which a run is found again whose creation was not answered."""

BATCH_LIMIT = 100
"""Parameters, and likewise tags, in one request of ``runs/log-batch``."""

Lengths = tuple[int, int]
"""The longest value of a parameter, and of a tag."""


def run_info(raw: Mapping[str, Any]) -> RunInfo:
    """A run as the API tells it.

    Raises:
        TrackingError: it is no run.
    """
    try:
        info, data = raw["info"], raw.get("data") or {}
        tags = {str(tag["key"]): str(tag.get("value", "")) for tag in data.get("tags") or ()}
        return RunInfo(
            # MLflow 1 says run_uuid.
            run_id=str(info.get("run_id") or info["run_uuid"]),
            experiment_id=str(info["experiment_id"]),
            name=str(info.get("run_name") or tags.get("mlflow.runName", "")),
            status=RunStatus(info["status"]),
            artifact_uri=str(info.get("artifact_uri", "")),
            tags=tags,
            params={str(param["key"]): str(param.get("value", "")) for param in data.get("params") or ()},
            metrics={str(metric["key"]): _float(metric.get("value", 0)) for metric in data.get("metrics") or ()},
            start_time=_time(info.get("start_time")),
            end_time=_time(info.get("end_time")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrackingError(
            f"the tracking server described a run in a way that is not understood: {error!r}"
        ) from error


def deleted_experiment(name: str, experiment_id: str) -> TrackingError:
    """An experiment of that name was deleted, which keeps its name from being used."""
    return TrackingError(
        f"the experiment {name!r} was deleted: restore it (mlflow experiments restore -x {experiment_id}), or take "
        "another name",
        code="RESOURCE_ALREADY_EXISTS",
    )


def pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    """`values` as the API wants them."""
    return [{"key": key, "value": value} for key, value in values.items()]


def batches(params: Mapping[str, str], tags: Mapping[str, str]) -> list[tuple[dict[str, str], dict[str, str]]]:
    """`params` and `tags` in parts that one request can take; none for nothing."""
    left, right = iter(params.items()), iter(tags.items())
    count = math.ceil(max(len(params), len(tags)) / BATCH_LIMIT)
    return [(dict(islice(left, BATCH_LIMIT)), dict(islice(right, BATCH_LIMIT))) for _ in range(count)]


def shortened(
    params: Mapping[str, str], tags: Mapping[str, str], lengths: Lengths
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """`params` and `tags` with values no longer than `lengths`, and the names of those that were cut."""
    longest_param, longest_tag = lengths
    cut = [name for name, value in params.items() if len(value) > longest_param]
    cut += [name for name, value in tags.items() if len(value) > longest_tag]
    return (
        {name: value[:longest_param] for name, value in params.items()},
        {name: value[:longest_tag] for name, value in tags.items()},
        cut,
    )


def _time(value: Any) -> int | None:
    # A run that has not ended has 0 there, or nothing; servers may write whole numbers as text.
    return int(value) or None if value is not None else None


def _float(value: Any) -> float:
    # JSON has no NaN: MLflow writes it, and the infinities, as text.
    return float(value) if value is not None else math.nan
