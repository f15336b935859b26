"""The texts of lists: ``[64,32]``, as MLflow keeps them and command lines give them."""

from __future__ import annotations

import json
from collections.abc import Sequence

__all__ = ["format_list", "parse_list"]


def parse_list(text: str) -> tuple[str, ...]:
    """Return the items of a list.

    ``[…]`` is JSON, or else texts with commas between them; an empty text is the empty list. Anything else is one item.

    Raises:
        ValueError: An item is not a plain value; the text says so.
    """
    stripped = text.strip()
    if not stripped:
        return ()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return (text,)
    try:
        # Numbers as they are written: 0.10 is not 0.1.
        items = json.loads(stripped, parse_float=str, parse_int=str, parse_constant=str)
    except (ValueError, RecursionError):
        inner = stripped[1:-1]
        if any(sign in inner for sign in '[]{}"'):
            raise ValueError("a list such as [a,b] or a JSON array of plain values was expected") from None
        items = [item.strip() for item in inner.split(",")]
    if not all(isinstance(item, str | bool) for item in items):
        raise ValueError("a list of plain values was expected, this holds others")
    return tuple(item if isinstance(item, str) else str(item).lower() for item in items)


def format_list(items: Sequence[str]) -> str:
    """Return a text of which `parse_list` makes the same items: short where that is possible, else JSON."""
    short = f"[{','.join(items)}]"
    try:
        is_same = parse_list(short) == tuple(items)
    except ValueError:
        is_same = False
    return short if is_same else json.dumps(list(items), ensure_ascii=False)
