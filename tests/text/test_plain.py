"""Text from elsewhere, made safe to show on a terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfleet._text.plain import plain_line, plain_text


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("", ""),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("windows\r\nline", "windows\nline"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]52;c;Y2xpcGJvYXJk\x1b\\text", "text"),
        ("\x9b2Jtext", "2Jtext"),
        ("a\x08\x7f\x00b", "ab"),
        ("user\u202etxt.exe", "usertxt.exe"),
        ("an escape at the end\x1b", "an escape at the end"),
        ("ünïcödé 🙂", "ünïcödé 🙂"),
    ],
)
def test_terminal_control_sequences_are_removed(text: str, plain: str) -> None:
    assert plain_text(text) == plain


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    left = {character for character in plain_text(text) if unicodedata.category(character) == "Cc"}
    assert left <= {"\n", "\t"}
    assert all(character.isprintable() for character in plain_line(text))


def test_a_line_is_what_a_progress_bar_shows_at_the_end() -> None:
    assert plain_line("10%\r\x1b[2K55%\r100% done\r") == "100% done"
