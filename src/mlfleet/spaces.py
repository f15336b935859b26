"""Spaces: the points that a sweep runs. A space of a million points takes no memory.

A point is a mapping of parameter names to values. Sweeps take any iterable or asynchronous iterable of points; the
spaces of this module know their length, too, and describe themselves in one line.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mlfleet._concurrency.threads import FILES
from mlfleet.errors import SpecError, UsageError

__all__ = [
    "Choice",
    "Distribution",
    "LogUniform",
    "Normal",
    "Point",
    "Points",
    "RandInt",
    "Space",
    "Uniform",
    "choice",
    "describe",
    "grid",
    "loguniform",
    "normal",
    "randint",
    "rows",
    "sample",
    "uniform",
    "zip_",
]

Point: TypeAlias = Mapping[str, Any]
"""The names and values of one run's parameters."""

Points: TypeAlias = Iterable[Point] | AsyncIterable[Point]
"""The points of a sweep: a space, or any iterable or asynchronous iterable of points."""

_CHUNK = 256  # rows that are read from a file at once


class Space(ABC):
    """Points that can be iterated any number of times, always the same ones in the same order."""

    @abstractmethod
    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the points, which are made one by one."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of points."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return a description of this space in a few JSON values."""


def grid(axes: Mapping[str, Collection[Any]] | None = None, /, **more: Collection[Any]) -> Space:
    """Return the space of all combinations of the axes' values; the last axis changes fastest.

    Args:
        axes: The values of each parameter, for names that cannot be keywords: ``grid({"batch-size": [16, 32]})``.
        more: The values of each parameter, as keywords.

    Raises:
        UsageError: An axis is not a collection of values, or is empty.

    Example:
        >>> len(grid(alpha=[0.1, 0.5], l1=[0, 0.5, 1]))
        6
    """
    return _Grid(_axes("grid", axes, more))


def zip_(axes: Mapping[str, Collection[Any]] | None = None, /, **more: Collection[Any]) -> Space:
    """Return the space that takes the first values of all axes together, then the second ones, and so on.

    Args:
        axes: The values of each parameter, for names that cannot be keywords.
        more: The values of each parameter, as keywords. All axes have the same length.

    Raises:
        UsageError: An axis is not a collection of values, or the lengths differ.
    """
    checked = _axes("zip_", axes, more)
    if len({len(values) for values in checked.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(values)}" for name, values in checked.items())
        raise UsageError(f"zip_ needs as many values on each axis: {lengths}")
    return _Zip(checked)


def sample(
    n: int,
    axes: Mapping[str, Distribution | Collection[Any]] | None = None,
    /,
    *,
    seed: int = 0,
    **more: Distribution | Collection[Any],
) -> Space:
    """Return a space of random points.

    Args:
        n: The number of points.
        axes: The distribution of each parameter (`uniform`, `loguniform`, `randint`, `normal`, `choice`) or a
            collection to choose from, for names that cannot be keywords: ``sample(10, {"seed": randint(0, 99)})``.
        seed: The seed of the random numbers. The same seed gives the same points, so that a sweep can be resumed.
        more: The distribution of each parameter, as keywords.

    Raises:
        UsageError: `n` is less than 1, or an axis is neither a distribution nor a collection of values.
    """
    if type(n) is not int or n < 1:
        raise UsageError(f"sample({n!r}): give the number of points, 1 or more")
    given = {**(axes or {}), **more}
    if not given:
        raise UsageError("sample() without axes: give the parameters to draw, as in sample(10, alpha=uniform(0, 1))")
    drawn = {
        name: axis if isinstance(axis, Distribution) else Choice(_values("sample", name, axis))
        for name, axis in given.items()
    }
    return _Sample(n, seed, drawn)


def rows(source: Iterable[Point] | str | os.PathLike[str]) -> Space:
    """Return the points of a list, of a CSV file, or of a file with one JSON object per line.

    Args:
        source: A list of points, or the path of a file that ends in ``.csv``, ``.jsonl`` or ``.ndjson``. The first line
            of a CSV file names the parameters; an empty field means that the parameter is not given.

    Raises:
        UsageError: The source is none of these, or has no points.
        SpecError: A row is wrong, when the file is read; the error has the file and the line.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.suffix not in _READERS:
            raise UsageError(f"rows({str(path)!r}): give a file that ends in {', '.join(_READERS)}")
        return _FileRows(path.absolute())
    points = [_point(point, index) for index, point in enumerate(source)]
    if not points:
        raise UsageError("rows(): the list has no points: give at least one")
    return _Rows(points)


def describe(points: Points) -> dict[str, Any]:
    """Return a description of a space in a few JSON values."""
    if isinstance(points, Space):
        return points.describe()
    if isinstance(points, Sequence):
        return {"rows": len(points)}
    return {"iterable": type(points).__name__}


# ---- distributions --------------------------------------------------------------------------------------------------


class Distribution(ABC):
    """A distribution of the values of one parameter."""

    @abstractmethod
    def draw(self, random: random.Random) -> Any:
        """Draw one value."""


@dataclass(frozen=True, slots=True)
class Uniform(Distribution):
    """The distribution that `uniform` returns."""

    low: float
    high: float

    def draw(self, random: random.Random) -> float:
        """Draw one value."""
        return random.uniform(self.low, self.high)


@dataclass(frozen=True, slots=True)
class LogUniform(Distribution):
    """The distribution that `loguniform` returns."""

    low: float
    high: float

    def draw(self, random: random.Random) -> float:
        """Draw one value."""
        value = math.exp(random.uniform(math.log(self.low), math.log(self.high)))
        return min(max(value, self.low), self.high)


@dataclass(frozen=True, slots=True)
class RandInt(Distribution):
    """The distribution that `randint` returns."""

    low: int
    high: int

    def draw(self, random: random.Random) -> int:
        """Draw one value."""
        return random.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Normal(Distribution):
    """The distribution that `normal` returns."""

    mean: float
    deviation: float

    def draw(self, random: random.Random) -> float:
        """Draw one value."""
        return random.gauss(self.mean, self.deviation)


@dataclass(frozen=True, slots=True)
class Choice(Distribution):
    """The distribution that `choice` returns."""

    values: Sequence[Any]

    def draw(self, random: random.Random) -> Any:
        """Draw one value."""
        return random.choice(self.values)


def uniform(low: float, high: float) -> Distribution:
    """Return the distribution in which all numbers from `low` to `high` are equally likely."""
    _bounds("uniform", low, high)
    return Uniform(low, high)


def loguniform(low: float, high: float) -> Distribution:
    """Return the distribution from `low` to `high` in which all orders of magnitude are equally likely.

    It suits learning rates and regularization strengths.
    """
    _bounds("loguniform", low, high)
    if low <= 0:
        raise UsageError(f"loguniform({low!r}, {high!r}): the bounds must be above 0")
    return LogUniform(low, high)


def randint(low: int, high: int) -> Distribution:
    """Return the distribution of the whole numbers from `low` to `high`, both included."""
    _bounds("randint", low, high)
    if int(low) != low or int(high) != high:
        raise UsageError(f"randint({low!r}, {high!r}): the bounds must be whole numbers")
    return RandInt(int(low), int(high))


def normal(mean: float, deviation: float) -> Distribution:
    """Return the normal distribution around `mean` with the standard deviation `deviation`."""
    if not deviation >= 0:
        raise UsageError(f"normal({mean!r}, {deviation!r}): the deviation must not be negative")
    return Normal(mean, deviation)


def choice(values: Collection[Any]) -> Distribution:
    """Return the distribution in which all `values` are equally likely."""
    return Choice(_values("choice", "values", values))


def _bounds(name: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise UsageError(f"{name}({low!r}, {high!r}): give two finite numbers, the lower one first")


# ---- the spaces -----------------------------------------------------------------------------------------------------


class _Grid(Space):
    def __init__(self, axes: Mapping[str, Sequence[Any]]) -> None:
        self._axes = axes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self._axes.values()):
            yield dict(zip(self._axes, values, strict=True))

    def __len__(self) -> int:
        return math.prod(len(values) for values in self._axes.values())

    def describe(self) -> dict[str, Any]:
        return {"grid": {name: [_plain(value) for value in values] for name, values in self._axes.items()}}


class _Zip(Space):
    def __init__(self, axes: Mapping[str, Sequence[Any]]) -> None:
        self._axes = axes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for values in zip(*self._axes.values(), strict=True):
            yield dict(zip(self._axes, values, strict=True))

    def __len__(self) -> int:
        return len(next(iter(self._axes.values())))

    def describe(self) -> dict[str, Any]:
        return {"zip": {name: [_plain(value) for value in values] for name, values in self._axes.items()}}


class _Sample(Space):
    def __init__(self, n: int, seed: int, axes: Mapping[str, Distribution]) -> None:
        self._n = n
        self._seed = seed
        self._axes = axes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = random.Random(self._seed)  # noqa: S311 - nothing secret depends on it
        for _ in range(self._n):
            yield {name: axis.draw(generator) for name, axis in self._axes.items()}

    def __len__(self) -> int:
        return self._n

    def describe(self) -> dict[str, Any]:
        return {"sample": self._n, "seed": self._seed, "axes": {name: str(axis) for name, axis in self._axes.items()}}


class _Rows(Space):
    def __init__(self, points: Sequence[Point]) -> None:
        self._points = points

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for point in self._points:
            yield dict(point)

    def __len__(self) -> int:
        return len(self._points)

    def describe(self) -> dict[str, Any]:
        return {"rows": len(self._points)}


class _FileRows(Space):
    """The points of a file. Iteration blocks; asynchronous iteration reads some rows at a time in a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return _READERS[self._path.suffix](self._path)

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        points = iter(self)
        while chunk := await FILES.run(lambda: list(itertools.islice(points, _CHUNK))):
            for point in chunk:
                yield point

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def describe(self) -> dict[str, Any]:
        return {"rows": str(self._path)}


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with _open(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            if not all(reader.fieldnames or [""]):
                raise SpecError("the first line must name the parameters, each column one", path=path, line=1)
            for row in reader:
                if None in row or None in row.values():
                    raise SpecError(
                        f"this row does not have {len(reader.fieldnames or ())} fields as the first line does",
                        path=path, line=reader.line_num,
                    )  # fmt: skip
                yield {name: value for name, value in row.items() if value != ""}
        except csv.Error as error:
            raise SpecError(f"this is not CSV: {error}", path=path, line=reader.line_num) from error
        except UnicodeDecodeError as error:
            raise SpecError("the file is not UTF-8", path=path) from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with _open(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    point = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SpecError(f"this line is not JSON: {error}", path=path, line=number) from error
                if not isinstance(point, dict):
                    raise SpecError(
                        f"this line holds {type(point).__name__}, not a JSON object", path=path, line=number
                    )
                yield point
        except UnicodeDecodeError as error:
            raise SpecError("the file is not UTF-8", path=path) from error


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}


def _open(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise SpecError(f"the file with the points cannot be read: {error.strerror}", path=path) from error


def _axes(function: str, axes: Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    given = {**(axes or {}), **more}
    if not given:
        raise UsageError(f"{function}() without axes: give parameters and their values, as in {function}(alpha=[1, 2])")
    return {name: _values(function, name, values) for name, values in given.items()}


def _values(function: str, name: str, values: Any) -> Sequence[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise UsageError(f"{function}: {name} is {values!r}: give a list of values")
    # A range stays a range, however long it is. Other collections are copied: the caller may change them.
    kept = values if isinstance(values, range) else tuple(values)
    if not kept:
        raise UsageError(f"{function}: {name} has no values")
    return kept


def _point(point: object, index: int) -> dict[str, Any]:
    if not isinstance(point, Mapping):
        raise UsageError(f"rows(): point {index} is {point!r}: give mappings of parameter names to values")
    return dict(point)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)
