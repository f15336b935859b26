"""The HTML report about a sweep, made from tracking alone."""

from mlfleet._reporting.page import render
from mlfleet._reporting.sweep import ReportedRun, SweepReport, find_sweep, load_report, load_sweep

__all__ = ["ReportedRun", "SweepReport", "find_sweep", "load_report", "load_sweep", "render"]
