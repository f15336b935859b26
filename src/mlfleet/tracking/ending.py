"""The one truthful terminal status of an MLflow run."""

from __future__ import annotations

import asyncio
import time

from mlfleet.errors import TrackingError
from mlfleet.runs import RunStatus
from mlfleet.tracking.base import RunInfo, Tracking

__all__ = ["end_run"]

# Seconds for a last try that began within the patience.
_LAST_TRY = 30.0


async def end_run(tracking: Tracking, run_id: str, status: RunStatus, *, patience: float) -> RunInfo:
    """Write a terminal status, unless the run's own code has ended the run already.

    Args:
        tracking: where the run is.
        run_id: of the run.
        status: the terminal one.
        patience: seconds for which each request is tried again while tracking cannot be reached.

    Returns:
        The run as it was right before: its own tags, parameters and metrics are all there.

    Raises:
        TrackingError: tracking could not be told in time.
    """
    end_time = int(time.time() * 1000)
    try:
        async with asyncio.timeout(2 * patience + _LAST_TRY):
            info = await tracking.get_run(run_id, retry_for=patience)
            if not info.status.is_terminal:
                await tracking.update_run(run_id, status, end_time=end_time, retry_for=patience)
            return info
    except TimeoutError as error:
        raise TrackingError("no answer in time", uri=tracking.uri) from error
