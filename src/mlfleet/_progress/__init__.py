"""Views of runs and sweeps while they go on: on a terminal, in a notebook, and as lines elsewhere."""

from mlfleet._progress.painters import LinePainter, TerminalPainter, choose_painter
from mlfleet._progress.picture import BestRuns, Picture, activity
from mlfleet._progress.screen import RunScreen, SweepScreen, shown
from mlfleet._progress.terminal import colored, is_interactive, say, write_line

__all__ = [
    "BestRuns",
    "LinePainter",
    "Picture",
    "RunScreen",
    "SweepScreen",
    "TerminalPainter",
    "activity",
    "choose_painter",
    "colored",
    "is_interactive",
    "say",
    "shown",
    "write_line",
]
