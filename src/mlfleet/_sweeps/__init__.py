"""Sweeps: many runs of one project, driven, recorded and resumed together."""

from mlfleet._engine.request import NAME_TAG, SPACE_TAG
from mlfleet._sweeps.record import is_driven
from mlfleet._sweeps.report import Report
from mlfleet._sweeps.results import PointResult, SweepCounts, SweepResult, rank
from mlfleet._sweeps.settings import GIVE_UP_AFTER, OnFailure, Resume, Retry, SweepOptions, SweepSettings
from mlfleet._sweeps.sweep import Sweep
from mlfleet._sweeps.tracked import track

__all__ = [
    "GIVE_UP_AFTER",
    "NAME_TAG",
    "SPACE_TAG",
    "OnFailure",
    "PointResult",
    "Report",
    "Resume",
    "Retry",
    "Sweep",
    "SweepCounts",
    "SweepOptions",
    "SweepResult",
    "SweepSettings",
    "is_driven",
    "rank",
    "track",
]
