"""How the options of the command line are read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from mlfleet.cli.terminal import show_logs

__all__ = ["complete_backend", "debug_option", "duration", "json_option", "read_config", "read_pairs"]

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART = r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|[smhdw]|)"
_DURATION = re.compile(rf"(?:{_PART}\s*)+")


def duration(text: str | float) -> float:
    """Seconds, from ``30``, ``30s``, ``5m``, ``1h30m`` or ``7d``.

    Raises:
        click.BadParameter: it is none of these.
    """
    plain = str(text).strip().lower()
    if not _DURATION.fullmatch(plain):
        raise click.BadParameter(f"{text!r} is no duration: give seconds, or a number with a unit: 90s, 5m, 1h30m, 7d")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, plain))


def read_pairs(option: str, texts: Sequence[str], *, flags: bool = False) -> dict[str, Any]:
    """``name=value`` texts as a mapping.

    Args:
        option: that they were given by, for the error.
        texts: as given.
        flags: a name without a value is a flag, which is True.

    Raises:
        click.UsageError: a text without ``=`` or without a name, or a name that was given before.
    """
    pairs: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not (equals or flags):
            shape = "NAME=VALUE or NAME" if flags else "NAME=VALUE"
            raise click.UsageError(f"{option} {text!r} is not of the form {shape}")
        if name in pairs:
            raise click.UsageError(f"{option} {name!r} is given twice")
        pairs[name] = value if equals else True
    return pairs


def read_config(text: str | None) -> dict[str, Any] | str | None:
    """``backend_config`` as the API takes it: the path of a ``.json`` file as it is, any other text as JSON.

    Raises:
        click.UsageError: neither, or JSON that is no object.
    """
    if text is None or text.endswith(".json"):
        return text
    try:
        config = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"-c is neither a path that ends in .json nor JSON: {error}") from error
    if not isinstance(config, dict):
        raise click.UsageError(f"-c is JSON, but no object: {text[:80]}")
    return config


def complete_backend(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The backends that are installed, for the shell's completion."""
    from mlfleet.backends.registry import available

    return [CompletionItem(name) for name in available() if name.startswith(incomplete)]


def json_option(text: str) -> Callable[[F], F]:
    """``--json``, for the commands that have it."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def debug_option(command: F) -> F:
    """``--debug``, which every command has."""

    def switch_on(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            show_logs(logging.DEBUG)

    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=switch_on,
        help="Show what mlfleet does, and tracebacks of errors.",
    )(command)
