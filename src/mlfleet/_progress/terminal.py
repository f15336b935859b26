"""Lines on standard error."""

from __future__ import annotations

import os
import sys

from mlfleet._text.plain import clean

__all__ = ["colored", "is_interactive", "say", "write_line"]


def say(text: str) -> None:
    """Write one message of mlfleet to standard error."""
    write_line(f"mlfleet: {clean(text)}")


def write_line(text: str) -> None:
    """Write a text that is safe to show to standard error."""
    # Only the command line needs click at once. It removes colours where there is no terminal.
    import click

    try:
        click.echo(text, err=True)
    except OSError:
        # The terminal is gone (SIGHUP), or the reader of the pipe is. The run and its end do not depend on it.
        return


def colored(text: str, color: str, *, bold: bool = False) -> str:
    """Return a text for `write_line` in a colour; empty for no colour."""
    import click

    # NO_COLOR: https://no-color.org
    return click.style(text, fg=color, bold=bold) if color and not os.environ.get("NO_COLOR") else text


def is_interactive() -> bool:
    """Return True if standard error is a terminal that can move its cursor."""
    # It is None where a service manager has closed it.
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
