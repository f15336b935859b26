"""The description of one call of one project, which mlflow and mlfleet both make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.places import Place

__all__ = ["SIMPLE", "Case", "entry_point"]

SIMPLE = "name: simple\nentry_points: {main: {command: echo hello}}\n"
"""An MLproject for cases about other things."""


@dataclass(frozen=True)
class Case:
    """A call and its project. In all its texts ``@project``, ``@case`` and other words stand for the paths of `Place`.

    Attributes:
        name: The name of the test.
        differs: The ids of the differences in docs/differences.md that it shows, without those that all cases show.
        mlproject: The text of its MLproject; None if it has none.
        mlproject_name: The name of that file.
        files: More files of the project.
        uri: The first argument.
        arguments: The other arguments, by name.
        environ: Variables of the caller; None removes one.
        prepare: A function that prepares the place beyond files.
        own_experiment: The case itself chooses the experiment.
        cancel: Cancel the run when the project has written into the FIFO ``@case/begun``.
        as_paths: Pass the project's folder and the ``storage_dir`` as ``pathlib.Path``.
        docker: The case needs an engine and ``@image``.
    """

    name: str
    differs: tuple[str, ...] = ()
    mlproject: str | None = SIMPLE
    mlproject_name: str = "MLproject"
    files: Mapping[str, str] = field(default_factory=dict)
    uri: str = "@project"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str | None] = field(default_factory=dict)
    prepare: Callable[[Place], None] | None = None
    own_experiment: bool = False
    cancel: bool = False
    as_paths: bool = False
    docker: bool = False


def entry_point(command: str, parameters: str = "") -> str:
    """Return an MLproject with one entry point; the parameters are YAML in one line."""
    lines = ["name: parity", "entry_points:", "  main:"]
    if parameters:
        lines.append(f"    parameters: {{{parameters}}}")
    return "\n".join([*lines, "    command: |-", *(f"      {line}" for line in command.split("\n"))]) + "\n"
