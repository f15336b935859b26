"""The options of the command line, and how their values are read."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from mlfleet._cli.output import show_logs
from mlfleet._engine.options import OPTIONS, RunOption
from mlfleet._engine.request import RunRequest, choose_experiment
from mlfleet._environments.manager import NAMES
from mlfleet._text.documents import parse_json
from mlfleet._text.plain import short
from mlfleet.backends.registry import available, find
from mlfleet.errors import SpecError, UsageError
from mlfleet.resources import Resources
from mlfleet.runs import Timeouts
from mlfleet.settings import Settings, read_settings
from mlfleet.tracking import Tracking

__all__ = [
    "FileDefaults",
    "asked_option",
    "check_options",
    "complete_backend",
    "config_options",
    "debug_option",
    "dry_run_option",
    "duration",
    "experiment_options",
    "file_settings",
    "find_experiment",
    "goal_option",
    "jobs_option",
    "json_option",
    "quiet_option",
    "read_asked",
    "read_backend_config",
    "read_config",
    "read_pairs",
    "read_run_options",
    "read_variables",
    "run_options",
    "tracking_option",
]

F = TypeVar("F", bound=Callable[..., Any])

_FILE_DEFAULTS = ("backend", "env_manager", "jobs", "tracking_uri")
_LONGEST_NAME = 64  # characters
_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_LONGEST_DURATION = 999_999_999 * _UNITS["d"]  # that of `timedelta`, and seconds that every backend takes
_PART = r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|[smhdw]|)"
_DURATION = re.compile(rf"(?:{_PART}\s*)+")


# ---- reading values -------------------------------------------------------------------------------------------------


def duration(text: str | float) -> float:
    """Return the seconds that ``30``, ``30s``, ``5m``, ``1h30m`` or ``7d`` mean.

    Raises:
        click.BadParameter: The text is not a duration.
    """
    plain = str(text).strip().lower()
    if not _DURATION.fullmatch(plain):
        raise click.BadParameter(
            f"{text!r} is not a duration: give seconds, or a number with a unit: 90s, 5m, 1h30m, 7d"
        )
    seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, plain))
    if seconds > _LONGEST_DURATION:
        raise click.BadParameter(f"{short(text)!r} is longer than {_LONGEST_DURATION / _UNITS['d']:.0f} days")
    return seconds


def read_pairs(option: str, texts: Sequence[str], *, flags: bool = False, lists: bool = False) -> dict[str, Any]:
    """Return ``name=value`` texts as a mapping.

    Args:
        option: The name of the option, for the error.
        texts: The values of the option.
        flags: Take a name without a value for a flag, whose value is True.
        lists: Make a list of the values of a name that is given several times.

    Raises:
        click.UsageError: A text has no ``=`` or no name, or a name was given before.
    """
    pairs: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not (equals or flags):
            shape = "NAME=VALUE or NAME" if flags else "NAME=VALUE"
            raise click.UsageError(f"{option} {text!r} is not of the form {shape}")
        if name in pairs and lists:
            before = pairs[name]
            pairs[name] = [*(before if isinstance(before, list) else [before]), value]
            continue
        if name in pairs:
            raise click.UsageError(f"{option} {name!r} is given twice: give it once")
        pairs[name] = value if equals else True
    return pairs


def read_variables(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Return ``name=value`` texts as a mapping; a name alone stands for the variable of this process.

    Args:
        option: The name of the option, for the error, which shows no values.
        texts: The values of the option.

    Raises:
        click.UsageError: A variable has no name, is given twice, or is to be copied and is not set.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name:
            raise click.UsageError(f"{option} has no name: give NAME=VALUE, or NAME to copy a variable")
        if name in found:
            raise click.UsageError(f"{option} {name} is given twice: give it once")
        if not equals:
            copied = os.environ.get(name)
            if copied is None:
                shown = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
                raise click.UsageError(
                    f"{option} {shown!r} copies a variable that is not set here: set it, or give NAME=VALUE"
                )
            value = copied
        found[name] = value
    return found


def read_config(text: str | None) -> dict[str, Any] | str | None:
    """Return ``backend_config`` as the API takes it: the path of a ``.json`` file, or the object in a JSON text.

    Raises:
        click.UsageError: The text is neither, or is JSON but not an object.
    """
    if text is None or text.endswith(".json"):
        return text
    try:
        config = parse_json(text)
    except SpecError as error:
        raise click.UsageError(f"-c is neither a path that ends in .json nor JSON: {error}") from error
    if not isinstance(config, dict):
        raise click.UsageError(f"-c is JSON, but not an object: {text[:80]}")
    return config


def complete_backend(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the installed backends whose names begin with `incomplete`, for the shell's completion."""
    return [CompletionItem(name) for name in available() if name.startswith(incomplete)]


# ---- the configuration file ------------------------------------------------------------------------------------------


class FileDefaults(Mapping[str, Any]):
    """The defaults of options by the configuration file, for click's ``default_map``.

    The file is read when a command asks for the first default: ``--help`` works where the file has a mistake.
    """

    @cached_property
    def settings(self) -> Settings:
        """The settings of the file for this working directory."""
        return read_settings()

    def __getitem__(self, name: str) -> Any:
        # click asks for all options, and with `resilient_parsing` for the text of `--help`.
        if name in _FILE_DEFAULTS and not click.get_current_context().resilient_parsing:
            value = getattr(self.settings, name)
            if value is not None:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_FILE_DEFAULTS)

    def __len__(self) -> int:
        return len(_FILE_DEFAULTS)


def file_settings() -> Settings:
    """Return the settings of the configuration file, as the active command uses them."""
    defaults = click.get_current_context().find_object(FileDefaults)
    return Settings() if defaults is None else defaults.settings


def read_backend_config(backend: str, text: str | None) -> dict[str, Any] | str | None:
    """Return the ``backend_config`` of the option, else that of the configuration file.

    Raises:
        click.UsageError: See `read_config`.
        UsageError: The backend does not take its table in the configuration file.
    """
    config = read_config(text)
    return _file_config(backend) if config is None else config


def read_asked(asked: Sequence[str], text: str | None) -> dict[str, dict[str, Any]]:
    """Return the backends of `asked_option`, each with its ``backend_config``. Blocking.

    Raises:
        click.UsageError: The option for ``backend_config`` is given, but not one backend.
        MlfleetError: A ``backend_config`` cannot be read, or its backend does not take it.
    """
    if text is not None and len(asked) != 1:
        raise click.UsageError("-c holds the settings of one backend: give it with one -b")
    configs = {name: read_backend_config(name, text) for name in asked}
    return {name: RunRequest.of("", backend_config=config).read_backend_config() for name, config in configs.items()}


def _file_config(backend: str) -> dict[str, Any] | None:
    """Return the ``backend_config`` that the configuration file gives; None if it gives none.

    Raises:
        UsageError: The backend does not take it. The error, unlike that of the run's plan, names the file.
    """
    settings = file_settings()
    config = settings.backend_config(backend)
    if config is not None:
        try:
            find(backend)().configure(config)
        except UsageError as error:
            place = settings.find_place("backends", backend)
            raise UsageError(f"{error} (backend_config is backends.{backend} in {place})") from error
    return config


# ---- options of several commands ------------------------------------------------------------------------------------


def asked_option(does: str) -> Callable[[F], F]:
    """Add ``-b`` to a command that asks backends for their runs, and the options that choose among their services.

    `read_asked` reads the arguments ``asked`` and ``backend_config``.

    Args:
        does: What the command does with a backend.
    """
    text = (
        f"Also {does} this backend, which is otherwise not asked because it needs a login; may be given several times."
    )
    asked = click.option("-b", "--backend", "asked", metavar="NAME", multiple=True, help=text)
    return lambda command: asked(_add(command, ("backend_config", "tracking_uri")))


def json_option(text: str = "Print a JSON list.") -> Callable[[F], F]:
    """Add ``--json`` to a command.

    Args:
        text: What the command prints with it.
    """
    return click.option("--json", "as_json", is_flag=True, help=text)


def debug_option(command: F) -> F:
    """Add ``--debug`` to a command."""

    def switch_on(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            show_logs(logging.DEBUG)

    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=switch_on,
        help="Show what mlfleet does, and the tracebacks of errors.",
    )(command)


dry_run_option = click.option(
    "--dry-run", "only_show", is_flag=True, help="Show the command, its environment and its backend; run nothing."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Write warnings and errors only.")


goal_option = click.option(
    "--goal",
    type=click.Choice(["min", "max"]),
    default="min",
    show_default=True,
    help="With --metric: whether low or high values are the best.",
)
jobs_option = click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="The number of runs at the same time.  [default: one per CPU on this machine, 100 elsewhere]",
)


def config_options(command: F) -> F:
    """Add the options whose values the configuration file can give to a command."""
    return _add(jobs_option(command), ("backend", "backend_config", "env_manager", "tracking_uri"))


def check_options(command: F) -> F:
    """Add the options of a run by which its project is read to a command."""
    return _add(command, ("version", "backend", "backend_config", "env_manager"))


def tracking_option(command: F) -> F:
    """Add ``--tracking-uri`` to a command."""
    return _add(command, ("tracking_uri",))


def experiment_options(command: F) -> F:
    """Add ``--experiment-name`` and ``--experiment-id`` to a command; `find_experiment` reads them."""
    return _add(command, ("experiment_name", "experiment_id"))


async def find_experiment(tracking: Tracking, name: str | None, experiment_id: str | None) -> str:
    """Return the id of the experiment that a command means, by the same rules as for a run.

    Raises:
        click.UsageError: Both options are given.
        TrackingError: Tracking cannot be reached.
    """
    _check_experiment(name, experiment_id)
    chosen, found = choose_experiment(name, experiment_id)
    return found if chosen is None else await tracking.experiment_id(chosen)


def _check_experiment(name: str | None, experiment_id: str | None) -> None:
    if name and experiment_id:
        raise click.UsageError("both --experiment-name and --experiment-id are given: give one of them")


# ---- the options of a run -------------------------------------------------------------------------------------------


def run_options(name: str) -> Callable[[F], F]:
    """Add the options of a run to a command; `read_run_options` reads them.

    Args:
        name: The command's name, ``run`` or ``sweep``.
    """
    return lambda command: _add(command, tuple(each.name for each in OPTIONS if name in each.commands))


def read_run_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options that `run_options` adds out of `options`, and return them as arguments for `RunRequest.of`.

    Raises:
        click.UsageError: The value of an option is wrong, or two options contradict each other.
        UsageError: The backend does not take its table in the configuration file.
    """
    found: dict[str, Any] = {}
    for option in OPTIONS:
        key = _key(option)
        if key not in options:
            continue
        value = options.pop(key)
        if option.form == "names" and value is not None:
            value = {"all": True, "none": False}.get(value, value.split(","))
        elif option.form == "variables":
            value = read_variables(option.flags[0], value)
        elif option.form in ("pairs", "switches"):
            settings = {"flags": option.form == "switches", "lists": option.name == "parameters"}
            value = read_pairs(option.flags[0], value, **settings)
        found[option.name] = value
    _check_experiment(found["experiment_name"], found["experiment_id"])
    found["backend_config"] = read_backend_config(found["backend"], found["backend_config"])
    found["timeouts"] = Timeouts(**_fields("timeouts", found))
    needed = {name: value for name, value in _fields("resources", found).items() if value is not None}
    found["resources"] = Resources(**needed) if needed else None
    return found


def _fields(argument: str, found: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{argument}."
    return {name.removeprefix(prefix): found.pop(name) for name in tuple(found) if name.startswith(prefix)}


def _add(command: F, names: Sequence[str]) -> F:
    for option in reversed(OPTIONS):
        if option.flags and option.name in names:
            command = _click_option(option)(command)
    return command


def _click_option(option: RunOption) -> Callable[[F], F]:
    settings: dict[str, Any] = {"help": help_text(option), "metavar": option.metavar or None}
    if option.form == "flag":
        settings = {"help": option.text, "is_flag": True}
    elif option.form in ("pairs", "switches", "variables"):
        settings["multiple"] = True
    else:
        settings["type"] = {"seconds": duration, "whole": int, "number": float}.get(option.form, str)
    if option.default and not option.variable and option.form != "flag":
        settings["default"] = option.default
    if option.name == "env_manager":
        settings |= {"type": click.Choice(NAMES), "metavar": None}
    if option.name in ("storage_dir", "tracking_uri"):  # the others are read where the API reads them
        settings["envvar"] = option.variable
    if option.name == "backend":
        settings["shell_complete"] = complete_backend
    return click.option(*option.flags, _key(option), **settings)


def help_text(option: RunOption) -> str:
    """Return the description of an option with its default and its environment variable."""
    notes = [f"env var: {option.variable}"] if option.variable else []
    notes += [f"default: {option.default}"] if option.default and option.form != "flag" else []
    return f"{option.text}  [{'; '.join(notes)}]" if notes else option.text


def _key(option: RunOption) -> str:
    """Return the name under which click passes the value."""
    return option.flags[-1].removeprefix("--").replace("-", "_") if option.flags else ""
