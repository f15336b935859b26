"""What is told to MLflow: runs, their parameters, tags and status, and what they read from it."""

from mlfleet.tracking.auth import Credentials
from mlfleet.tracking.base import RunInfo, Tracking
from mlfleet.tracking.embedded import EmbeddedTracking, default_uri
from mlfleet.tracking.resolve import open_tracking
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
