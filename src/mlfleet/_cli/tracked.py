"""Which experiment a command of the command line means."""

from __future__ import annotations

import os

import click

from mlfleet.tracking import Tracking

__all__ = ["experiment"]


async def experiment(tracking: Tracking, name: str | None, experiment_id: str | None) -> str:
    """The id of the experiment: as given, else by the environment, else the default one, as for a run.

    Raises:
        click.UsageError: both are given.
        TrackingError: tracking cannot be reached.
    """
    if name and experiment_id:
        raise click.UsageError("both --experiment-name and --experiment-id are given: give one of them")
    if experiment_id:
        return experiment_id
    chosen = name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if chosen:
        return await tracking.experiment_id(chosen)
    return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
