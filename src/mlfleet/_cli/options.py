"""How the options of the command line are read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from mlfleet._cli.terminal import show_logs
from mlfleet._environments.choose import NAMES
from mlfleet.resources import Resources
from mlfleet.runs import DEFAULT_CANCEL_GRACE, Timeouts

__all__ = [
    "complete_backend",
    "debug_option",
    "duration",
    "experiment_options",
    "json_option",
    "project_options",
    "quiet_option",
    "read_config",
    "read_pairs",
    "read_project_options",
    "tracking_option",
]

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


quiet_option = click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors.")

tracking_option = click.option(
    "--tracking-uri",
    metavar="URI",
    help="A server (http://…), sqlite:///FILE, or databricks.  [env var: MLFLOW_TRACKING_URI]",
)

_EXPERIMENT = (
    click.option(
        "--experiment-name",
        metavar="NAME",
        help="The experiment, which is made if there is none.  [env var: MLFLOW_EXPERIMENT_NAME]",
    ),
    click.option("--experiment-id", metavar="ID", help="The experiment by its id.  [env var: MLFLOW_EXPERIMENT_ID]"),
)

_PROJECT = (
    click.option(
        "-e",
        "--entry-point",
        metavar="NAME",
        default="main",
        show_default=True,
        help="An entry point of MLproject, or a .py, .sh or .R script of the project.",
    ),
    click.option("-v", "--version", metavar="VERSION", help="Commit, branch or tag of a Git project."),
    click.option(
        "-A",
        "--docker-args",
        metavar="NAME[=VALUE]",
        multiple=True,
        help="An option of `docker run`, as in -A gpus=all or -A t.",
    ),
    *_EXPERIMENT,
    click.option(
        "-b",
        "--backend",
        metavar="NAME",
        default="local",
        show_default=True,
        shell_complete=complete_backend,
        help="Where to run it: local, docker, kubernetes, databricks, or a plugin's name.",
    ),
    click.option("-c", "--backend-config", metavar="FILE|JSON", help="A path that ends in .json, or JSON."),
    click.option("--env-manager", type=click.Choice(NAMES), help="Default: by the project's files."),
    click.option(
        "--storage-dir",
        metavar="FOLDER",
        envvar="MLFLOW_TMP_DIR",
        show_envvar=True,
        help="Where parameters of type path are downloaded to.",
    ),
    click.option("--run-name", metavar="NAME", help="The name of the MLflow run."),
    click.option("--build-image", is_flag=True, help="Docker: build an image with the project's files in it."),
    tracking_option,
    click.option("--tag", "tags", metavar="NAME=VALUE", multiple=True, help="A tag of the MLflow run."),
    click.option("--cpus", type=float, metavar="N", help="What a run needs: here it waits for so many CPUs."),
    click.option("--gpus", type=int, metavar="N", help="Likewise GPUs; it sees no others."),
    click.option("--memory", metavar="SIZE", help="Likewise memory, as in 4Gi; in containers these are its limits."),
    click.option(
        "--timeout-setup",
        type=duration,
        metavar="TIME",
        help="How long it may take to the start of the command: 90s, 5m, 1h30m; a number is seconds.",
    ),
    click.option("--timeout-run", type=duration, metavar="TIME", help="How long the command may take."),
    click.option(
        "--cancel-grace",
        type=duration,
        metavar="TIME",
        default=DEFAULT_CANCEL_GRACE,
        help=f"How long it has to stop when asked to, before it is killed.  [default: {DEFAULT_CANCEL_GRACE:g}s]",
    ),
)


def experiment_options(command: F) -> F:
    """The two options that name an experiment."""
    for option in reversed(_EXPERIMENT):
        command = option(command)
    return command


def project_options(command: F) -> F:
    """The options of all commands that run a project; `read_project_options` reads them."""
    for option in reversed(_PROJECT):
        command = option(command)
    return command


def read_project_options(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `RunRequest.of` from the options that `project_options` adds, which are taken out of `options`.

    Raises:
        click.UsageError: one of them makes no sense.
    """
    timeouts = Timeouts(
        setup=options.pop("timeout_setup"), run=options.pop("timeout_run"), cancel_grace=options.pop("cancel_grace")
    )
    needs = {name: options.pop(name) for name in ("cpus", "gpus", "memory")}
    given = {name: value for name, value in needs.items() if value is not None}
    return {
        "docker_args": read_pairs("-A", options.pop("docker_args"), flags=True),
        "backend_config": read_config(options.pop("backend_config")),
        "tags": read_pairs("--tag", options.pop("tags")),
        "timeouts": timeouts,
        "resources": Resources(**given) if given else None,
        **{name: options.pop(name) for name in _AS_THEY_ARE},
    }


_AS_THEY_ARE = (
    "entry_point", "version", "experiment_name", "experiment_id", "backend", "env_manager", "storage_dir", "run_name",
    "build_image",
)  # fmt: skip
