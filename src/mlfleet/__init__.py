"""mlfleet runs MLflow Projects from asyncio: one or hundreds at a time, on this machine or elsewhere.

run = await mlfleet.run_async("examples/quickstart", parameters={"alpha": 0.5})

async with mlfleet.Fleet(max_concurrent=8) as fleet:
runs = [await fleet.submit(uri, parameters={"alpha": alpha}) for alpha in (0.1, 0.2, 0.5)]

mlfleet.run(uri)  # blocking, as mlflow.projects.run
"""

from mlfleet._version import __version__
from mlfleet.api import attach, run_async, submit
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
from mlfleet.runs import JobRef, Outcome, RunEvent, RunStatus, Stage, SubmittedRun, Timeouts
from mlfleet.supervision import FleetRun
from mlfleet.sync import BlockingRun, run

__all__ = [
    "BackendError",
    "BackendNotFound",
    "BlockingRun",
    "EnvironmentSetupError",
    "ExecutionException",
    "FetchError",
    "Fleet",
    "FleetRun",
    "JobRef",
    "MlfleetError",
    "Outcome",
    "ParameterError",
    "RunCancelled",
    "RunEvent",
    "RunLost",
    "RunStatus",
    "RunTimeout",
    "SpecError",
    "Stage",
    "SubmitError",
    "SubmittedRun",
    "Timeouts",
    "TrackingError",
    "UsageError",
    "__version__",
    "attach",
    "run",
    "run_async",
    "submit",
]
