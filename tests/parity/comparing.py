"""The comparison of two observations of one case."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parity.observing import Observed

__all__ = ["Pair", "differing"]

_ALWAYS = ("outcome", "runs", "project files", "temporary files", "processes", "backend_config")
_TRACKED = ("status", "end time", "experiment", "parameters ", "tags ")


@dataclass(frozen=True)
class Pair:
    """The observations of mlflow and of mlfleet."""

    theirs: Observed
    ours: Observed

    def describe(self, aspects: Iterable[str]) -> str:
        """Return those aspects of both sides as text."""
        lines = []
        for aspect in aspects:
            lines += [aspect, f"    mlflow:  {self.theirs.aspects.get(aspect)!r}"]
            lines += [f"    mlfleet: {self.ours.aspects.get(aspect)!r}"]
        for name, side in (("mlflow", self.theirs), ("mlfleet", self.ours)):
            if side.error:
                lines.append(f"{name} raised {side.classes[0]}: {side.error}")
        return "\n".join(lines)


def differing(pair: Pair) -> list[str]:
    """Return the aspects that differ, of those that can be compared.

    If only one side made a run or started a command, that is the difference, and its details are not compared.
    """
    theirs, ours = pair.theirs.aspects, pair.ours.aspects
    names = theirs.keys() | ours.keys()
    if theirs["outcome"] != ours["outcome"]:
        names = set(_ALWAYS)
    if "status" not in theirs or "status" not in ours:
        names = {name for name in names if not name.startswith(_TRACKED)}
    if ("command" in theirs) != ("command" in ours):
        names = {name for name in names if not name.startswith(("variables ", "folder", "exit code"))}
    return sorted(name for name in names if theirs.get(name) != ours.get(name))
