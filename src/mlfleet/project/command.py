"""From an entry point and its parameters to the command that bash gets. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from mlfleet.project.parameters import ResolvedParameters
from mlfleet.project.spec import EntryPoint

__all__ = ["render"]


def render(entry_point: EntryPoint, parameters: ResolvedParameters, downloaded: Mapping[str, str] | None = None) -> str:
    """The command for ``bash -c``, every value quoted for the shell.

    Args:
        entry_point: whose command it is.
        parameters: as resolved for it.
        downloaded: parameter name → local path, for each of ``parameters.downloads``.
    """
    raise NotImplementedError
