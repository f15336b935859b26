"""mlfleet runs MLflow Projects from asyncio: one or hundreds at a time, on this machine or elsewhere.

Run one project, many in a `Fleet`, or block as ``mlflow.projects.run`` does::

    run = await mlfleet.run_async("examples/quickstart", parameters={"alpha": 0.5})

    async with mlfleet.Fleet(max_concurrent=8) as fleet:
        runs = [await fleet.submit(uri, parameters={"alpha": alpha}) for alpha in (0.1, 0.2, 0.5)]

    mlfleet.run(uri)
"""

from mlfleet._concurrency.broadcast import Subscription
from mlfleet._engine.options import Goal
from mlfleet._engine.request import Output, RunOptions
from mlfleet._engine.run import FleetRun
from mlfleet._engine.tracked import TrackedRun
from mlfleet._sweeps import (
    OnFailure,
    PointResult,
    Report,
    Resume,
    Retry,
    Sweep,
    SweepCounts,
    SweepOptions,
    SweepResult,
)
from mlfleet._text.lines import LogLine
from mlfleet._version import __version__
from mlfleet.api import attach, get, run_async, submit, sweep_async
from mlfleet.errors import (
    BackendError,
    BackendNotFound,
    EnvironmentSetupError,
    ExecutionException,
    FetchError,
    FleetFull,
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
from mlfleet.runs import FailureKind, FleetCounts, JobRef, Outcome, RunEvent, RunStatus, Stage, SubmittedRun, Timeouts
from mlfleet.settings import Settings, read_settings
from mlfleet.spaces import (
    Distribution,
    Point,
    Points,
    Space,
    choice,
    grid,
    loguniform,
    normal,
    randint,
    rows,
    sample,
    uniform,
    zip_,
)
from mlfleet.sync import BlockingRun, run, sweep

__all__ = [
    "BackendError",
    "BackendNotFound",
    "BlockingRun",
    "Distribution",
    "EnvironmentSetupError",
    "ExecutionException",
    "FailureKind",
    "FetchError",
    "Fleet",
    "FleetCounts",
    "FleetFull",
    "FleetRun",
    "Goal",
    "JobRef",
    "LogLine",
    "MlfleetError",
    "OnFailure",
    "Outcome",
    "Output",
    "ParameterError",
    "Point",
    "PointResult",
    "Points",
    "Report",
    "Resources",
    "Resume",
    "Retry",
    "RunCancelled",
    "RunEvent",
    "RunLost",
    "RunOptions",
    "RunStatus",
    "RunTimeout",
    "Settings",
    "Space",
    "SpecError",
    "Stage",
    "SubmitError",
    "SubmittedRun",
    "Subscription",
    "Sweep",
    "SweepCounts",
    "SweepOptions",
    "SweepResult",
    "Timeouts",
    "TrackedRun",
    "TrackingError",
    "UsageError",
    "__version__",
    "attach",
    "choice",
    "get",
    "grid",
    "loguniform",
    "normal",
    "randint",
    "read_settings",
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
