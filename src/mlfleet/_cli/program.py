"""The program ``mlfleet``: its commands, and how their errors are shown."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import click

from mlfleet._cli.cancel import cancel
from mlfleet._cli.check import check
from mlfleet._cli.config import config
from mlfleet._cli.logs import logs
from mlfleet._cli.options import FileDefaults
from mlfleet._cli.output import complain, error_as_json, exit_code, print_json, show_logs
from mlfleet._cli.prune import prune
from mlfleet._cli.ps import ps
from mlfleet._cli.report import report
from mlfleet._cli.run import run
from mlfleet._cli.storage import cache, envs
from mlfleet._cli.sweep import sweep
from mlfleet._cli.wait import wait
from mlfleet._run_log import get_logger
from mlfleet._version import __version__
from mlfleet.errors import MlfleetError

__all__ = ["main"]

_log = get_logger("mlfleet.cli")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: The arguments after the program's name; None for those of this process.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    show_logs(logging.WARNING)
    try:
        code = _cli.main(args=arguments, prog_name="mlfleet", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        return 130
    except Exception as raised:
        error = raised
        while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if "--json" in arguments:
            print_json(error_as_json(error), indent=None)  # one line, as the events of a sweep are
        return _complain(error)
    return code if isinstance(code, int) else 0


def _complain(error: Exception) -> int:
    _log.debug("the error in full", exc_info=error)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f"\nTry '{context.command_path} --help'." if context is not None else ""
        complain(error.format_message() + hint)
        return error.exit_code
    text = str(error)
    if not isinstance(error, MlfleetError | OSError):
        text = f"{type(error).__name__}: {error}\nThis is a fault of mlfleet: please report it with what --debug shows."
    complain(text)
    return exit_code(error)


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mlfleet")
@click.pass_context
def _cli(ctx: click.Context) -> None:
    """Run MLflow Projects, on this machine or elsewhere."""
    defaults = ctx.obj = FileDefaults()
    ctx.default_map = {**dict.fromkeys(_cli.commands, defaults), "config": {"show": defaults}}


for _command in (run, sweep, check, report, ps, logs, wait, cancel, prune, cache, envs, config):
    _cli.add_command(_command)
