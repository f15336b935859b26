"""The progress of one run: a spinner on a terminal, lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from mlfleet._progress import is_interactive, say
from mlfleet._text.plain import clean
from mlfleet.runs import RunEvent, Stage

if TYPE_CHECKING:
    from rich.status import Status

__all__ = ["Progress"]


class Progress:
    """A view of the events of one run.

    Args:
        inherits: The project itself writes to this terminal, so nothing else is written after its start.
        quiet: Show nothing.
    """

    def __init__(self, *, inherits: bool, quiet: bool) -> None:
        self._inherits = inherits
        self._quiet = quiet
        self._spinner = _Spinner() if is_interactive() and not quiet else None
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hide()

    def begin(self) -> None:
        """Show an activity before the first event arrives."""
        self._show("opening the tracking store")

    def __call__(self, event: RunEvent) -> None:
        """Show the activity that an event begins."""
        match event.stage:
            case Stage.FETCHING:
                self._show("fetching the project", event.detail)
            case Stage.QUEUED:
                self._show("getting the run ready")
            case Stage.PREPARING if event.detail:
                self._show("building the environment", event.detail)
            case Stage.PREPARING:
                self._show("preparing the environment")
            case Stage.STARTING:
                self._begin(event)
            case Stage.STARTED if not self._inherits:
                self._show(f"running ({event.run_name})")
            case Stage.FINISHED:
                self.hide()

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if not self._quiet:
            say(text)

    def hide(self) -> None:
        """Remove the spinner."""
        if self._spinner is not None:
            self._spinner.hide()

    def _begin(self, event: RunEvent) -> None:
        """Announce the run, and leave the terminal to the project if it writes there."""
        if self._inherits:
            self.hide()
        self.say(f"running {event.run_name!r} (run {event.run_id})")
        if not self._inherits:
            self._show("starting")

    def _show(self, activity: str, detail: str = "") -> None:
        if self._spinner is not None:
            self._spinner.show(f"{activity}: {detail.strip()}" if detail.strip() else activity)
        elif detail and activity not in self._said:
            # Activities without a detail take too little time to be worth a line.
            self._said.add(activity)
            self.say(activity)


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
        plain = " ".join(clean(text).split())
        self._status.update(Text(plain if len(plain) <= room else f"{plain[: room - 1]}…"))

    def hide(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
