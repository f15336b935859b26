"""HTML for notebooks, in which text from elsewhere is data, never markup.

Notebooks have light and dark themes, and some remove style sheets. So all styles are inline, text has the colour of its
surroundings, and the colours of the statuses are readable on white and on black.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from mlfleet._text.plain import UNENCODABLE, clean

__all__ = ["Html", "block", "escaped", "facts", "link", "run_block", "status", "table", "values"]

_COLORS = {"FINISHED": "#2f8f5b", "FAILED": "#d9484f", "KILLED": "#b07a10", "RUNNING": "#3f82c8"}
_CELL = "text-align:left;vertical-align:top;padding:.15em 1em .15em 0;overflow-wrap:break-word"
_FAINT = "opacity:.7"


class Html(str):
    """A text that is HTML already."""

    __slots__ = ()


def escaped(value: object) -> Html:
    """Return the HTML that shows a value, without control characters and the secrets of URIs."""
    if isinstance(value, Html):
        return value
    # The messages of notebooks are UTF-8.
    return Html(escape(UNENCODABLE.sub("\ufffd", clean(str(value)))))


def block(*parts: object) -> str:
    """Return the parts below one another."""
    inside = "".join(f"<div>{escaped(part)}</div>" for part in parts if part)
    return f'<div style="font-size:.95em;line-height:1.5">{inside}</div>'


def run_block(name: str, state: str, rows: Iterable[tuple[str, object]]) -> str:
    """Return the name and the status or stage of a run, above the facts about it."""
    return block(Html(f"Run <b>{escaped(name)}</b> {status(state)}"), facts(rows))


def status(word: str) -> Html:
    """Return the word of a status or a stage in its colour."""
    return Html(f'<b style="color:{_COLORS.get(word, "inherit")}">{escaped(word)}</b>')


def link(text: object, url: str | None) -> Html:
    """Return a link with a text, or the text alone if there is no address."""
    if url is None:
        return escaped(text)
    return Html(f'<a href="{escaped(url)}" target="_blank" rel="noreferrer">{escaped(text)}</a>')


def values(pairs: Iterable[tuple[str, object]]) -> Html:
    """Return names with their values in one line."""
    return Html(" ".join(f'<span style="{_FAINT}">{escaped(name)}=</span>{escaped(value)}' for name, value in pairs))


def facts(rows: Iterable[tuple[str, object]]) -> Html:
    """Return names with their values below one another, without those that are empty."""
    shown = [(name, value) for name, value in rows if value]
    cells = "".join(
        f'<tr style="background:none"><td style="{_CELL};{_FAINT}">{escaped(name)}</td>'
        f'<td style="{_CELL}">{escaped(value)}</td></tr>'
        for name, value in shown
    )
    return Html(f'<table style="border:0;margin:0">{cells}</table>' if shown else "")


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """Return rows of cells below a heading, which may be empty."""
    heads = "".join(f'<th style="{_CELL}">{escaped(cell)}</th>' for cell in head)
    thead = f"<thead><tr>{heads}</tr></thead>" if head else ""
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escaped(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return Html(f'<table style="margin:.3em 0 .6em">{thead}<tbody>{body}</tbody></table>')
