"""Sweeps: many runs of one project, driven, recorded and resumed together."""

from mlfleet._sweeps.record import NAME_TAG, SPACE_TAG, STOPPED_TAG, is_driven
from mlfleet._sweeps.results import Goal, PointResult, SweepCounts, SweepResult
from mlfleet._sweeps.settings import GIVE_UP_AFTER, OnFailure, Resume, Retry, SweepOptions, SweepSettings
from mlfleet._sweeps.sweep import Sweep

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
