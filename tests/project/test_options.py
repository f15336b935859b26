"""Flags, optional parameters, lists and options: the words that a placeholder stands for, as bash gets them."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfleet import Fleet, ParameterError, RunStatus, SpecError, grid
from mlfleet._project.command import render, substitute
from mlfleet._project.lists import format_list, parse_list
from mlfleet._project.parameters import resolve
from mlfleet._project.spec import EntryPoint, Parameter, read_project
from mlfleet.errors import MlfleetError
from mlfleet.testing import FakeTracking

PARAMETERS = """\
    parameters:
      flag: {type: bool, default: false}
      short: {type: bool, default: no, option: -s}
      tags: {type: list, default: []}
      words: {type: list, default: [1, 2.50, "a b"], option: ""}
      note: {type: string, default: "", optional: true}
      steps: {type: int, default: "", optional: true, option: "trainer.steps="}
      rate: {type: float, default: 0.5, option: --lr}
      name: {default: x}
"""


def declared(folder: Path, command: str) -> EntryPoint:
    text = f"entry_points:\n  main:\n{PARAMETERS}    command: |-\n"
    (folder / "MLproject").write_text(text + "".join(f"      {line}\n" for line in command.splitlines()))
    return read_project(folder).entry_point("main")


def command_of(entry_point: EntryPoint, **given_values: Any) -> str:
    return render(entry_point, resolve(entry_point, given_values))


def words_of(command: str) -> list[str]:
    """Return what bash passes to a program that stands in the command as ``show``."""
    script = f"show() {{ [ $# = 0 ] || printf '%s\\0' \"$@\"; }}\n{command}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    ("command", "values", "words"),
    [
        ("show {flag} end", {}, ["end"]),
        ("show {flag} end", {"flag": True}, ["--flag", "end"]),
        ("show {flag} end", {"flag": "yes"}, ["--flag", "end"]),
        ("show {short} end", {"short": 1}, ["-s", "end"]),
        ("show --deterministic {short} end", {"short": "on"}, ["--deterministic", "-s", "end"]),
        # As the value of an option, and as part of a word, a flag is what it is to mlflow.
        ("show --flag {flag} --x={flag} '{flag}'", {"flag": True}, ["--flag", "True", "--x=True", "True"]),
        ("show \"{flag}\" f{flag}", {"flag": True}, ["True", "fTrue"]),
        ("show -s {short}", {}, ["-s", "False"]),
        ("show {tags} end", {}, ["end"]),
        ("show {tags} end", {"tags": ["a b", 2, "$(x)"]}, ["--tags", "a b", "--tags", "2", "--tags", "$(x)", "end"]),
        ("show --tag {tags} end", {"tags": ["a", "b"]}, ["--tag", "a", "--tag", "b", "end"]),
        ("show --tag={tags} end", {"tags": ["a", "b c"]}, ["--tag=a", "--tag=b c", "end"]),
        ("show -t {tags} end", {"tags": "[a,b]"}, ["-t", "a", "-t", "b", "end"]),
        ("show --tag {tags} end", {"tags": []}, ["end"]),
        ("show '{tags}'", {"tags": ["a", "b"]}, ["[a,b]"]),
        ("show --words {words} end", {}, ["--words", "1", "2.5", "a b", "end"]),
        ("for word in {words}; do show $word; done", {"words": [3, 4]}, ["3", "4"]),
        ("show --note {note} end", {}, ["end"]),
        ("show --note {note} end", {"note": "it's"}, ["--note", "it's", "end"]),
        ("show --note={note} -n {note} {note} end", {}, ["end"]),
        ("show \\\n  --note {note} \\\n  end", {}, ["end"]),
        ("show --note \\\n  {note} end", {}, ["end"]),
        ("show '{note}' x{note} end", {}, ["", "x", "end"]),
        ("[ -z {note} ] && show empty; test -n {note} || show empty", {}, ["empty", "empty"]),
        ("[[ a == a && -z {note} ]] && show empty; case {note} in '') show empty;; esac", {}, ["empty", "empty"]),
        ("show {steps} end", {}, ["end"]),
        ("show {steps} end", {"steps": 5}, ["trainer.steps=5", "end"]),
        ("show {rate} --lr {rate} {name}", {"rate": 1}, ["--lr", "1", "--lr", "1", "x"]),
        ("show {flag}; show {tags} && show {note}", {"flag": True, "tags": [1]}, ["--flag", "--tags", "1"]),
        ("(show {flag}) | cat", {"flag": True}, ["--flag"]),
        ("show {flag} {short} {tags} {note} {name}", {"flag": True}, ["--flag", "x"]),
        ("show x\\ --note {name}", {}, ["x --note", "x"]),
    ],
)  # fmt: skip
def test_a_placeholder_stands_for_whole_words(
    tmp_path: Path, command: str, values: dict[str, object], words: list[str]
) -> None:
    assert words_of(command_of(declared(tmp_path, command), **values)) == words


def test_undeclared_parameters_are_appended_as_before(tmp_path: Path) -> None:
    command = command_of(declared(tmp_path, "show {flag} {tags}"), flag=True, tags=["a"], other=False)
    assert words_of(command) == ["--flag", "--tags", "a", "--other", "False"]


def test_the_text_for_mlflow_is_what_was_given_and_lists_have_one_of_their_own(tmp_path: Path) -> None:
    resolved = resolve(declared(tmp_path, "show"), {"flag": "yes", "tags": ("a", 1), "words": ["a,b", "c"]})
    assert resolved.logged["flag"] == "yes"
    assert resolved.logged["tags"] == "[a,1]"
    assert resolved.logged["words"] == '["a,b", "c"]'
    assert resolved.logged["note"] == ""
    again = resolve(declared(tmp_path, "show"), resolved.logged)
    assert again.lists == resolved.lists == {"tags": ("a", "1"), "words": ("a,b", "c")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flag": "maybe"}, "'flag': true or false was expected, got 'maybe'"),
        ({"flag": ""}, "'flag': true or false was expected, got ''"),
        ({"steps": "1.5"}, "'steps': a whole number was expected, got '1.5'"),
        ({"steps": True}, "'steps': a whole number was expected, got 'True'"),
        ({"tags": [[1]]}, "'tags': a string, a number, a boolean or a path was expected, got list"),
        ({"tags": "[[1],[2]]"}, "'tags': a list of plain values was expected"),
        ({"tags": "[{a: 1}]"}, "'tags': a list such as"),
        ({"name": ["a"]}, r"got list \(several values need `type: list` in MLproject\)"),
        ({"other": [1, 2]}, r"'other': .*got list \(several values need `type: list`"),
        ({"tags": ["a\0"]}, "'tags': the value holds a NUL"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        resolve(declared(tmp_path, "show"), values)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("{optional: maybe}", "optional: expected true or false, found the string 'maybe'"),
        ("{option: '; rm'}", "'; rm' is not an option such as --name"),
        ("{option: [a]}", "expected an option such as --name, found a list"),
        ("{type: list, default: [[1]]}", "its default is wrong"),
        ("{default: [1]}", "its default is wrong"),
    ],
)
def test_wrong_declarations_are_refused(tmp_path: Path, parameter: str, message: str) -> None:
    (tmp_path / "MLproject").write_text(f"entry_points: {{main: {{command: show, parameters: {{a: {parameter}}}}}}}\n")
    with pytest.raises((SpecError, ParameterError), match=message):
        resolve(read_project(tmp_path).entry_point("main"), {})


def test_an_optional_parameter_needs_no_default(tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text(
        "entry_points: {main: {command: 'show --a {a}', parameters: {a: {type: path, optional: true}}}}\n"
    )
    assert words_of(command_of(read_project(tmp_path).entry_point("main"))) == []


def test_a_value_that_would_be_code_is_refused_in_every_item() -> None:
    entry_point = EntryPoint("main", "bash -c {x}", {"x": Parameter("x", "list", option="")})
    assert command_of(entry_point, x=["true"]) == "bash -c true"
    with pytest.raises(SpecError, match="in a script for another shell"):
        command_of(entry_point, x=["true", "a; b"])


def test_the_words_of_a_list_are_found_without_a_shell() -> None:
    entry_point = EntryPoint("main", "python t.py {x}", {"x": Parameter("x", "list")})
    assert substitute(command_of(entry_point, x=["a b", "it's"])) == ["python", "t.py", "--x", "a b", "--x", "it's"]


def test_a_command_of_ten_thousand_flags_is_read() -> None:
    entry_point = EntryPoint("main", "show" + " {x}" * 10_000, {"x": Parameter("x", "bool")})
    assert command_of(entry_point, x=True) == "show" + " --x" * 10_000


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)


@settings(deadline=None)
@given(st.lists(TEXTS, max_size=4))
def test_every_list_is_read_back_from_its_text(items: list[str]) -> None:
    assert list(parse_list(format_list(items))) == items


@settings(deadline=None)
@given(TEXTS, TEXTS, st.sampled_from(["bool", "list", "int", "string"]), st.sampled_from([None, "", "-x", "a="]))
def test_any_text_raises_only_mlfleet_errors(before: str, text: str, kind: str, option: str | None) -> None:
    entry_point = EntryPoint("main", before + "{x} end", {"x": Parameter("x", kind, "", None, True, option)})
    with contextlib.suppress(MlfleetError):
        command_of(entry_point, x=text)


async def test_lists_of_a_sweep_stay_together(tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text(
        "entry_points: {main: {command: 'echo {layers} {flag}', parameters: {"
        "layers: {type: list}, flag: {type: bool, default: false}}}}\n"
    )
    tracking = FakeTracking()
    async with Fleet(tracking=tracking) as fleet:
        space = grid(layers=[[64, 32], [8]], flag=[True])
        async with fleet.sweep(str(tmp_path), space, env_manager="local") as sweep:
            results = [result async for result in sweep]
    assert {result.status for result in results} == {RunStatus.FINISHED}
    logged = sorted(run.params["layers"] for run in tracking.runs.values() if "layers" in run.params)
    assert logged == ["[64,32]", "[8]"]


async def test_the_example_gets_what_its_page_says() -> None:
    example = Path(__file__).parents[2] / "examples" / "options"
    values = {"layers": [8, 4], "verbose": True, "note": "first try", "tags": ["a", "b c"]}
    async with Fleet(tracking=FakeTracking()) as fleet:
        runs = [await fleet.submit(str(example), parameters=each, env_manager="local") for each in ({}, values)]
        shown = [[line async for line in run.logs()] for run in runs]
    assert shown == [
        ["{'lr': 0.1, 'layers': [64, 32], 'tags': [], 'verbose': False, 'note': None}"],
        ["{'lr': 0.1, 'layers': [8, 4], 'tags': ['a', 'b c'], 'verbose': True, 'note': 'first try'}"],
    ]
