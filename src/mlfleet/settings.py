"""Settings of a user or a team from a file: ``mlfleet.toml``, or ``[tool.mlfleet]`` in ``pyproject.toml``.

The command line looks for the file by itself. The library reads one only when `read_settings` is called, so that a
service does not change with its working directory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mlfleet._engine.options import RunOptions
from mlfleet._environments.manager import NAMES
from mlfleet._store.private_folders import check_file
from mlfleet._text.documents import find_toml_line, nearest, read_toml
from mlfleet.backends.registry import available, find
from mlfleet.errors import SpecError
from mlfleet.tracking.locations import absolute_uri

__all__ = ["Settings", "read_settings"]

_OWN_FILE = "mlfleet.toml"
_SHARED_FILE = "pyproject.toml"
_KEYS: Mapping[str, tuple[type, str]] = {
    "backend": (str, "the name of a backend"),
    "backends": (dict, "a table for each backend, as in [backends.slurm]"),
    "env-manager": (str, f"one of {', '.join(NAMES)}"),
    "jobs": (int, "a whole number, 1 or more"),
    "tracking-uri": (str, "the URI of a tracking server or store"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings that a file gives. What it does not give is None.

    Attributes:
        path: The file; None if there is none.
        backend: The backend of runs.
        backends: The ``backend_config`` of each backend by its name, as it is written (see `backend_config`).
        env_manager: The environment manager of runs.
        jobs: The number of runs of a sweep at the same time.
        tracking_uri: The tracking server or store. A relative path is made absolute from the folder of the file.
    """

    path: Path | None = None
    backend: str | None = None
    backends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    env_manager: str | None = None
    jobs: int | None = None
    tracking_uri: str | None = field(default=None, repr=False)

    def backend_config(self, backend: str) -> dict[str, Any] | None:
        """Return the ``backend_config`` of a backend; None if the file gives none. Blocking: imports the backend.

        Relative paths (`Backend.path_keys`) are made absolute from the folder of the file.

        Raises:
            BackendNotFound: The backend is not installed.
        """
        table = self.backends.get(backend)
        if table is None or self.path is None:
            return None
        config = dict(table)
        for key in find(backend).path_keys & config.keys():
            if isinstance(config[key], str):
                config[key] = str(self.path.parent / Path(config[key]).expanduser())
        return config

    def run_options(self, backend: str | None = None) -> RunOptions:
        """Return the arguments of a run that the file gives, for ``**``. Blocking: imports the backend.

        Args:
            backend: The backend to use; None for that of the file.

        Raises:
            BackendNotFound: The backend is not installed.
        """
        options: RunOptions = {}
        chosen = backend or self.backend
        if chosen is not None:
            options["backend"] = chosen
        config = self.backend_config(chosen or "local")
        if config is not None:
            options["backend_config"] = config
        if self.env_manager is not None:
            options["env_manager"] = self.env_manager
        return options

    def find_place(self, *keys: str) -> str:
        """Return the file and the line of a key, for messages. Blocking.

        Args:
            keys: The names of the tables around the key, and the key.
        """
        if self.path is None:
            return "no file"
        line = _find_line(self.path, keys)
        return f"{self.path}, line {line}" if line is not None else str(self.path)


def read_settings(path: str | os.PathLike[str] | None = None) -> Settings:
    """Read the settings of a file. Blocking, for some milliseconds: a service calls it before its event loop runs.

    Args:
        path: The file, whose settings are those of ``[tool.mlfleet]`` if its name is ``pyproject.toml``. Default: the
            nearest ``mlfleet.toml``, or ``pyproject.toml`` with ``[tool.mlfleet]``, in the working directory and the
            folders above it, up to the home folder or the root. Without one the settings are empty.

    Raises:
        SpecError: The file cannot be read, is not TOML, or has an unknown key or a wrong value.
        UsageError: Other users can write to the file, or replace it.
    """
    file = _search() if path is None else Path(path).absolute()
    if file is None:
        return Settings()
    table = _read_table(file) or {}
    check_file(file, "the settings")
    for key, value in table.items():
        if key not in _KEYS:
            hint = nearest(key, _KEYS) or "."
            _fail(file, (key,), f"the key {key!r} is unknown{hint} Known are {', '.join(_KEYS)}")
        kind, expected = _KEYS[key]
        # `type`, since True is an int, too.
        if type(value) is not kind or value == "" or (isinstance(value, int) and value < 1):
            _fail(file, (key,), f"{key} is {value!r}: give {expected}")
    manager = table.get("env-manager")
    if manager is not None and manager not in NAMES:
        _fail(file, ("env-manager",), f"env-manager is {manager!r}: give {_KEYS['env-manager'][1]}")
    backends = table.get("backends", {})
    installed = available() if backends else ()
    for name, config in backends.items():
        if not isinstance(config, dict):
            _fail(file, ("backends", name), f"backends.{name} is {config!r}: give a table, as in [backends.{name}]")
        # One that is not like any other may be a plugin that is installed elsewhere.
        if name not in installed and (hint := nearest(name, installed)):
            _fail(file, ("backends", name), f"there is no backend {name!r}{hint}")
    uri = table.get("tracking-uri")
    return Settings(
        path=file,
        backend=table.get("backend"),
        backends=backends,
        env_manager=manager,
        jobs=table.get("jobs"),
        tracking_uri=None if uri is None else absolute_uri(uri, file.parent),
    )


def _search() -> Path | None:
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return None
    # Of a user without a home folder it is "~", which is no folder above.
    home = Path(os.path.realpath(os.path.expanduser("~")))  # noqa: PTH111 - raises an error then
    for folder in (here, *here.parents):
        own, shared = folder / _OWN_FILE, folder / _SHARED_FILE
        # `os.path`: False also where a folder may not be looked into. A broken link must not go unnoticed.
        if os.path.lexists(own):
            return own
        if os.path.isfile(shared) and _mentions_mlfleet(shared) and _read_table(shared) is not None:  # noqa: PTH113
            return shared
        if folder == home:
            break
    return None


def _mentions_mlfleet(path: Path) -> bool:
    """Return False for a ``pyproject.toml`` that cannot have settings: its mistakes are not our user's concern."""
    try:
        return b"mlfleet" in path.read_bytes()
    except OSError:
        return False


def _read_table(path: Path) -> dict[str, Any] | None:
    """Return the settings in a file as they are written; None if it has no table for them."""
    table: Any = read_toml(path)
    for key in _root(path):
        table = table.get(key) if isinstance(table, dict) else None
    if table is not None and not isinstance(table, dict):
        _fail(path, (), "tool.mlfleet is not a table: write [tool.mlfleet]")
    return table


def _root(path: Path) -> tuple[str, ...]:
    return ("tool", "mlfleet") if path.name == _SHARED_FILE else ()


def _find_line(path: Path, keys: tuple[str, ...]) -> int | None:
    return find_toml_line(path, (*_root(path), *keys))


def _fail(path: Path, keys: tuple[str, ...], message: str) -> NoReturn:
    raise SpecError(message, path=path, line=_find_line(path, keys))
