"""The registry of backends by name."""

from __future__ import annotations

import difflib
from functools import cache
from typing import TYPE_CHECKING

from mlfleet.backends.base import Backend
from mlfleet.errors import BackendNotFound

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["available", "find", "native"]

_GROUP = "mlfleet.backends"
_MLFLOW_GROUP = "mlflow.project_backend"


# The class, as ``module:class``, and the extra of mlfleet that installs its dependencies.
_BUILT_IN: dict[str, tuple[str, str | None]] = {
    "local": ("mlfleet.backends.local.backend:LocalBackend", None),
    "docker": ("mlfleet.backends.docker:DockerBackend", "docker"),
    "kubernetes": ("mlfleet.backends.kubernetes:KubernetesBackend", "kubernetes"),
    "slurm": ("mlfleet.backends.slurm:SlurmBackend", None),
    "databricks": ("mlfleet.backends.databricks:DatabricksBackend", "databricks"),
}


@cache
def find(name: str) -> type[Backend]:
    """Return the class of the backend of that name. Blocking the first time, because it is imported.

    The backends of mlfleet itself come first, then plugins of mlfleet, then plugins of mlflow.

    Raises:
        BackendNotFound: There is no such backend, or its dependencies are not installed.
    """
    # Late: with this module it would take a tenth of the time of `import mlfleet`.
    from importlib.metadata import EntryPoint

    if name in _BUILT_IN:
        target, extra = _BUILT_IN[name]
        return _native(name, EntryPoint(name, target, _GROUP), extra)
    if name in (native := _plugins(_GROUP)):
        return _native(name, native[name], None)
    if name in (foreign := _plugins(_MLFLOW_GROUP)):
        from mlfleet.backends.mlflow_plugins import PluginBackend

        builder = _load(name, foreign[name], None)
        if not callable(builder):
            text = f"the backend {name!r} is announced as {foreign[name].value!r}, which makes no backend"
            raise BackendNotFound(f"{text}: it cannot be called", backend=name)
        return PluginBackend.named(name, builder)
    names = available()
    nearest = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise BackendNotFound(
        f"there is no backend {name!r}.{hint} Installed are: {', '.join(names)}."
        f" A plugin announces its backend in the entry-point group {_GROUP!r} or {_MLFLOW_GROUP!r}",
        backend=name,
    )


def available() -> tuple[str, ...]:
    """Return the names of all backends, sorted; those of plugins included."""
    return tuple(sorted({*native(), *_plugins(_MLFLOW_GROUP)}))


def native() -> tuple[str, ...]:
    """Return the names of the backends that are written for mlfleet, sorted; those of its plugins included."""
    return tuple(sorted(_BUILT_IN.keys() | _plugins(_GROUP).keys()))


@cache
def _plugins(group: str) -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    # mlfleet is itself a plugin of mlflow, which would come back here.
    return {entry.name: entry for entry in entry_points(group=group) if entry.module != "mlfleet.mlflow_plugin"}


def _native(name: str, entry: EntryPoint, extra: str | None) -> type[Backend]:
    backend = _load(name, entry, extra)
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise BackendNotFound(
            f"the backend {name!r} is announced as {entry.value!r}, which is not a subclass of Backend",
            backend=name,
        )
    return backend


def _load(name: str, entry: EntryPoint, extra: str | None) -> object:
    try:
        return entry.load()
    except ImportError as error:
        todo = f"pip install 'mlfleet[{extra}]'" if extra else f"install what {entry.value!r} needs"
        raise BackendNotFound(f"the backend {name!r} cannot be loaded: {error}. To do: {todo}", backend=name) from error
    except AttributeError as error:
        raise BackendNotFound(f"the backend {name!r} is announced as {entry.value!r}: {error}", backend=name) from error
    except Exception as error:
        # A plugin's module may raise anything when it is imported.
        text = f"the backend {name!r} cannot be loaded: {type(error).__name__}: {error}"
        raise BackendNotFound(text, backend=name) from error
