"""The environment variables that a caller gives a run. Their values are secret; messages show the names only."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from mlfleet._project.shell import VARIABLE_PREFIX
from mlfleet.errors import UsageError

__all__ = ["LONGEST_VARIABLE", "check_reserved", "read_variables"]

LONGEST_VARIABLE = 131_071
"""The most bytes of ``NAME=VALUE``: Linux takes 128 KiB with a NUL at its end (MAX_ARG_STRLEN, execve(2))."""

# The names that every shell passes on (POSIX, Base Definitions, 8.1); lower case is fine everywhere, too.
_is_name = re.compile(r"[A-Za-z_][A-Za-z0-9_]*").fullmatch

_RESERVED: Mapping[str, str] = {
    "MLFLOW_RUN_ID": "give run_id (--run-id)",
    "MLFLOW_EXPERIMENT_ID": "give experiment_id (--experiment-id)",
    "MLFLOW_TRACKING_URI": "give tracking_uri (--tracking-uri)",
    "MLFLOW_TRACKING_USERNAME": "set it for mlfleet itself",
    "MLFLOW_TRACKING_PASSWORD": "set it for mlfleet itself",
    "MLFLOW_TRACKING_TOKEN": "set it for mlfleet itself",
    "MLFLOW_WORKSPACE": "set it for mlfleet itself",
}
# Runs get the login of this process for a Databricks workspace that tracks them, or one of their own there.
_DATABRICKS = ("DATABRICKS_HOST", "DATABRICKS_TOKEN", "DATABRICKS_CLIENT_ID", "DATABRICKS_CLIENT_SECRET")
_PREFIXES = ("MLFLEET_", VARIABLE_PREFIX)


def read_variables(given: object) -> dict[str, str]:
    """Return a copy of the argument ``env``, checked as far as that needs neither project nor tracking.

    Raises:
        UsageError: It is not a mapping, a name or a value cannot be a variable, or mlfleet itself sets one of them.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UsageError(f"env is {type(given).__name__}: give a mapping of names to values")
    made = dict(given)
    for name, value in made.items():
        _check(name, value)
    check_reserved(made, _RESERVED)
    return made


def check_reserved(given: Collection[str], names: Collection[str], *, tracking_uri: str = "") -> None:
    """Check that a caller gives no variable that mlfleet sets.

    Args:
        given: The names of the caller's variables.
        names: The names of the variables that mlfleet sets.
        tracking_uri: The URI of the tracking of the run.

    Raises:
        UsageError: There is such a variable; the message says how to get what it is for.
    """
    databricks = _DATABRICKS if tracking_uri.startswith("databricks") else ()
    for name in given:
        if name in names or name in databricks or name.startswith(_PREFIXES):
            hint = _RESERVED.get(name)
            if hint is None:
                hint = "give resources=Resources(gpus=…) (--gpus)" if name.startswith("CUDA_") else "leave it out"
            raise UsageError(f"env: {name} is set by mlfleet for each run: {hint}")


def _check(name: object, value: object) -> None:
    if not isinstance(name, str) or not _is_name(name):
        raise UsageError(
            f"env has the name {str(name)[:64]!r}: names consist of the letters a to z and A to Z, digits and _, and do"
            " not begin with a digit"
        )
    if not isinstance(value, str):
        raise UsageError(f"env: the value of {name} is {type(value).__name__}: give a text")
    if "\0" in value:
        raise UsageError(f"env: the value of {name} has a NUL character in it, which no variable can have")
    try:
        size = len(f"{name}={value}".encode())
    except UnicodeEncodeError:
        raise UsageError(f"env: the value of {name} is not Unicode text: encode it, for example as Base64") from None
    if size > LONGEST_VARIABLE:
        raise UsageError(
            f"env: {name} has {size:,} bytes, and systems take at most {LONGEST_VARIABLE:,} in one variable: write the"
            " value to a file, and give the run its path"
        )
