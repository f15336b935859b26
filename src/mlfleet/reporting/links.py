"""Where a run can be looked at."""

from __future__ import annotations

__all__ = ["run_url"]


def run_url(tracking: str, experiment_id: str, run_id: str) -> str | None:
    """The page of a run on its server; None for a store without one.

    Args:
        tracking: the tracking URI, without credentials.
        experiment_id: of the run.
        run_id: of the run.
    """
    if not tracking.startswith(("http://", "https://")):
        return None
    return f"{tracking.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
