"""Which backends there are, by name."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from mlfleet.backends.base import Backend
from mlfleet.errors import BackendNotFound

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["available", "find"]

_GROUP = "mlfleet.backends"


@dataclass(frozen=True, slots=True)
class _BuiltIn:
    """A backend of mlfleet itself.

    Attributes:
        target: ``module:class``, imported only when it is asked for.
        extra: the extra of mlfleet that its dependencies come with.
    """

    target: str
    extra: str | None = None

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]


_BUILT_IN = {
    "local": _BuiltIn("mlfleet.backends.local:LocalBackend"),
    "docker": _BuiltIn("mlfleet.backends.docker:DockerBackend", "docker"),
    "kubernetes": _BuiltIn("mlfleet.backends.kubernetes:KubernetesBackend", "kubernetes"),
    "databricks": _BuiltIn("mlfleet.backends.databricks:DatabricksBackend", "databricks"),
}


@cache
def find(name: str) -> type[Backend]:
    """The class of the backend of that name. Imports it: blocking, the first time.

    Raises:
        BackendNotFound: there is none, or what it needs is not installed.
    """
    # A tenth of the time that `import mlfleet` takes, if it were imported with this module.
    from importlib.metadata import EntryPoint

    built_in = _BUILT_IN.get(name)
    if built_in is not None:
        try:
            return _load(name, EntryPoint(name, built_in.target, _GROUP), built_in.extra)
        except ModuleNotFoundError:
            pass  # this version of mlfleet has no such backend yet; a plugin may
    plugin = _plugins().get(name)
    if plugin is not None:
        return _load(name, plugin, None)
    names = available()
    nearest = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise BackendNotFound(
        f"there is no backend {name!r}.{hint} Installed are: {', '.join(names)}."
        f" A plugin announces its backend in the entry-point group {_GROUP!r}",
        backend=name,
    )


def available() -> tuple[str, ...]:
    """The names of all backends, sorted; those of plugins included."""
    built_in = {name for name, entry in _BUILT_IN.items() if importlib.util.find_spec(entry.module)}
    return tuple(sorted(built_in | _plugins().keys()))


@cache
def _plugins() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def _load(name: str, entry: EntryPoint, extra: str | None) -> type[Backend]:
    try:
        backend = entry.load()
    except ImportError as error:
        if extra is not None and error.name == entry.module:
            raise
        todo = f"pip install 'mlfleet[{extra}]'" if extra else f"install what {entry.value!r} needs"
        raise BackendNotFound(f"the backend {name!r} cannot be loaded: {error}. To do: {todo}", backend=name) from error
    except AttributeError as error:
        raise BackendNotFound(f"the backend {name!r} is announced as {entry.value!r}: {error}", backend=name) from error
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise BackendNotFound(
            f"the backend {name!r} is announced as {entry.value!r}, which is no subclass of Backend",
            backend=name,
        )
    return backend
