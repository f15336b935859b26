"""A sweep as one page of HTML, made of what tracking knows."""

from mlfleet._reporting.links import run_url
from mlfleet._reporting.page import render
from mlfleet._reporting.sweep import ReportedRun, SweepReport, find_sweep, load_sweep

__all__ = ["ReportedRun", "SweepReport", "find_sweep", "load_sweep", "render", "run_url"]
