"""mlfleet runs MLflow Projects from asyncio: one or hundreds at a time, on this machine or elsewhere.

One run, many, and blocking as ``mlflow.projects.run``::

    run = await mlfleet.run_async("examples/quickstart", parameters={"alpha": 0.5})

    async with mlfleet.Fleet(max_concurrent=8) as fleet:
        runs = [await fleet.submit(uri, parameters={"alpha": alpha}) for alpha in (0.1, 0.2, 0.5)]

    mlfleet.run(uri)
"""

from mlfleet._engine.run import FleetRun
from mlfleet._sweeps import PointResult, Retry, Sweep, SweepCounts, SweepResult
from mlfleet._version import __version__
from mlfleet.api import attach, run_async, submit, sweep_async
from mlfleet.errors import (
    BackendError,
    BackendNotFound,
    EnvironmentSetupError,
    ExecutionException,
    FetchError,
    MlfleetError,
    ParameterError,
    RunCancelled,
    RunLost,
    RunTimeout,
    SpecError,
    SubmitError,
    TrackingError,
    UsageError,
)
from mlfleet.fleet import Fleet
from mlfleet.resources import Resources
from mlfleet.runs import FailureKind, JobRef, Outcome, RunEvent, RunStatus, Stage, SubmittedRun, Timeouts
from mlfleet.spaces import choice, grid, loguniform, normal, randint, rows, sample, uniform, zip_
from mlfleet.sync import BlockingRun, run, sweep

__all__ = [
    "BackendError",
    "BackendNotFound",
    "BlockingRun",
    "EnvironmentSetupError",
    "ExecutionException",
    "FailureKind",
    "FetchError",
    "Fleet",
    "FleetRun",
    "JobRef",
    "MlfleetError",
    "Outcome",
    "ParameterError",
    "PointResult",
    "Resources",
    "Retry",
    "RunCancelled",
    "RunEvent",
    "RunLost",
    "RunStatus",
    "RunTimeout",
    "SpecError",
    "Stage",
    "SubmitError",
    "SubmittedRun",
    "Sweep",
    "SweepCounts",
    "SweepResult",
    "Timeouts",
    "TrackingError",
    "UsageError",
    "__version__",
    "attach",
    "choice",
    "grid",
    "loguniform",
    "normal",
    "randint",
    "rows",
    "run",
    "run_async",
    "sample",
    "submit",
    "sweep",
    "sweep_async",
    "uniform",
    "zip_",
]
