"""``mlfleet config``: the settings that count in this folder, and where they are from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click
from click.core import ParameterSource

from mlfleet._cli.dry_run import used_tracking_uri
from mlfleet._cli.options import config_options, debug_option, file_settings, json_option, read_config
from mlfleet._cli.output import masked, print_json, print_table
from mlfleet._progress import say
from mlfleet._text.masking import MASK, is_secret_name
from mlfleet.backends.registry import available
from mlfleet.settings import Settings

__all__ = ["config"]

_BY_DEFAULT = {
    "env-manager": "(the one that fits the project's files)",
    "jobs": "(one per CPU on this machine, 100 elsewhere)",
}


@click.group()
def config() -> None:
    """Look at the settings for runs."""


@config.command()
@config_options
@json_option()
@debug_option
@click.pass_context
def show(ctx: click.Context, /, *, as_json: bool, **options: Any) -> None:
    """Show the settings that a run from this folder has, and where each one is from.

    An option counts before the environment, that before the configuration file, and that before the default. With
    options of mlfleet run and sweep: what they would change.

    The file is the nearest mlfleet.toml, or pyproject.toml with [tool.mlfleet], in this folder or above. Of the tables
    for backends, a run uses the one of its backend, unless --backend-config is given.
    """
    settings = file_settings()
    rows: list[dict[str, Any]] = []
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name not in options or name == "backend_config":
            continue
        key, value = name.replace("_", "-"), options[name]
        match ctx.get_parameter_source(name):
            case ParameterSource.COMMANDLINE:
                origin = f"option --{key}"
            case ParameterSource.ENVIRONMENT:
                origin = f"environment variable {parameter.envvar}"
            case ParameterSource.DEFAULT_MAP:
                origin = settings.find_place(key)
            case _:
                origin = "default"
                value = used_tracking_uri(None) if key == "tracking-uri" else value or _BY_DEFAULT[key]
        rows.append({"name": key, "value": masked(value), "from": origin})
    rows += _backend_rows(settings, read_config(options["backend_config"]))
    if as_json:
        print_json(rows)
        return
    print_table([["setting", "value", "from"], *([row["name"], str(row["value"]), row["from"]] for row in rows)])
    if settings.path is None:
        say("there is no mlfleet.toml, and no pyproject.toml with [tool.mlfleet], in this folder or above")


def _backend_rows(settings: Settings, given: dict[str, Any] | str | None) -> Iterator[dict[str, Any]]:
    if given is not None:
        yield {"name": "backend-config", "value": _hide("", given), "from": "option --backend-config"}
    for backend, written in settings.backends.items():
        table = settings.backend_config(backend) if backend in available() else written
        for key, value in (table or {}).items():
            place = settings.find_place("backends", backend, key)
            yield {"name": f"backends.{backend}.{key}", "value": _hide(key, value), "from": place}


def _hide(name: str, value: Any) -> Any:
    """Return a value without its secrets, by its name and by the names in it."""
    if is_secret_name(name):
        return MASK
    if isinstance(value, list):
        return [_hide(name, each) for each in value]
    return {key: _hide(key, each) for key, each in value.items()} if isinstance(value, Mapping) else masked(value)
