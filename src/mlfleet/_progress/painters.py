"""The painters of views: a terminal by rich, a notebook by IPython's displays, and plain lines."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from mlfleet._concurrency.notebook import in_notebook
from mlfleet._progress.picture import Painter, Picture
from mlfleet._progress.terminal import colored, is_interactive, say, write_line
from mlfleet._text.html import Html, block, escaped, table
from mlfleet._text.plain import clean, short

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

__all__ = ["LinePainter", "NotebookPainter", "TerminalPainter", "choose_painter"]

_MOST_LINES = 10  # lines that a notebook keeps
_LINE_INTERVAL = 10.0  # seconds

_terminal = threading.Lock()
"""Held by the painter that uses the terminal: two would move the cursor into one another's lines."""


def choose_painter() -> Painter:
    """Return the painter for this place: a notebook, a terminal that no other one uses, else lines."""
    if in_notebook():
        return NotebookPainter()
    if is_interactive() and _terminal.acquire(blocking=False):
        return TerminalPainter(_terminal)
    return LinePainter()


class TerminalPainter:
    """Lasting lines above, the state below, which is painted over.

    Args:
        lock: Released at the end; None if no other painter can be there.
        spins: Keep the spinner turning between two pictures, in a thread of rich.
    """

    def __init__(self, lock: threading.Lock | None = None, *, spins: bool = False) -> None:
        self._lock = lock
        self._spins = spins
        self._live: Live | None = None
        self._spinner: Spinner | None = None

    def paint(self, picture: Picture) -> None:
        """Show a picture."""
        try:
            live = self._live or self._start()
            for color, line in picture.lines:
                # Only the terminal wraps the line, so that ids and addresses can be copied in one piece.
                live.console.print(
                    clean(line), style=color or None, markup=False, highlight=False, emoji=False, soft_wrap=True
                )
            live.update(self._region(picture), refresh=True)
        except OSError:
            return  # the terminal is gone; the runs go on

    def close(self) -> None:
        """Remove the state. A later picture shows it again."""
        try:
            live, self._live = self._live, None
            if live is not None:
                live.stop()
        finally:
            lock, self._lock = self._lock, None
            if lock is not None:
                lock.release()

    def _start(self) -> Live:
        # rich takes as long to import as the rest of the command line.
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._spinner = Spinner("dots")
        live = Live(console=Console(stderr=True), auto_refresh=self._spins, transient=True, redirect_stdout=False)
        self._live = live
        live.start()
        return live

    def _region(self, picture: Picture) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = []
        if picture.counts is not None:
            parts.append(_bar(picture))
            parts.append(Text.assemble("  ", *((f"{words}  ", style) for words, style in picture.numbers())))
        if picture.activity and self._spinner is not None:
            parts.append(_grid(self._spinner, _line(picture.activity, style="dim")))
        for row in picture.rows:
            parts.append(_line((f"  {short(row.name):<24}  {row.time:>6}  ", "cyan"), row.last))
        if picture.hidden and picture.rows:
            parts.append(Text(f"  and {picture.hidden} more", style="dim"))
        return Group(*parts)


def _line(*parts: str | tuple[str, str], style: str = "") -> Text:
    """Return a text, or several with their colours, that is cut where the terminal ends."""
    from rich.text import Text

    return Text.assemble(*parts, style=style, no_wrap=True, overflow="ellipsis")


def _grid(*cells: RenderableType) -> RenderableType:
    """Return cells beside each other."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_row(*cells)
    return grid


def _bar(picture: Picture) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    assert picture.counts is not None  # noqa: S101
    total, ended = picture.counts.total, picture.counts.ended
    bar = ProgressBar(total=total, completed=ended, width=40, pulse=total is None)
    share = "" if not total else f"{100 * ended // total:3d}%"
    return _grid(Text(short(picture.title), style="bold"), bar, Text(picture.share), Text(share))


class NotebookPainter:
    """One output of the cell that is updated, and whose last state stays."""

    def __init__(self) -> None:
        self._lines: deque[tuple[str, str]] = deque(maxlen=_MOST_LINES)
        self._dropped = 0
        self._shown: dict[str, str] = {}
        self._handle: Any = None

    def paint(self, picture: Picture) -> None:
        """Show a picture."""
        self._dropped += max(len(self._lines) + len(picture.lines) - _MOST_LINES, 0)
        self._lines.extend(picture.lines)
        data = {"text/html": self._html(picture), "text/plain": _plain(picture)}
        if data == self._shown:
            return
        from IPython.display import display

        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)
        self._shown = data

    def close(self) -> None:
        """Do nothing: the last picture stays."""

    def _html(self, picture: Picture) -> str:
        parts: list[object] = []
        if picture.counts is not None:
            total = picture.counts.total
            size = f'max="{total}" value="{picture.counts.ended}"' if total else ""
            bar = f'<progress {size} style="width:20em;max-width:50%;vertical-align:middle"></progress>'
            parts.append(Html(f"<b>{escaped(picture.title)}</b> {bar} {picture.share}"))
            parts.append(Html(" &nbsp; ".join(_colored(words, style) for words, style in picture.numbers())))
        parts.append(_colored(picture.activity, "dim") if picture.activity else "")
        if picture.rows:
            parts.append(table((), [(row.name, row.time, _code(row.last)) for row in picture.rows]))
            parts.append(f"and {picture.hidden} more" if picture.hidden else "")
        parts.append(_colored(f"({self._dropped} earlier lines)", "dim") if self._dropped else "")
        parts += [_colored(line.removeprefix("mlfleet: "), color) for color, line in self._lines]
        return block(*parts)


_COLORS = {
    "green": "color:#2f8f5b",
    "red": "color:#d9484f",
    "yellow": "color:#b07a10",
    "cyan": "color:#3f82c8",
    "dim": "opacity:.7",
    "bold": "font-weight:bold",
    "bold yellow": "font-weight:bold;color:#b07a10",
}


def _colored(text: str, style: str) -> Html:
    return Html(f'<span style="{_COLORS.get(style, "")}">{escaped(text)}</span>')


def _code(text: str) -> Html:
    return Html(f'<code style="background:none;color:inherit">{escaped(text)}</code>')


class LinePainter:
    """Lines on standard error: those that stay, and a line about the state now and then.

    Args:
        interval: The shortest time between two lines about the state, in seconds; infinite for none.
    """

    def __init__(self, interval: float = _LINE_INTERVAL) -> None:
        self._interval = interval
        self._next = time.monotonic() + interval
        self._last = ""

    def paint(self, picture: Picture) -> None:
        """Write the lines of a picture."""
        for color, line in picture.lines:
            write_line(colored(clean(line), color))
        state = _plain(picture)
        if state == self._last or time.monotonic() < self._next:
            return
        self._last, self._next = state, time.monotonic() + self._interval
        say(state)

    def close(self) -> None:
        """Do nothing: everything stays."""


def _plain(picture: Picture) -> str:
    """Return the state in one line."""
    if picture.counts is not None:
        return f"{picture.title} {picture.share}: " + ", ".join(words for words, _ in picture.numbers())
    if picture.rows:
        row = picture.rows[0]
        return f"{row.name} {row.time}" + (f": {row.last}" if row.last else "")
    return f"{picture.title} {picture.activity}".strip()
