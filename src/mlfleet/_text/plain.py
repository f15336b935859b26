"""Text from elsewhere, made safe to show on a terminal."""

from __future__ import annotations

import re

__all__ = ["CONTROLS", "UNENCODABLE", "plain_line", "plain_text"]

# NUL ends a string of the system and is no text in a database; a lone surrogate stands for a byte that is not UTF-8, as
# in an argument of a program, and has no encoding.
UNENCODABLE = re.compile("[\x00\ud800-\udfff]")

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
