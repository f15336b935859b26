"""Which tracking a URI means."""

from __future__ import annotations

import os

from mlfleet.tracking.base import Tracking
from mlfleet.tracking.databricks import is_databricks
from mlfleet.tracking.embedded import EmbeddedTracking
from mlfleet.tracking.locations import split_uri
from mlfleet.tracking.rest import RestTracking
from mlfleet.tracking.retry import RETRY_FOR

__all__ = ["open_tracking"]


def open_tracking(uri: str | os.PathLike[str] | None = None, *, retry_for: float = RETRY_FOR) -> Tracking:
    """The tracking that `uri` means, to be used inside ``async with``. Nothing is read or asked before that.

    Args:
        uri: ``http(s)://…`` of an MLflow server, ``databricks``, ``databricks://<profile>``, or any store that mlflow
            itself can open (``sqlite:///…``, ``postgresql://…``, a folder); None: ``MLFLOW_TRACKING_URI``, else
            `default_uri`.
        retry_for: seconds for which a call keeps trying.

    Raises:
        UsageError: the URI makes no sense.
    """
    chosen = os.fspath(uri) if uri is not None else os.environ.get("MLFLOW_TRACKING_URI")
    if not chosen:
        return EmbeddedTracking(retry_for=retry_for)
    if is_databricks(chosen) or split_uri(chosen).scheme.lower() in ("http", "https"):
        return RestTracking(chosen, retry_for=retry_for)
    return EmbeddedTracking(chosen, retry_for=retry_for)
