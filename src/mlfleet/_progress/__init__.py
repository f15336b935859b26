"""Views of runs and sweeps while they go on: on a terminal, in a notebook, and as lines elsewhere."""

from mlfleet._progress.painters import TerminalPainter, choose_painter
from mlfleet._progress.screen import BestRuns, RunScreen, SweepScreen, shown
from mlfleet._progress.terminal import is_interactive, say, write_line

__all__ = [
    "BestRuns",
    "RunScreen",
    "SweepScreen",
    "TerminalPainter",
    "choose_painter",
    "is_interactive",
    "say",
    "shown",
    "write_line",
]
