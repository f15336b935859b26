"""Text from elsewhere, made safe to show, and short forms of values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlfleet._text.masking import mask_uri

__all__ = ["CONTROLS", "UNENCODABLE", "clean", "duration_text", "plain_line", "plain_text", "point_text", "short"]

# NUL ends a string of the system and is no text in a database; a lone surrogate stands for a byte that is not UTF-8, as
# in an argument of a program, and has no encoding.
UNENCODABLE = re.compile("[\x00\ud800-\udfff]")

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|.)?", re.S)
# C0 but for tab and line feed, DEL, C1 (a single 0x9b begins a control sequence, too: ECMA-48, 5.4), and the characters
# that reorder the text around them (https://trojansource.codes).
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain_text(text: str) -> str:
    """Return `text` without escape sequences and control characters; its line ends and tabs stay.

    Whatever a server, a repository or a run wrote may stand in a message. Printed as it is, it could move the cursor,
    set the window's title or fill the clipboard.
    """
    if text.isascii() and text.isprintable():
        return text
    return CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n")))


def plain_line(line: str) -> str:
    """Return what a terminal would finally show of a line of output, without anything that could move its cursor."""
    text = _ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2]
    return "".join(character if character.isprintable() else " " for character in text).strip()


def clean(text: str) -> str:
    """Return `text` without control characters, and with the secrets of URIs masked."""
    plain = plain_text(text)
    return _URI.sub(lambda match: mask_uri(match[0]), plain) if "://" in plain else plain


def short(value: object) -> str:
    """Return a value in one short line."""
    text = f"{value:g}" if isinstance(value, float) else " ".join(clean(str(value)).split())
    return text if len(text) <= 40 else f"{text[:39]}…"


def point_text(point: Mapping[str, Any]) -> str:
    """Return the parameters of a point in one short line."""
    return " ".join(f"{name}={short(value)}" for name, value in point.items())


def duration_text(seconds: float) -> str:
    """Return a duration in its two largest units."""
    whole = max(int(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
