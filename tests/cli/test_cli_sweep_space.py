"""How ``-P`` of ``mlfleet sweep`` is read: lists, ranges, distributions, and texts that only look like them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfleet._cli.sweep_space import read_axis, read_space
from mlfleet.errors import UsageError


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("0.5", "0.5"),
        ("", ""),
        ("a b", "a b"),
        ("s3://bucket/data", "s3://bucket/data"),
        ("12:30", "12:30"),
        ('{"a": 1}', '{"a": 1}'),
        ("0.1,0.2", ["0.1", "0.2"]),
        ("a,,b", ["a", "", "b"]),
        ("0:1:0.25", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("0:0.3:0.1", [0.0, 0.1, 0.2, 0.3]),
        ("1:6:2", [1, 3, 5]),
        ("3:1:-1", [3, 2, 1]),
        ("1e-3:3e-3:1e-3", [0.001, 0.002, 0.003]),
        ("1:3:1,10", [1, 2, 3, "10"]),
        ('"a,b"', "a,b"),
        ('"a,b",c', ["a,b", "c"]),
        ('"0:1:0.5"', "0:1:0.5"),
        ('"0:1:1",0:1:1', ["0:1:1", 0, 1]),
        ('"choice(a,b)"', "choice(a,b)"),
        ("[64,32]", "[64,32]"),
        ("[64,32],[8]", ["[64,32]", "[8]"]),
        ('{"a": 1, "b": [2, 3]}', '{"a": 1, "b": [2, 3]}'),
        ('{"a": "x]}", "b": 1},0', ['{"a": "x]}", "b": 1}', "0"]),
        ("(1,2),3:5:1", ["(1,2)", 3, 4, 5]),
        ("[a,b]c,d", ["[a,b]c", "d"]),
        ("a[0],b", ["a[0]", "b"]),
        ("[0", "[0"),
        ('"say ""no"""', 'say "no"'),
    ],
)
def test_a_parameter_is_a_text_a_list_or_a_range(text: str, axis: str | list[object]) -> None:
    assert read_axis("x", text) == axis


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), min_size=2))
def test_quoted_texts_are_read_unchanged(texts: list[str]) -> None:
    line = io.StringIO()
    csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="").writerow(texts)
    assert read_axis("x", line.getvalue()) == texts


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "nothing to sweep over"),
        (["alpha=1"], "give a parameter several values"),
        (["alpha"], "NAME=VALUE"),
        (["a=1,2", "a=3"], "-P 'a' is given twice"),
        (["a=1:0:1"], "never comes from 1 to 0"),
        (["a=0:1:0"], "never comes from 0 to 1"),
        (["a=0:1:1e-9"], "1000000001 values, more than 1000000"),
        (['a="b'], "a quote has no match. Quotes are as in a CSV file"),
        (['a="b"c,d'], "a quote has no match. Quotes are as in a CSV file"),
        (["a=[64,32"], "a bracket has no match"),
        (["a=[64,(32],1)"], "a bracket has no match"),
        (["a=uniform(0,1)"], "say with --sample N how many points"),
        (["a=logunifrom(0,1)"], "there is no distribution 'logunifrom', only uniform, loguniform, randint, normal"),
        (["a=uniform(1)"], "uniform(…) takes two numbers"),
        (["a=choice(uniform(0,1))"], "choice(…) takes values"),
    ],
)
def test_options_without_a_space_are_refused(texts: Sequence[str], message: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        read_space(texts)
    assert message in caught.value.message


def test_bounds_are_checked_as_in_python() -> None:
    with pytest.raises(UsageError, match="the bounds must be above 0"):
        read_space(["a=loguniform(0,1)"], draws=3)


def test_a_grid_leaves_the_fixed_parameters_out() -> None:
    fixed, space = read_space(["data=x.csv", "a=1,2", "b=0:1:0.5"])
    assert fixed == {"data": "x.csv"}
    assert list(space) == [{"a": a, "b": b} for a in ("1", "2") for b in (0.0, 0.5, 1.0)]


def test_samples_draw_from_lists_ranges_and_distributions() -> None:
    texts = ["a=1,2", "b=1:9:1", "c=loguniform(1e-5,1)", "d=choice(x,y)", "e=randint(3,4)", "f=fixed"]
    fixed, space = read_space(texts, draws=40, seed=7)
    points = list(space)
    assert fixed == {"f": "fixed"}
    assert len(points) == 40
    assert {point["a"] for point in points} == {"1", "2"}
    assert {point["d"] for point in points} == {"x", "y"}
    assert {point["e"] for point in points} == {3, 4}
    assert {point["b"] for point in points} <= set(range(1, 10))
    assert all(1e-5 <= point["c"] <= 1 for point in points)
    assert points == list(read_space(texts, draws=40, seed=7)[1])
    assert points != list(read_space(texts, draws=40, seed=8)[1])


def test_choices_may_be_lists() -> None:
    _, space = read_space(["layers=choice([64,32],[8])"], draws=20)
    assert {point["layers"] for point in space} == {"[64,32]", "[8]"}


def test_points_of_a_file_are_joined_by_fixed_parameters(tmp_path: Path) -> None:
    file = tmp_path / "points.csv"
    file.write_text("a,b\n1,x\n2,y\n")
    fixed, space = read_space(["c=3"], points=str(file))
    assert fixed == {"c": "3"}
    assert list(space) == [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]


@pytest.mark.parametrize(("texts", "draws"), [(["a=1,2"], None), ([], 5)])
def test_points_and_another_space_contradict_each_other(texts: list[str], draws: int | None) -> None:
    with pytest.raises(click.UsageError, match="--points FILE gives all points"):
        read_space(texts, draws=draws, points="points.csv")


def test_a_seed_without_a_sample_is_a_mistake() -> None:
    with pytest.raises(click.UsageError, match="--seed needs --sample"):
        read_space(["a=1,2"], seed=3)
