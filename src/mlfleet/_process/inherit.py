"""The environment variables of this process that the commands of runs and builds inherit."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Collection
from contextlib import suppress
from functools import lru_cache

from mlfleet.errors import UsageError

__all__ = ["MINIMAL", "inherited", "read_inherit_env"]

MINIMAL = (
    *("HOME", "LANG", "LANGUAGE", "LC_*", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "TZ", "USER"),
    # Without these, programs of this machine may not start, or use GPUs that this process must not use.
    *("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"),
    # How servers are verified, tracking among them: paths and switches, no secrets.
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "MLFLOW_TRACKING_INSECURE_TLS"),
    *("MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_CLIENT_CERT_PATH"),
)
"""The variables that are always inherited; ``*`` at the end of a name stands for any text."""

_is_name = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?").fullmatch


def read_inherit_env(given: object) -> bool | tuple[str, ...]:
    """Return the argument ``inherit_env``, checked.

    Raises:
        UsageError: It is neither True, False nor names.
    """
    if isinstance(given, bool):
        return given
    if isinstance(given, str | bytes) or not isinstance(given, Collection):
        raise UsageError(f"inherit_env is {type(given).__name__}: give True, False or a list of names")
    names = tuple(given)
    for name in names:
        if not isinstance(name, str) or not _is_name(name):
            raise UsageError(
                f"inherit_env has the name {str(name)[:64]!r}: give names of variables; only at its end a name may"
                " have a *, as in AWS_*"
            )
    return names


def inherited(inherit_env: bool | tuple[str, ...], *more: str) -> dict[str, str]:
    """Return the variables of this process that a command inherits.

    Args:
        inherit_env: True for all; False for those of `MINIMAL`; names for these as well.
        more: More such names.
    """
    environ = _own_environ()
    if inherit_env is True:
        return environ
    is_wanted = _pattern((*(inherit_env or ()), *more)).match
    return {name: value for name, value in environ.items() if is_wanted(name)}


def _own_environ() -> dict[str, str]:
    while True:
        with suppress(KeyError):  # another thread has taken a variable out meanwhile
            return os.environ.copy()


@lru_cache(maxsize=64)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, (*MINIMAL, *names))))
