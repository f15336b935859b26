"""The output of the commands: messages on standard error, results on standard output, and the exit code.

Standard output belongs to the project, or with ``--json`` to JSON. Text that comes from elsewhere (errors, names,
output of runs) loses its control characters, and URIs lose their secrets, before it reaches the terminal.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import anyio.to_thread
import click

from mlfleet._progress import colored, write_line
from mlfleet._run_log import get_logger
from mlfleet._text.lines import write_all
from mlfleet._text.masking import MASK
from mlfleet._text.plain import CONTROLS, clean
from mlfleet.errors import BackendNotFound, FetchError, ParameterError, SpecError, UsageError
from mlfleet.tracking import RunInfo
from mlfleet.tracking.links import run_url

__all__ = [
    "complain",
    "complain_of",
    "error_as_json",
    "exit_code",
    "masked",
    "print_json",
    "print_line",
    "print_output",
    "print_table",
    "show_logs",
    "to_json",
    "where_to_look",
]

_log = get_logger("mlfleet.cli")
_LIBRARY = "mlfleet"
_MISTAKES = (UsageError, SpecError, ParameterError, FetchError, BackendNotFound)


# ---- standard error -------------------------------------------------------------------------------------------------


def complain(text: str, *, word: str = "Error", color: str = "red") -> None:
    """Write an error, or another message that begins with a coloured word, to standard error."""
    write_line(f"{colored(f'{word}:', color, bold=True)} {clean(text)}")


def show_logs(level: int) -> None:
    """Show the library's log records from `level` on."""
    logger = logging.getLogger(_LIBRARY)
    handler = _Handler(level)
    for old in [each for each in logger.handlers if isinstance(each, _Handler)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


class _Handler(logging.Handler):
    """A handler that shows records as short lines; tracebacks only at the level DEBUG."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if record.exc_info and self.level <= logging.DEBUG:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
            if record.levelno >= logging.ERROR:
                complain(text)
            elif record.levelno >= logging.WARNING:
                complain(text, word="Warning", color="yellow")
            else:
                write_line(clean(f"{record.levelname.lower()} {record.name}: {text}"))
        except Exception:
            self.handleError(record)


# ---- standard output ------------------------------------------------------------------------------------------------


def print_json(data: Mapping[str, Any] | list[dict[str, Any]], *, indent: int | None = 2) -> None:
    """Print one JSON value."""
    try:
        click.echo(to_json(data, indent=indent))
    except OSError as error:
        # Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # without a reader, the exit code still tells how it went
            raise


def to_json(data: object, *, indent: int | None = None) -> str:
    """Return `data` as JSON that people can read, in which control characters are escaped."""
    text = json.dumps(data, indent=indent, ensure_ascii=False, default=str)
    # json escapes only those below U+0020.
    return CONTROLS.sub(lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text)


def print_line(text: str) -> None:
    """Print one line, or several, of text that may contain values from elsewhere."""
    click.echo(clean(text))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells in aligned columns; the first row is the heading."""
    cells = [[clean(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


async def print_output(data: bytes) -> None:
    """Write all of `data` to standard output.

    It is written in a thread that a cancellation leaves behind: a reader that does not read must not keep Ctrl-C from
    this process.

    Raises:
        OSError: The terminal or the reader is gone.
    """
    await anyio.to_thread.run_sync(write_all, sys.stdout.fileno(), data, abandon_on_cancel=True)


# ---- texts ----------------------------------------------------------------------------------------------


def masked(value: Any) -> Any:
    """Return JSON data with the secrets of the URIs in its texts masked."""
    match value:
        case str() if "://" in value:
            return clean(value)
        case Mapping():
            return {name: masked(each) for name, each in value.items()}
        case list() | tuple():
            return [masked(each) for each in value]
        case _:
            return value


def where_to_look(tracking: str, info: RunInfo) -> str:
    """Return the address of a run on its server; for a store without a server, the command that shows it."""
    url = run_url(tracking, info.experiment_id, info.run_id)
    if url is not None:
        return url
    if tracking.startswith("databricks"):
        return f"the experiment {info.experiment_id} in the workspace of {tracking}"
    return "mlflow ui --backend-store-uri " + ('"$MLFLOW_TRACKING_URI"' if MASK in tracking else shlex.quote(tracking))


# ---- errors ---------------------------------------------------------------------------------------------------------


def exit_code(error: Exception | None, received: signal.Signals | None = None) -> int:
    """Return the exit code of a command.

    Args:
        error: The error that ended it; None if there was none. The code is 2 for mistakes that the caller can correct
            and 1 for other errors.
        received: The signal that ended it, which counts before the error: 128 and its number.
    """
    if received is not None:
        return 128 + received
    if error is None:
        return 0
    return 2 if isinstance(error, _MISTAKES) else 1


def complain_of(error: Exception) -> None:
    """Write the message of an error to standard error, and with ``--debug`` all of it."""
    _log.debug("the error in full", exc_info=error)
    complain(str(error))


def error_as_json(error: Exception) -> dict[str, Any]:
    """Return an error as an object for ``--json``."""
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    return {"error": {"type": type(error).__name__, "message": message}}
