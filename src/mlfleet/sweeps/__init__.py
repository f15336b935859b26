"""Sweeps: many runs of one project as one thing."""

from mlfleet.sweeps.record import NAME_TAG, SPACE_TAG, STOPPED_TAG, is_driven
from mlfleet.sweeps.results import Goal, PointResult, SweepCounts, SweepResult
from mlfleet.sweeps.retry import Retry
from mlfleet.sweeps.settings import GIVE_UP_AFTER, OnFailure, Resume, SweepOptions, SweepSettings
from mlfleet.sweeps.sweep import Sweep

__all__ = [
    "GIVE_UP_AFTER",
    "NAME_TAG",
    "SPACE_TAG",
    "STOPPED_TAG",
    "Goal",
    "OnFailure",
    "PointResult",
    "Resume",
    "Retry",
    "Sweep",
    "SweepCounts",
    "SweepOptions",
    "SweepResult",
    "SweepSettings",
    "is_driven",
]
