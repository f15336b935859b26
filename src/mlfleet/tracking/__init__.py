"""MLflow tracking: runs with their parameters, tags, status and artifacts, on a server or in a store."""

from __future__ import annotations

import os

from mlfleet.tracking.auth import Credentials
from mlfleet.tracking.base import RunInfo, Tracking
from mlfleet.tracking.databricks import is_databricks
from mlfleet.tracking.embedded import EmbeddedTracking, default_uri
from mlfleet.tracking.http import POLICY
from mlfleet.tracking.locations import split_uri
from mlfleet.tracking.rest import RestTracking

__all__ = [
    "Credentials",
    "EmbeddedTracking",
    "RestTracking",
    "RunInfo",
    "Tracking",
    "default_uri",
    "open_tracking",
]


def open_tracking(uri: str | os.PathLike[str] | None = None, *, retry_for: float = POLICY.seconds) -> Tracking:
    """Return the tracking for a URI, for use in ``async with``. Nothing is read or requested before that.

    Args:
        uri: ``http(s)://…`` of an MLflow server, ``databricks``, ``databricks://<profile>``, or any store that mlflow
            itself can open (``sqlite:///…``, ``postgresql://…``, a folder); None: ``MLFLOW_TRACKING_URI``, else
            `default_uri`.
        retry_for: Seconds for which a call keeps trying.

    Raises:
        UsageError: The URI or a number makes no sense.
    """
    chosen = os.fspath(uri) if uri is not None else os.environ.get("MLFLOW_TRACKING_URI")
    if not chosen:
        return EmbeddedTracking(retry_for=retry_for)
    if is_databricks(chosen) or split_uri(chosen).scheme.lower() in ("http", "https"):
        return RestTracking(chosen, retry_for=retry_for)
    return EmbeddedTracking(chosen, retry_for=retry_for)
