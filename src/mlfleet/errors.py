"""Every error that mlfleet raises.

    MlfleetError
    ├── UsageError               the call: arguments that contradict each other, an unknown option
    ├── FleetFull                the queue of the Fleet is full
    ├── SpecError                a file of the project or of the configuration: MLproject, python_env.yaml, …
    ├── ParameterError           the parameters of a run: missing, not a number, no such file
    ├── FetchError               the project or a parameter's file cannot be fetched
    ├── EnvironmentSetupError    the environment cannot be built
    ├── BackendError
    │   ├── BackendNotFound      a backend of that name is not installed
    │   ├── SubmitError          the backend did not accept the run
    │   └── RunLost              the backend does not know the run any more
    ├── TrackingError            the tracking server or store
    └── ExecutionException       a run that failed
        ├── RunTimeout           … because it exceeded a time limit
        └── RunCancelled         … because it was cancelled

``ExecutionException`` means that a run was made and did not finish well; the other errors mean that something could not
be done. It has the name of MLflow's own error (``mlflow.exceptions.ExecutionException``).

The fields of every error have defaults and are set by keyword, so that errors survive pickling (process pools).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "BackendError",
    "BackendNotFound",
    "EnvironmentSetupError",
    "ExecutionException",
    "FetchError",
    "FleetFull",
    "MlfleetError",
    "ParameterError",
    "RunCancelled",
    "RunLost",
    "RunTimeout",
    "SpecError",
    "SubmitError",
    "TrackingError",
    "UsageError",
]


class MlfleetError(Exception):
    """The base class of all errors of mlfleet. The message says what was wrong, where, and what to do."""


class UsageError(MlfleetError, ValueError):
    """The call is wrong: arguments that contradict each other, an unknown name, a value out of range."""


class FleetFull(MlfleetError):
    """The queue of the Fleet is full, or has no more room for the run's group. No run was made.

    Attributes:
        queued: The number of runs that wait in the queue.
        limit: The number that may: ``Fleet(max_queued=…)``.
    """

    def __init__(self, message: str, *, queued: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.queued = queued
        self.limit = limit


class SpecError(MlfleetError):
    """A file that describes the project or its configuration is wrong.

    Attributes:
        message: The message without the place.
        path: The file; None if the text is not from a file.
        line: The line, counted from 1; None if it is unknown.
        column: The column, counted from 1; None if it is unknown.
    """

    def __init__(
        self, message: str, *, path: Path | str | None = None, line: int | None = None, column: int | None = None
    ) -> None:
        places = {"": path, "line ": line, "column ": column}
        place = ", ".join(f"{name}{value}" for name, value in places.items() if value is not None)
        super().__init__(f"{place}: {message}" if place else message)
        self.message = message
        self.path = path
        self.line = line
        self.column = column

    def __reduce__(self) -> tuple[object, ...]:
        # The message already contains the place; __init__ would add it again.
        return (_restore, (type(self), self.args, self.__dict__))


class ParameterError(MlfleetError):
    """Parameters of a run are missing or wrong.

    Attributes:
        names: The names of the parameters that are missing or wrong.
    """

    def __init__(self, message: str, *, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


class FetchError(MlfleetError):
    """A project, or the file of a ``path`` parameter, cannot be fetched.

    Attributes:
        uri: The URI of the project or file, without credentials.
    """

    def __init__(self, message: str, *, uri: str | None = None) -> None:
        super().__init__(message)
        self.uri = uri


class EnvironmentSetupError(MlfleetError):
    """The environment of a project cannot be built. Nothing of the attempt is left on disk.

    Attributes:
        manager: The environment manager: ``virtualenv``, ``uv``, ``conda`` or ``local``.
        output: The last lines that the build printed.
    """

    def __init__(self, message: str, *, manager: str | None = None, output: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.manager = manager
        self.output = tuple(output)


class BackendError(MlfleetError):
    """A backend could not carry out an operation.

    Attributes:
        backend: The name of the backend.
    """

    def __init__(self, message: str, *, backend: str | None = None) -> None:
        super().__init__(message)
        self.backend = backend


class BackendNotFound(BackendError):
    """A backend of that name is not installed, or its optional dependencies are missing."""


class SubmitError(BackendError):
    """The backend did not accept the run."""


class RunLost(BackendError):
    """The backend does not know the run any more, and its end was not observed."""


class TrackingError(MlfleetError):
    """The tracking server or store refused a request, or cannot be reached.

    Attributes:
        uri: The tracking URI, without credentials.
        status: The HTTP status of the response; None if there was none.
        code: MLflow's error code, such as ``RESOURCE_DOES_NOT_EXIST``; None if there was none.
    """

    def __init__(
        self, message: str, *, uri: str | None = None, status: int | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.uri = uri
        self.status = status
        self.code = code


class ExecutionException(MlfleetError):
    """A run failed or was cancelled.

    Attributes:
        run_id: The id of the MLflow run.
        exit_code: The exit code of the project's process, negative for a signal; None if the process did not start.
        reason: The reason in a few words: ``exit code 3``, ``out of memory``, ``the environment cannot be built``.
        output: The last lines that the run printed; empty if its output was not captured.
    """

    def __init__(
        self,
        message: str,
        *,
        run_id: str | None = None,
        exit_code: int | None = None,
        reason: str | None = None,
        output: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.run_id = run_id
        self.exit_code = exit_code
        self.reason = reason
        self.output = tuple(output)


class RunTimeout(ExecutionException):
    """A run was ended because it exceeded a time limit.

    Attributes:
        stage: The stage whose limit was exceeded: ``queue``, ``setup`` or ``run``.
        seconds: The limit in seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        run_id: str | None = None,
        exit_code: int | None = None,
        reason: str | None = None,
        output: Sequence[str] = (),
        stage: str | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__(message, run_id=run_id, exit_code=exit_code, reason=reason, output=output)
        self.stage = stage
        self.seconds = seconds


class RunCancelled(ExecutionException):
    """A run was cancelled before its end, by ``cancel()``, by its Fleet or by an interrupt."""


def _restore(cls: type[MlfleetError], args: tuple[object, ...], state: dict[str, object]) -> MlfleetError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error
