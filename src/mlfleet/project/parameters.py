"""The parameters of a run: checked, resolved, ready for the command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlfleet.project.spec import EntryPoint

__all__ = ["Download", "ResolvedParameters", "resolve"]


@dataclass(frozen=True, slots=True)
class Download:
    """A ``path`` parameter that names a remote URI.

    Attributes:
        name: of the parameter.
        uri: what to download.
        index: of the sub-folder ``param_<index>`` of the run's storage folder.
    """

    name: str
    uri: str
    index: int


@dataclass(frozen=True, slots=True)
class ResolvedParameters:
    """All parameters of a run.

    Attributes:
        logged: name → raw text for MLflow, declared and extra ones.
        declared: name → text for the command. Those in `downloads` still hold their URI.
        extra: not declared; appended to the command as ``--name value``, in this order.
        downloads: what must be downloaded before the command can be rendered.
    """

    logged: Mapping[str, str]
    declared: Mapping[str, str]
    extra: Mapping[str, str]
    downloads: tuple[Download, ...] = ()


def resolve(entry_point: EntryPoint, given: Mapping[str, object] | None) -> ResolvedParameters:
    """Check `given` against what the entry point declares. Reads the disk only to see that local paths exist.

    Raises:
        ParameterError: names every missing or wrong parameter in one text.
    """
    raise NotImplementedError
