"""What is written to standard error: messages, warnings, errors, in colour where there is a terminal for it."""

from __future__ import annotations

import logging
import os
import sys

import click

__all__ = ["complain", "is_interactive", "say", "show_logs"]

_LIBRARY = "mlfleet"


def say(text: str) -> None:
    """One line that tells what mlfleet does."""
    _write(f"mlfleet: {text}")


def complain(text: str, *, word: str = "Error", color: str = "red") -> None:
    """An error, or another word that is worth a colour."""
    # NO_COLOR: https://no-color.org. Whether there is a terminal is click's to find out.
    plain = bool(os.environ.get("NO_COLOR"))
    label = f"{word}:" if plain else click.style(f"{word}:", fg=color, bold=True)
    _write(f"{label} {text}")


def is_interactive() -> bool:
    """Whether standard error is a terminal that can move its cursor."""
    # It is None where a service manager has closed it.
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def show_logs(level: int) -> None:
    """Show what the library logs, from that level on."""
    logger = logging.getLogger(_LIBRARY)
    handler = _Handler(level)
    for old in [each for each in logger.handlers if isinstance(each, _Handler)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


class _Handler(logging.Handler):
    """Shows records as short lines; a traceback only where everything is shown."""

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
                _write(f"{record.levelname.lower()} {record.name}: {text}")
        except Exception:
            self.handleError(record)


def _write(text: str) -> None:
    try:
        click.echo(text, err=True)
    except OSError:
        # The terminal is gone (SIGHUP), or nobody reads the pipe any more. The run and its end do not depend on it.
        return
