"""Finds runs by the id of the MLflow run in their names."""

from __future__ import annotations

import re
import time
from typing import Any

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet.backends.databricks.client import Workspace

__all__ = ["RecentRuns"]

_FRESH = 20.0  # seconds for which a listing serves all who attach
_MOST = 400  # pages of a listing: Databricks keeps runs for 60 days
_NAME = re.compile(r"\(([0-9a-f]{32})\)$")


class RecentRuns:
    """What ``runs/list`` tells of the runs that mlfleet submitted. One listing serves many who look at a time."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._listing: SingleFlight[str, None] = SingleFlight()
        self._found: dict[str, dict[str, Any]] = {}
        self._listed_at = float("-inf")

    async def find(self, run_id: str) -> dict[str, Any] | None:
        """The latest run of that MLflow run, as ``runs/get`` tells it; None if there is none."""
        if run_id not in self._found or time.monotonic() - self._listed_at > _FRESH:
            await self._listing("", self._list)
        listed = self._found.get(run_id)
        if listed is None:
            return None
        return await self._workspace.jobs("GET", "runs/get", params={"run_id": str(listed["run_id"])})

    async def _list(self) -> None:
        params = {"run_type": "SUBMIT_RUN", "limit": "25", "expand_tasks": "false"}
        found: dict[str, dict[str, Any]] = {}
        for _ in range(_MOST):
            page = await self._workspace.jobs("GET", "runs/list", params=params)
            for run in page.get("runs") or []:
                match = _NAME.search(str(run.get("run_name") or ""))
                if match is not None:
                    latest = found.setdefault(match[1], run)
                    if int(run.get("run_id") or 0) > int(latest["run_id"]):
                        found[match[1]] = run
            token = page.get("next_page_token")
            if not token:
                break
            params = {**params, "page_token": str(token)}
        self._found, self._listed_at = found, time.monotonic()
