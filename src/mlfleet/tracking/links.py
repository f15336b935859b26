"""Addresses of runs in MLflow's user interface."""

from __future__ import annotations

import os
from urllib.parse import quote

__all__ = ["run_url"]


def run_url(tracking: str, experiment_id: str, run_id: str) -> str | None:
    """Return the address of a run's page, in the workspace of ``MLFLOW_WORKSPACE``; None without a server.

    Args:
        tracking: The tracking URI, without credentials.
        experiment_id: The id of the run's experiment.
        run_id: The id of the run.
    """
    if not tracking.startswith(("http://", "https://")):
        return None
    workspace = os.environ.get("MLFLOW_WORKSPACE", "").strip()
    query = f"?workspace={quote(workspace, safe='')}" if workspace else ""
    return f"{tracking.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}{query}"
