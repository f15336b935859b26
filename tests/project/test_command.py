"""Rendering: what stays, what is replaced, what is refused. Whether bash agrees: test_command_bash.py."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfleet._project.command import render
from mlfleet._project.parameters import Download, ResolvedParameters, resolve
from mlfleet._project.spec import EntryPoint, Parameter
from mlfleet.errors import MlfleetError, ParameterError, SpecError


def rendered(command: str, values: Mapping[str, str], extra: Mapping[str, str] | None = None) -> str:
    entry_point = EntryPoint("main", command, {name: Parameter(name) for name in values})
    return render(entry_point, resolve(entry_point, {**values, **(extra or {})}))


@pytest.mark.parametrize(
    ("command", "result"),
    [
        ("python t.py {x} {y}", "python t.py 'a b' 1"),
        ("python t.py --x={x}", "python t.py --x='a b'"),
        ("echo '{x}' \"{x}\" $'{x}'", "echo 'a b' \"a b\" $'a b'"),
        ("cd ${HOME} && ls $(pwd) {}", "cd ${HOME} && ls $(pwd) {}"),
        ('t --json \'{"a": {"b": {"c": 1}}}\' {y}', 't --json \'{"a": {"b": {"c": 1}}}\' 1'),
        ('t \'{"a": {"b": "{x}"}}\'', 't \'{"a": {"b": "a b"}}\''),
        ("echo {unknown} { x } {x!r} {x:>9} {x.y} {x[0]} {y}", "echo {unknown} { x } {x!r} {x:>9} {x.y} {x[0]} 1"),
        ("echo ${y} \"${y}\" \\${y} '${y}' $${y}", "echo ${y} \"${y}\" \\$1 '$1' $$1"),
        ("awk '{{print ${y}}}' {x}", "awk '{print $1}' 'a b'"),
        ("echo {{}} {{{y}}} ${{HOME}} }}", "echo {} {1} ${HOME} }"),
        ("find . -exec rm {} \\;", "find . -exec rm {} \\;"),
        ("t {y} # not {x}\nu {y}", "t 1 # not {x}\nu 1"),
        ("echo $(( {y} * 2 )) `cat {y}` <<EOF\n{y}\nEOF", "echo $(( 1 * 2 )) `cat 1` <<EOF\n1\nEOF"),
        ("echo \"$(cat '{x}' {x})\"", "echo \"$(cat 'a b' 'a b')\""),
    ],
)
def test_what_is_replaced_and_what_stays(command: str, result: str) -> None:
    assert rendered(command, {"x": "a b", "y": "1"}) == result


@pytest.mark.parametrize(
    ("command", "unknown"),
    [
        (
            "python one.py {data_pth} {alpha}",
            "{data_pth}, which is not a declared parameter, did you mean 'data_path'?",
        ),
        ("python two.py \"{data}\" {alpha} '{x}' {later}", "{data}"),
        ("python three.py ${HOME} ${data} {} {a b} {a:5}", None),
        ('t.py --json "{\\"a\\": {b}}"', None),
        ("awk '{print}' file", None),
        ("awk '{{print}}' {alpha}", None),
    ],
)
def test_a_word_in_braces_that_is_not_a_parameter_is_a_warning(
    caplog: pytest.LogCaptureFixture, command: str, unknown: str | None
) -> None:
    caplog.set_level(logging.WARNING, "mlfleet.project")
    for value in ("1", "2"):
        rendered(command, {"alpha": value, "data_path": "d"})
    messages = [record.getMessage() for record in caplog.records]
    if unknown is None:
        assert messages == []
    else:
        assert unknown in messages[0]
        assert len(messages) == 1 + ("{later}" in command)  # one for each word, not for each run


@pytest.mark.parametrize(
    "command",
    [
        "python t.py {x}",
        "{{{x}}} {{}} }} {{ a{x}b {y}{x}",
        "awk '{{print ${y}}}'",
        "python -c 'd = {{\"a\": {{}}}}' --x={x}",
        "a {y} && b {x} | c > {x}; d --name={y}",
        "'{y}' \"{y}\" `{y}` $(( {y} ))",
    ],
)
def test_what_the_reference_accepts_gives_the_same_command(command: str) -> None:
    values = {"x": "it's $HOME", "y": "5"}
    assert rendered(command, values) == command.format(**{k: shlex.quote(v) for k, v in values.items()})


def test_extra_parameters_are_appended_in_the_order_given() -> None:
    extra = {"z": "1", "a": "x y", "b c;d": "$(e)"}
    assert rendered("t {x}", {"x": "v"}, extra) == "t v --z 1 --a 'x y' --'b c;d' '$(e)'"
    assert rendered("t {x}\n", {"x": "v"}, {"a": "1"}) == "t v --a 1"
    assert rendered("t \\\n", {}, {"a": "1"}) == "t \\\n --a 1"


def test_downloads_take_the_place_of_their_uri() -> None:
    entry_point = EntryPoint("main", "t {data}", {"data": Parameter("data", "path")})
    uri = "s3://bucket/key"
    parameters = ResolvedParameters({"data": uri}, {"data": uri}, {}, (Download("data", uri, 0),))
    assert render(entry_point, parameters, {"data": "/tmp/a b/key"}) == "t '/tmp/a b/key'"


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("cat <<EOF\n{x}\nEOF", "in or after a here-document"),
        ("cat <<'EOF'\n{x}\nEOF", "in or after a here-document"),
        ("echo `cat {x}`", "in or after `…`"),
        ('echo "`cat {x}`"', "in or after `…`"),
        ("echo `echo '`' {x}", "in or after `…`"),
        ("echo \\{x}", "behind a backslash"),
        ("echo $'\\{x}'", "behind a backslash"),
        ('echo "${a:-"b"}" {x}', "a ${…} with quotes"),
        ("echo ${{{x}}}", "a ${…} with quotes"),
        ("echo $(( {x} ))", "in arithmetic"),
        ("(( a = {x} ))", "in arithmetic"),
        ("echo $(( $(echo {x}) ))", "arithmetic with quotes or expansions"),
        ("echo $[ {x} ]", "arithmetic with quotes or expansions"),
        ("let a={x}", "in arithmetic"),
        ("declare -i a={x}", "in arithmetic"),
        ("[[ {x} -gt 3 ]]", "in arithmetic"),
        ("if [[ -n $a && '{x}' -eq 3 ]]; then b; fi", "in arithmetic"),
        ("a[{x}]=1", "in arithmetic"),
        ('a["{x}"]=1', "in arithmetic"),
        ('echo "$(case a in a) echo {x};; esac)"', "a case inside of $(…)"),
        ("(a)#b {x}", "can be read in two ways"),
        ("cat <\\\n<EOF\n{x}\nEOF", "can be read in two ways"),
        ("echo 'a {x}", "not closed"),
        ("bash -c 'python t.py {x}'", "in a script for another shell"),
        ('/bin/sh -e -c "t {x}"', "in a script for another shell"),
        ('sudo bash -lc "t "{x}', "in a script for another shell"),
        ("a & eval t {x}", "in a script for another shell"),
        ("\\eval t {x}", "in a script for another shell"),
        ("a; eval t {x}", "in a script for another shell"),
        ("if A=1 ssh host t {x}; then b; fi", "in a script for another shell"),
    ],
)
def test_where_a_value_would_be_code_only_plain_ones_are_taken(command: str, where: str) -> None:
    with pytest.raises(SpecError) as caught:
        rendered(command, {"x": "$(touch pwned)"})
    assert where in str(caught.value)
    assert "{x} stands" in str(caught.value)
    assert "the entry point 'main'" in str(caught.value)
    assert rendered(command, {"x": "7"}) == command.replace("{x}", "7").replace("{{", "{").replace("}}", "}")


@pytest.mark.parametrize("value", ["PATH", "a[0]", "1+1", "", "x=1", "0x10", "-"])
def test_arithmetic_takes_numbers_only(value: str) -> None:
    with pytest.raises(SpecError, match="only numbers"):
        rendered("echo $(( {x} ))", {"x": value})


@pytest.mark.parametrize(
    ("command", "extra", "where"),
    [
        ("t # done", {"a": "1"}, "in a comment, where bash would not see it"),
        ("cat <<EOF\na\nEOF\n", {"a": "b c"}, "in or after a here-document"),
        ("t 'open", {"a": "; touch pwned"}, "not closed"),
        ("t (", {"a": "b c"}, "not closed"),
        ("t \\", {"a": "1"}, "behind a backslash"),
        ("eval t", {"a": "$(b)"}, "in a script for another shell"),
        ("eval t", {"$(b)": "1"}, "in a script for another shell"),
        ("let x=1", {"a": "b"}, "in arithmetic"),
    ],
)
def test_extra_parameters_are_not_appended_where_they_would_be_lost_or_code(
    command: str, extra: dict[str, str], where: str
) -> None:
    with pytest.raises(SpecError) as caught:
        rendered(command, {}, extra)
    assert where in str(caught.value)
    assert f"the undeclared parameter {next(iter(extra))!r} would be appended" in str(caught.value)


def test_words_that_only_look_like_commands_are_words() -> None:
    assert rendered("python t.py eval {x} let {x} --ssh {x}", {"x": "a b"}) == (
        "python t.py eval 'a b' let 'a b' --ssh 'a b'"
    )


def test_arguments_of_an_inner_shell_are_no_script() -> None:
    assert rendered("bash -c 'echo \"$1\"' _ {x}", {"x": "$(a)"}) == "bash -c 'echo \"$1\"' _ '$(a)'"


def test_nul_is_refused() -> None:
    with pytest.raises(SpecError, match="NUL"):
        render(EntryPoint("main", "a\0b"), ResolvedParameters({}, {}, {}))
    with pytest.raises(ParameterError, match="NUL"):
        render(EntryPoint("main", "a {x}"), ResolvedParameters({}, {"x": "\0"}, {}))


def test_odd_names_do_not_stay_in_the_command() -> None:
    with pytest.raises(SpecError, match="cannot stand behind a"):
        rendered("echo ${a'b}", {"a'b": "1"})


PIECES = st.sampled_from(
    ["{x}", "{y}", "{{", "}}", *"\\'\"$`#(){}[]<>;|&\n =a!", "$(", "$((", "${", "<<E", "[[ ", "]] ", "case ", "eval "]
)


@settings(deadline=None, database=None, max_examples=500)
@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=30).map("".join)), st.text(max_size=20))
def test_whatever_the_command_only_our_errors_come_out(command: str, value: str) -> None:
    with contextlib.suppress(MlfleetError):
        rendered(command, {"x": value, "y": "1"}, {value or "z": value})
