"""The progress of one run: a spinner on a terminal, lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from mlfleet._progress import activity, is_interactive, say
from mlfleet.runs import RunEvent, Stage

if TYPE_CHECKING:
    from rich.status import Status

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
        self._spinner = _Spinner() if is_interactive() and not quiet else None
        self._has_begun = False
        self._said: set[Stage] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hide()

    def begin(self) -> None:
        """Show an activity before the first event arrives."""
        if self._spinner is not None:
            self._spinner.show("opening the tracking store")

    def __call__(self, event: RunEvent) -> None:
        """Show the activity that an event begins."""
        if event.stage is Stage.STARTING and not self._has_begun:
            self._has_begun = True
            if self._inherits:
                # The terminal belongs to the project from now on, also while its backend does what takes long.
                self.hide()
                self._spinner = None
            self.say(f"running {event.run_name!r} (run {event.run_id})")
        if event.stage is Stage.FINISHED:
            self.hide()
        elif self._spinner is not None:
            self._spinner.show(activity(event.stage, event.detail) or f"running ({event.run_name})")
        elif event.detail and event.stage not in self._said:
            # Activities without a detail take too little time to be worth a line.
            self._said.add(event.stage)
            self.say(activity(event.stage, event.detail, brief=True))

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if not self._quiet:
            say(text)

    def hide(self) -> None:
        """Remove the spinner."""
        if self._spinner is not None:
            self._spinner.hide()


class _Spinner:
    """A line at the bottom of the terminal, created at its first use."""

    def __init__(self) -> None:
        self._status: Status | None = None

    def show(self, text: str) -> None:
        # rich takes as long to import as the rest of the command line.
        from rich.console import Console
        from rich.status import Status
        from rich.text import Text

        if self._status is None:
            self._status = Status("", console=Console(stderr=True))
            self._status.start()
        room = max(self._status.console.width - 4, 10)
        self._status.update(Text(text if len(text) <= room else f"{text[: room - 1]}…"))

    def hide(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
