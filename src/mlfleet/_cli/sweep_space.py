"""The points of ``mlfleet sweep``, as its ``-P`` options describe them.

alpha=0.5               one value for all runs
alpha=0.1,0.2,0.5       each of these values
l1=0:1:0.25             from 0 to 1 (included) in steps of 0.25
depth=1:3:1,10          a range and a value
lr=loguniform(1e-5,1)   drawn, with --sample
layers=[64,32],[8]      two texts: brackets keep their commas
note="a,b"              one text, whatever is in it: quotes as in a CSV file
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import click

from mlfleet._cli.options import read_pairs
from mlfleet.spaces import Distribution, Space, choice, grid, loguniform, normal, randint, rows, sample, uniform

__all__ = ["read_axis", "read_space"]

_CALL = re.compile(r"\s*([A-Za-z_]\w*)\((.*)\)\s*", re.S)
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_CLOSING = {"[": "]", "{": "}", "(": ")"}
# In a list or a JSON object: a text in quotes, or a bracket.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}()]')
_MOST_STEPS = 1_000_000
_DRAWS: Mapping[str, Callable[[Any, Any], Distribution]] = {
    "uniform": uniform,
    "loguniform": loguniform,
    "randint": randint,
    "normal": normal,
}


def read_space(
    texts: Sequence[str], *, draws: int | None = None, seed: int | None = None, points: str | None = None
) -> tuple[dict[str, Any], Space]:
    """Return the parameters that all runs share, and the space of the others.

    Args:
        texts: The values of ``-P``.
        draws: The number of points that ``--sample`` draws; None if it is not given.
        seed: The value of ``--seed``; None if it is not given.
        points: The file of ``--points``; None if it is not given.

    Raises:
        click.UsageError: The options contradict each other, or one of them cannot be read.
        UsageError: The bounds of a distribution, or the name of the file, are wrong.
    """
    axes = {name: read_axis(name, text) for name, text in read_pairs("-P", texts).items()}
    fixed = {name: axis for name, axis in axes.items() if isinstance(axis, str)}
    varied = {name: axis for name, axis in axes.items() if not isinstance(axis, str)}
    if seed is not None and draws is None:
        raise click.UsageError("--seed needs --sample")
    if points is not None:
        if varied or draws is not None:
            other = f"-P {next(iter(varied))} has several values" if varied else "--sample is given, too"
            raise click.UsageError(f"--points FILE gives all points, but {other}: give one of them")
        return fixed, rows(points)
    if not varied:
        raise click.UsageError(
            "there is nothing to sweep over: give a parameter several values (-P alpha=0.1,0.2 or -P alpha=0:1:0.1), "
            "or --points FILE"
        )
    if draws is not None:
        return fixed, sample(draws, varied, seed=seed or 0)
    lists: dict[str, Sequence[Any]] = {}
    for name, axis in varied.items():
        if isinstance(axis, Distribution):
            raise click.UsageError(f"-P {name} is a distribution: say with --sample N how many points to draw")
        lists[name] = axis
    return fixed, grid(lists)


def read_axis(name: str, text: str) -> str | Sequence[Any] | Distribution:
    """Return what one ``-P`` means: a text for all runs, a list of values, or a distribution.

    Raises:
        click.UsageError: The text cannot be read.
    """
    call = _CALL.fullmatch(text)
    if call is not None:
        return _distribution(name, text, call[1], call[2])
    items = _items(name, text)
    ranges = [_range(name, item) if quoted is False else None for item, quoted in items]
    if len(items) == 1 and ranges[0] is None:
        return items[0][0]
    values: list[Any] = []
    for (item, _), steps in zip(items, ranges, strict=True):
        values += [item] if steps is None else steps
    return values


def _distribution(name: str, text: str, function: str, arguments: str) -> Distribution:
    if function == "choice":
        values = read_axis(name, arguments)
        if isinstance(values, Distribution):
            raise click.UsageError(f"-P {name}={text}: choice(…) takes values, not another distribution")
        return choice([values] if isinstance(values, str) else values)
    if function not in _DRAWS:
        known = ", ".join([*_DRAWS, "choice"])
        raise click.UsageError(
            f"-P {name}={text}: there is no distribution {function!r}, only {known}. Put any other text into "
            f"quotes, as in -P '{name}=\"…\"'"
        )
    try:
        low, high = (int(part) if part.strip().lstrip("+-").isdigit() else float(part) for part in arguments.split(","))
    except ValueError:
        raise click.UsageError(f"-P {name}={text}: {function}(…) takes two numbers") from None
    return _DRAWS[function](low, high)


def _items(name: str, text: str) -> list[tuple[str, bool]]:
    """Return the parts between commas, each with True if it was in quotes. Brackets keep their commas."""
    if "," not in text and not text.startswith('"'):
        return [(text, False)]
    items: list[tuple[str, bool]] = []
    start = 0
    while True:
        quoted = _QUOTED.match(text, start)
        end = quoted.end() if quoted else _end_of_brackets(text, start)
        if end < 0 or (not quoted and text.startswith('"', start)) or (quoted and text[end : end + 1] not in ("", ",")):
            what = "bracket" if end < 0 else "quote"
            raise click.UsageError(
                f"-P {name}={text}: a {what} has no match. Quotes are as in a CSV file: put a text with commas into "
                'quotes ("a,b"), and write "" for a quote in it'
            )
        comma = text.find(",", end)
        stop = comma if comma >= 0 else len(text)
        items.append((quoted[1].replace('""', '"'), True) if quoted else (text[start:stop], False))
        if comma < 0:
            return items
        start = comma + 1


def _end_of_brackets(text: str, start: int) -> int:
    """Return the end of the brackets that begin at `start`: `start` if there are none, -1 if they are not closed."""
    if text[start : start + 1] not in tuple(_CLOSING):
        return start
    open_ones: list[str] = []
    for token in _TOKEN.finditer(text, start):
        if token[0] in _CLOSING:
            open_ones.append(_CLOSING[token[0]])
        elif token[0] == open_ones[-1]:
            open_ones.pop()
            if not open_ones:
                return token.end()
    return -1


def _range(name: str, item: str) -> list[int] | list[float] | None:
    """Return the numbers of ``start:stop:step``; None if the text is something else."""
    try:
        start, stop, step = map(Decimal, item.split(":"))
    except (ValueError, InvalidOperation):
        return None
    if not (start.is_finite() and stop.is_finite() and step.is_finite()):
        return None
    where = f"-P {name}={item}"
    quotes = f"(put a text that only looks like a range into quotes: -P '{name}=\"{item}\"')"
    if step == 0 or (stop - start) / step < 0:
        raise click.UsageError(f"{where}: start:stop:step never comes from {start} to {stop} {quotes}")
    count = math.floor((stop - start) / step) + 1
    if count > _MOST_STEPS:
        raise click.UsageError(f"{where}: these are {count} values, more than {_MOST_STEPS} {quotes}")
    values = [start + index * step for index in range(count)]
    # In decimal until here: 3 * 0.1 is 0.3, not 0.30000000000000004.
    if all(part == part.to_integral_value() for part in (start, step)):
        return [int(value) for value in values]
    return [float(value) for value in values]
