"""Where a run can be looked at."""

from __future__ import annotations

import os
from urllib.parse import quote

__all__ = ["run_url"]


def run_url(tracking: str, experiment_id: str, run_id: str) -> str | None:
    """The page of a run on its server, in the workspace of ``MLFLOW_WORKSPACE``; None for a store without a server.

    Args:
        tracking: the tracking URI, without credentials.
        experiment_id: of the run.
        run_id: of the run.
    """
    if not tracking.startswith(("http://", "https://")):
        return None
    workspace = os.environ.get("MLFLOW_WORKSPACE", "").strip()
    query = f"?workspace={quote(workspace, safe='')}" if workspace else ""
    return f"{tracking.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}{query}"
