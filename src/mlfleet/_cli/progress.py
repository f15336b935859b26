"""The progress of one run: a spinner on a terminal, lines elsewhere."""

from __future__ import annotations

from mlfleet._progress import Picture, TerminalPainter, activity, is_interactive, say
from mlfleet.runs import RunEvent, Stage

__all__ = ["Progress"]


class Progress:
    """The view of one run, which gives the terminal to the project as soon as its command may write.

    So it writes at once, and not in a thread like the screens.

    Args:
        inherits: The project itself writes to this terminal, so nothing else is written after its start.
        quiet: Show nothing.
    """

    def __init__(self, *, inherits: bool, quiet: bool) -> None:
        self._inherits = inherits
        self._quiet = quiet
        self._painter = TerminalPainter(spins=True) if is_interactive() and not quiet else None
        self._has_begun = False
        self._said: set[Stage] = set()

    def begin(self) -> None:
        """Show an activity before the first event arrives."""
        if self._painter is not None:
            self._painter.paint(Picture(activity="opening the tracking store"))

    def __call__(self, event: RunEvent) -> None:
        """Show the activity that an event begins."""
        if event.stage is Stage.STARTING and not self._has_begun:
            self._has_begun = True
            if self._inherits:
                # The terminal belongs to the project from now on, also while its backend does what takes long.
                self.close()
                self._painter = None
            self.say(f"running {event.run_name!r} (run {event.run_id})")
        if event.stage is Stage.FINISHED:
            self.close()
        elif self._painter is not None:
            doing = activity(event.stage, event.detail) or f"running ({event.run_name})"
            self._painter.paint(Picture(activity=doing))
        elif event.detail and event.stage not in self._said:
            # Activities without a detail take too little time to be worth a line.
            self._said.add(event.stage)
            self.say(activity(event.stage, event.detail, brief=True))

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if not self._quiet:
            say(text)

    def close(self) -> None:
        """Remove what does not stay."""
        if self._painter is not None:
            self._painter.close()
