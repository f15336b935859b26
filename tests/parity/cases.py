"""All cases."""

from __future__ import annotations

from parity import of_docker, of_parameters, of_projects, of_runs

__all__ = ["CASES"]

CASES = [*of_projects.CASES, *of_parameters.CASES, *of_runs.CASES, *of_docker.CASES]
