"""One call of one project, made by mlflow and by mlfleet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.places import Place

__all__ = ["SIMPLE", "Case", "entry_point"]

SIMPLE = "name: simple\nentry_points: {main: {command: echo hello}}\n"
"""An MLproject for cases that are about something else."""


@dataclass(frozen=True)
class Case:
    """A call and its project. In all its texts ``@project``, ``@case`` and the like stand for what `Place` made.

    Attributes:
        name: of the test.
        differs: the ids of the differences that it shows, as in docs/differences.md, but for those that all cases show.
        mlproject: the text of its MLproject; None if it has none.
        mlproject_name: of that file.
        files: more files of the project.
        uri: the first argument.
        arguments: the others.
        environ: variables of the caller; None takes one away.
        prepare: makes what is more than files; is given the place.
        own_experiment: the case itself says which experiment.
        cancel: cancel it when the project has written into the FIFO ``@case/begun``.
        docker: it needs an engine and ``@image``.
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
    docker: bool = False


def entry_point(command: str, parameters: str = "") -> str:
    """An MLproject with one entry point; the command is a line, the parameters are YAML in one line."""
    lines = ["name: parity", "entry_points:", "  main:"]
    if parameters:
        lines.append(f"    parameters: {{{parameters}}}")
    return "\n".join([*lines, "    command: |-", *(f"      {line}" for line in command.split("\n"))]) + "\n"
