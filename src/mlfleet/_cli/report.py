"""What ``mlfleet run`` says at its end, to people and to machines."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Mapping
from typing import Any

import click

from mlfleet._cli.running import RunCommand
from mlfleet._cli.terminal import complain, say
from mlfleet._reporting import run_url
from mlfleet._text.masking import MASK
from mlfleet.errors import BackendNotFound, FetchError, MlfleetError, ParameterError, SpecError, UsageError
from mlfleet.runs import RunStatus
from mlfleet.tracking import RunInfo

__all__ = ["error_as_json", "exit_code", "print_json", "run_as_json", "tell", "where_to_look"]

_log = logging.getLogger("mlfleet.cli")
_MISTAKES = (UsageError, SpecError, ParameterError, FetchError, BackendNotFound)


def exit_code(error: MlfleetError | None, received: signal.Signals | None = None) -> int:
    """0 if all went well, 2 for what the caller can mend, 1 for other errors; a signal counts before all of them."""
    if received is not None:
        return 128 + received
    if error is None:
        return 0
    return 2 if isinstance(error, _MISTAKES) else 1


def tell(command: RunCommand, received: signal.Signals | None, *, quiet: bool) -> None:
    """Say how the run ended and where to look at it, on standard error."""
    status = command.outcome.status if command.outcome else None
    if command.error is not None and received is None:
        _log.debug("the error in full", exc_info=command.error)
        complain(str(command.error))
    if quiet:
        return
    if received is not None and command.run is None:
        say("stopped before there was a run")
    if command.run is None or status is None:
        return
    info = command.run.info
    if status is RunStatus.FINISHED or received is not None:
        say(f"{info.name!r} (run {info.run_id}) is {status}")
    if command.tracking is not None:
        say(f"to look at it: {where_to_look(command.tracking, info)}")


def where_to_look(tracking: str, info: RunInfo) -> str:
    """The page of a run on its server; for a store without a server, the command that shows it."""
    url = run_url(tracking, info.experiment_id, info.run_id)
    if url is not None:
        return url
    if tracking.startswith("databricks"):
        return f"the experiment {info.experiment_id} in the workspace of {tracking}"
    return "mlflow ui --backend-store-uri " + ('"$MLFLOW_TRACKING_URI"' if MASK in tracking else shlex.quote(tracking))


def run_as_json(command: RunCommand, received: signal.Signals | None) -> dict[str, Any]:
    """All that is known of the run, for ``--json``."""
    run, outcome = command.run, command.outcome
    info = run.info if run else None
    output = run.output_path if run else None
    return {
        "run_id": info.run_id if info else None,
        "run_name": info.name if info else None,
        "experiment_id": info.experiment_id if info else None,
        "project": run.plan.project_name if run else None,
        "backend": run.plan.backend if run else command.request.backend,
        "status": outcome.status.value if outcome else None,
        "exit_code": outcome.exit_code if outcome else None,
        "reason": outcome.reason if outcome else None,
        "output": str(output) if output else None,
        "tracking_uri": command.tracking,
        "url": run_url(command.tracking, info.experiment_id, info.run_id) if command.tracking and info else None,
        "tracking_error": str(outcome.tracking_error) if outcome and outcome.tracking_error else None,
        "interrupted": received.name if received else None,
        "error": error_as_json(command.error)["error"] if command.error else None,
    }


def error_as_json(error: Exception) -> dict[str, Any]:
    """An error without a run, for ``--json``."""
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    return {"error": {"type": type(error).__name__, "message": message}}


def print_json(data: Mapping[str, Any] | list[dict[str, Any]], *, indent: int | None = 2) -> None:
    """One JSON value on standard output."""
    try:
        click.echo(json.dumps(data, indent=indent, ensure_ascii=False, default=str))
    except OSError as error:
        # Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # where nobody reads it, the exit code still tells how it went
            raise
