"""Spaces: which points come out of them, in which order, and what they say about mistakes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfleet import choice, grid, loguniform, normal, randint, rows, sample, uniform, zip_
from mlfleet._sweeps.points import Source
from mlfleet.errors import MlfleetError, SpecError, UsageError
from mlfleet.spaces import Space, describe


def test_grid_goes_through_every_combination_the_last_axis_fastest() -> None:
    space = grid(a=[1, 2], b=["x", "y"])
    assert list(space) == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    assert len(space) == 4


def test_a_grid_of_a_million_million_points_costs_nothing() -> None:
    space = grid(a=range(10**6), b=range(10**6))
    assert len(space) == 10**12
    assert list(itertools.islice(space, 2)) == [{"a": 0, "b": 0}, {"a": 0, "b": 1}]
    assert len(json.dumps(sample(10**9, a=uniform(0, 1)).describe())) < 200


def test_a_space_does_not_change_with_the_callers_list() -> None:
    values = [1, 2]
    space = grid(a=values)
    values.append(3)
    assert list(space) == [{"a": 1}, {"a": 2}]


def test_zip_takes_values_together() -> None:
    assert list(zip_(a=[1, 2], b=["x", "y"])) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


DISTRIBUTIONS: dict[str, Any] = {
    "u": uniform(-1, 3),
    "l": loguniform(1e-5, 1e-1),
    "i": randint(2, 4),
    "x": normal(5, 0.1),
    "c": choice(["sgd", "adam"]),
    "list": [True, False],
    "seed": randint(0, 9),
    "n": randint(0, 9),
}


@given(seed=st.integers(0, 2**32), n=st.integers(1, 50))
def test_samples_are_within_their_bounds_and_the_same_each_time(seed: int, n: int) -> None:
    space = sample(n, DISTRIBUTIONS, seed=seed)
    points = list(space)
    assert points == list(space)
    assert len(points) == len(space) == n
    for point in points:
        assert list(point) == list(DISTRIBUTIONS)
        assert -1 <= point["u"] <= 3
        assert 1e-5 <= point["l"] <= 1e-1
        assert point["i"] in (2, 3, 4)
        assert math.isfinite(point["x"])
        assert point["c"] in ("sgd", "adam")
        assert point["list"] in (True, False)


def test_other_seeds_give_other_points() -> None:
    assert list(sample(5, seed=1, a=uniform(0, 1))) != list(sample(5, seed=2, a=uniform(0, 1)))


def test_loguniform_takes_each_order_of_magnitude_as_often() -> None:
    points = [point["rate"] for point in sample(2000, rate=loguniform(1e-4, 1))]
    decades = [sum(1 for rate in points if 10**-n <= rate < 10 ** -(n - 1)) for n in (4, 3, 2, 1)]
    assert min(decades) > 400


def test_randint_reaches_both_bounds() -> None:
    assert {point["n"] for point in sample(100, n=randint(1, 3))} == {1, 2, 3}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".ndjson"])
async def test_rows_are_read_from_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"points{suffix}"
    if suffix == ".csv":
        path.write_text('\ufeffalpha,note\n0.1,"a, b"\n0.2,\n', encoding="utf-8")
        expected: list[dict[str, object]] = [{"alpha": "0.1", "note": "a, b"}, {"alpha": "0.2"}]
    else:
        path.write_text('{"alpha": 0.1, "note": "a, b"}\n\n{"alpha": 0.2}\n')
        expected = [{"alpha": 0.1, "note": "a, b"}, {"alpha": 0.2}]
    space = rows(path)
    assert list(space) == expected
    assert len(space) == 2
    source = Source(space)
    assert [await source.next() for _ in range(3)] == [*expected, None]
    assert await source.total() == 2


async def test_a_long_file_is_read_some_rows_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(1000)) + "broken\n")
    seen = 0
    source = Source(rows(path))
    with suppress(SpecError):
        while await source.next() == {"n": seen}:
            seen += 1
    assert 700 <= seen <= 1000


def test_rows_are_read_from_a_list() -> None:
    points = [{"a": 1}, {"a": 2, "b": 3}]
    assert list(rows(points)) == points
    assert describe(points) == {"rows": 2}


@pytest.mark.parametrize(
    "space",
    [grid(a=[1, 2.5, "x", None, Path("p")]), zip_(a=[1], b=[2]), sample(3, a=uniform(0, 1)), rows([{"a": 1}])],
    ids=lambda space: type(space).__name__,
)
def test_every_space_describes_itself_in_json(space: Space) -> None:
    assert json.loads(json.dumps(describe(space))) == describe(space)


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: grid(), r"grid\(\) without axes"),
    (lambda: grid(a=[]), "a has no values"),
    (lambda: grid(a="abc"), "a is 'abc': give a list"),
    (lambda: grid(a=5), "a is 5: give a list"),  # type: ignore[arg-type]
    (lambda: grid(a={"b": 1}), "give a list"),
    (lambda: zip_(a=[1, 2], b=[1]), "a has 2, b has 1"),
    (lambda: sample(0, a=uniform(0, 1)), "1 or more"),
    (lambda: sample(3), "without axes"),
    (lambda: sample(3, a=0.5), "a is 0.5"),  # type: ignore[arg-type]
    (lambda: uniform(2, 1), "the lower one first"),
    (lambda: uniform(0, math.inf), "finite"),
    (lambda: loguniform(0, 1), "above 0"),
    (lambda: randint(0, 1.5), "whole numbers"),  # type: ignore[arg-type]
    (lambda: normal(0, -1), "must not be negative"),
    (lambda: choice([]), "has no values"),
    (lambda: rows([]), "the list has no points"),
    (lambda: rows([1, 2]), "point 0 is 1"),  # type: ignore[list-item]
    (lambda: rows("points.txt"), r"ends in \.csv"),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_reported_at_once(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


FILES = [
    ("a.csv", b"alpha,note\n1\n", r"a\.csv, line 2: .*2 fields"),
    ("a.csv", b"alpha,note\n1,2,3\n", r"a\.csv, line 2: .*2 fields"),
    ("a.csv", b"alpha,\n1,2\n", "line 1: the first line must name"),
    ("a.csv", b'alpha\n"1\n', "this is not CSV"),
    ("a.csv", b"alpha\n\xff\n", "UTF-8"),
    ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: this line is not JSON"),
    ("a.jsonl", b"[1]\n", "line 1: this line holds list"),
    ("a.jsonl", b"[" * 100_000, "line 1: this line is not JSON: maximum recursion depth"),
    ("a.jsonl", b"\xff\n", "UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[message for *_, message in FILES])
def test_a_wrong_row_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError, match=message):
        list(rows(tmp_path / name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"gone\.csv: the file with the points cannot be read: No such file"):
        list(rows(tmp_path / "gone.csv"))


@given(st.binary(max_size=200), st.sampled_from([".csv", ".jsonl"]))
def test_any_content_of_a_file_gives_points_or_our_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("rows") / f"points{suffix}"
    path.write_bytes(data)
    try:
        for point in rows(path):
            assert isinstance(point, dict)
    except MlfleetError:
        pass
