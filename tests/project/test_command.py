"""Rendering: what stays, what is replaced, what is refused. Whether bash agrees: test_command_bash.py."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfleet._project.command import MAX_LENGTH, render, substitute
from mlfleet._project.parameters import Download, ResolvedParameters
from mlfleet._project.spec import EntryPoint, Parameter
from mlfleet.errors import MlfleetError, ParameterError, SpecError

V1, V2 = '"${__mlfleet_1}"', '"${__mlfleet_2}"'
"""The references to the variables that hold values, outside of quotes."""
A_B = "__mlfleet_1='a b'; "


def rendered(command: str, values: Mapping[str, str], extra: Mapping[str, str] | None = None) -> str:
    entry_point = EntryPoint("main", command, {name: Parameter(name) for name in values})
    # Not by `resolve`, which refuses some names: the command is safe whatever they are.
    return render(entry_point, ResolvedParameters({**values, **(extra or {})}, values, extra or {}))


@pytest.mark.parametrize(
    ("command", "result"),
    [
        ("python t.py {x} {y}", f"{A_B}python t.py {V1} 1"),
        ("python t.py --y {y} --z={y} out/{y}", "python t.py --y 1 --z=1 out/1"),
        ("python t.py --x={x}", f"{A_B}python t.py --x={V1}"),
        ("echo '{x}' \"{x}\" $'{x}'", f"{A_B}echo ''{V1}'' {V1} $''{V1}$''"),
        ("cd ${HOME} && ls $(pwd) {}", "cd ${HOME} && ls $(pwd) {}"),
        ('t --json \'{"a": {"b": {"c": 1}}}\' {y}', 't --json \'{"a": {"b": {"c": 1}}}\' 1'),
        ('t \'{"a": {"b": "{x}"}}\'', f'{A_B}t \'{{"a": {{"b": "\'{V1}\'"}}}}\''),
        ("echo {unknown} { x } {x!r} {x:>9} {x.y} {x[0]} {y}", "echo {unknown} { x } {x!r} {x:>9} {x.y} {x[0]} 1"),
        ("echo ${y} \"${y}\" \\${y} '${y}' $${y}", f"__mlfleet_1=1; echo ${{y}} \"${{y}}\" \\${V1} '$1' $${V1}"),
        ("awk '{{print ${y}}}' {x}", f"{A_B}awk '{{print $1}}' {V1}"),
        ("echo {{}} {{{y}}} ${{HOME}} }}", "echo {} {1} ${HOME} }"),
        ("find . -exec rm {} \\;", "find . -exec rm {} \\;"),
        ("t {y} # not {x}\nu {y}", "t 1 # not {x}\nu 1"),
        ("echo $(( {y} * 2 )) `cat {y}` <<EOF\n{y}\nEOF", "echo $(( 1 * 2 )) `cat 1` <<EOF\n1\nEOF"),
        ("echo \"$(cat '{x}' {x})\"", f"{A_B}echo \"$(cat ''{V1}'' {V1})\""),
        # Where a plain value would be taken in by what stands beside it.
        ('echo $a{y} "$a{y}" {y}>f', f'__mlfleet_1=1; echo $a{V1} "$a${{__mlfleet_1}}" {V1}>f'),
        ("{y}{y}", f"__mlfleet_1=1; {V1}{V1}"),
    ],
)
def test_placeholders_are_replaced_and_other_text_stays(command: str, result: str) -> None:
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
        "t --a {x} --b={y} {x}",
    ],
)
def test_templates_that_mlflow_accepts_give_the_same_command(command: str) -> None:
    for values in ({"x": "it's $HOME", "y": "5"}, {"x": "s3://bucket/key-1", "y": "0.5"}):
        theirs = command.format(**{k: shlex.quote(v) for k, v in values.items()})
        assert substitute(rendered(command, values)) == shlex.split(theirs)


@pytest.mark.parametrize(
    ("value", "result"),
    [
        ("", "t ''"),
        ("-1", "t -1"),
        ("64,32", "t 64,32"),
        ("s3://bucket/key@1%2", "t s3://bucket/key@1%2"),
        # An assignment and a reserved word are syntax where a command begins.
        ("PATH=.", f"__mlfleet_1=PATH=.; t {V1}"),
        ("else", f"__mlfleet_1=else; t {V1}"),
        ("__mlfleet_1", f"__mlfleet_1=__mlfleet_1; t {V1}"),
        ("~", f"__mlfleet_1='~'; t {V1}"),
        ("*", f"__mlfleet_1='*'; t {V1}"),
    ],
)
def test_plain_values_are_written_as_they_are(value: str, result: str) -> None:
    assert rendered("t {x}", {"x": value}) == result


def test_the_words_of_a_command_are_found_without_a_shell() -> None:
    values = {"x": "${__mlfleet_2} 'a'", "y": "b c"}
    assert substitute(rendered("t '{x}' --y={y} \"{x} $y\"", values)) == [
        "t",
        "${__mlfleet_2} 'a'",
        "--y=b c",
        "${__mlfleet_2} 'a' $y",
    ]
    assert substitute("t a ${b}") == ["t", "a", "${b}"]


def test_extra_parameters_are_appended_in_the_order_given() -> None:
    extra = {"z": "1", "a": "x y", "b c;d": "$(e)"}
    assert rendered("t {x}", {"x": "v"}, extra) == (
        f"__mlfleet_1='x y'; __mlfleet_2='b c;d'; __mlfleet_3='$(e)'; t v --z 1 --a {V1} --{V2} \"${{__mlfleet_3}}\""
    )
    assert rendered("t {x}\n", {"x": "v"}, {"a": "1"}) == "t v --a 1"
    assert rendered("t \\\n", {}, {"a": "1"}) == "t \\\n --a 1"


def test_downloads_take_the_place_of_their_uri() -> None:
    entry_point = EntryPoint("main", "t {data}", {"data": Parameter("data", "path")})
    uri = "s3://bucket/key"
    parameters = ResolvedParameters({"data": uri}, {"data": uri}, {}, (Download("data", uri, 0),))
    assert render(entry_point, parameters, {"data": "/tmp/a b/key"}) == f"__mlfleet_1='/tmp/a b/key'; t {V1}"


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
        *(
            (f"{name} {{x}}", "in a script for another shell")
            for name in ("pdsh h", "rsh h", "mosh h", "su -c", "watch")
        ),
        *(
            (f"{name} ssh h {{x}}", "in a script")
            for name in ("env A=1", "sudo -u me", "exec", "timeout 5", "exec -a b")
        ),
        *(
            (f"{name} ssh h {{x}}", "in a script")
            for name in ("chroot /", "taskset 1", "chrt 5", "nice -n 5", "xargs -n 1")
        ),
        *((f"{name} ssh h {{x}}", "in a script") for name in ("time", "/usr/bin/time -f %e", "sudo time", "\\time")),
        *((f"{name} {{x}}", "in a script") for name in ("tmux new", "parallel", "runuser -c", "sg g -c", "script -c")),
        *((f"echo {{x}} | {name}", "in a script for another shell") for name in ("at now", "batch", "parallel")),
    ],
)
def test_only_plain_values_are_accepted_where_they_would_be_code(command: str, where: str) -> None:
    with pytest.raises(SpecError) as caught:
        rendered(command, {"x": "$(touch pwned)"})
    assert where in str(caught.value)
    assert "{x} stands" in str(caught.value)
    assert "the entry point 'main'" in str(caught.value)
    assert rendered(command, {"x": "7"}) == command.replace("{x}", "7").replace("{{", "{").replace("}}", "}")


@pytest.mark.parametrize("value", ["PATH", "a[0]", "1+1", "", "x=1", "0x10", "-"])
def test_arithmetic_accepts_only_numbers(value: str) -> None:
    with pytest.raises(SpecError, match="only numbers"):
        rendered("echo $(( {x} ))", {"x": value})


@pytest.mark.parametrize(
    ("command", "extra", "where"),
    [
        ("t # done", {"a": "1"}, "in a comment, where bash would not see it"),
        ("cat <<EOF\na\nEOF\n", {"a": "b c"}, "in or after a here-document"),
        ("t 'open", {"a": "; touch pwned"}, "not closed"),
        ("t (", {"a": "b c"}, "not closed"),
        ("t $((", {"a": "b c"}, "not closed"),
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
        f"{A_B}python t.py eval {V1} let {V1} --ssh {V1}"
    )


def test_arguments_of_an_inner_shell_are_not_its_script() -> None:
    assert rendered("bash -c 'echo \"$1\"' _ {x}", {"x": "$(a)"}) == (
        f"__mlfleet_1='$(a)'; bash -c 'echo \"$1\"' _ {V1}"
    )


def test_nul_is_refused() -> None:
    with pytest.raises(SpecError, match="NUL"):
        render(EntryPoint("main", "a\0b"), ResolvedParameters({}, {}, {}))
    with pytest.raises(ParameterError, match="NUL"):
        render(EntryPoint("main", "a {x}"), ResolvedParameters({}, {"x": "\0"}, {}))


@pytest.mark.parametrize(
    "command",
    r"""python train.py --alpha {x} --out {x}/m | tee "{x}.log"
export DATA={x} "MORE={x}"; declare a={x}; A={x} python t.py
bash run.sh {x} --name "{x}"; bash run.sh -c {x}
curl -s http://a/b | bash -s -- {x}
python a.py {x}; curl http://a | bash; python b.py {x}
$PYTHON train.py --x {x}; "$PYTHON" -m pkg.train -c {x}
nohup python main.py eval {x} > {x}.log 2>&1 &
timeout 5 python t.py test {x}; sudo -E python read {x}
[ -f {x} ] && [ {x} = {x} ] || test -n "{x}"
[[ $a -eq 3 ]] && [[ {x} == a* ]] && echo {x}
printf '%s\n' {x}; printf "a {x}\n"; printf "{x}\n"; printf -- {x}
while read -r a b; do echo "$a"; done <<< {x}
case {x} in a) echo {x};; esac; for i in {x} b; do echo "$i" {x}; done
args=({x} b "{x}"); python t.py "$args"; a[1]={x}
flock lock python t.py -c {x}; env A={x} python t.py {x}
sudo -S python t.py {x}; env A=1 python t.py -S{x}; timeout 5 docker watch {x}
bash --norc t.sh {x}; bash > {x} < a; diff <(echo {x}) b; bash "$(dirname a)/t.sh" {x}
declare -rx a={x}; declare 'a={x}'; export file={x} ; export -p > {x}
a=(eval {x} b); for wait in {x}; do t; done; echo {x} | {{ echo a | bash; }}
A=1 [[ {x} ; python t.py {x}; [[ ( a ) ]] > {x}; echo a[1][{x}]
docker exec c sh -c 'echo "$1"' _ {x}; which bash; python t.py {x}
f() {{ python t.py {x} "$@"; }}; f {x}; (cd {x} && ls); (( 1 )) && echo {x}""".splitlines(),
)
def test_any_value_is_accepted_where_nothing_evaluates_it(command: str) -> None:
    value = "it's a; $(b)"
    result = rendered(command, {"x": value})
    assert result.startswith(f"__mlfleet_1={shlex.quote(value)}; ")
    assert result.count(value.replace("'", "'\"'\"'")) == 1
    assert "{x}" not in result


@pytest.mark.parametrize("command", ["cat <<E\n${x}\nE", "echo $(( ${x} + 1 ))", 'echo "${x}" $x', "\\\nt '$x'"])
def test_a_variable_of_bash_stays_although_a_parameter_has_its_name(command: str) -> None:
    assert rendered(command, {"x": "a b"}) == command


def test_a_refusal_says_what_to_do() -> None:
    with pytest.raises(SpecError) as caught:
        rendered("bash -c 'echo {x}'", {"x": "a b"})
    assert str(caught.value) == (
        "the command of the entry point 'main': {x} stands in a script for another shell (sh -c, eval, ssh, …), where "
        "its value could be code: only letters, digits and _@%+=:,./- can stand there; give it to the script as an "
        "argument: bash -c 'echo \"$1\"' _ {x}"
    )
    with pytest.raises(SpecError, match="where a value cannot begin with a dash"):
        rendered("printf {x} a", {"x": "-va[$(b)]"})


def test_a_value_is_not_the_name_of_a_variable_that_holds_another_one() -> None:
    with pytest.raises(SpecError, match="could be code"):
        rendered("echo {y} ${a[{x}]}", {"x": "__mlfleet_1", "y": "a[$(b)]"})


def test_a_command_above_the_length_limit_is_refused() -> None:
    assert len(rendered("t " + "a" * (MAX_LENGTH - 2), {})) == MAX_LENGTH
    with pytest.raises(SpecError, match=r"is 131,072 bytes long, the limit is 131,071; move it to a script"):
        rendered("t " + "é" * (MAX_LENGTH // 2), {})
    with pytest.raises(ParameterError, match=r"is 140,\d+ bytes long .* the longest value is that of 'x'") as caught:
        rendered("t {x} {y}", {"x": "a b" + "c" * 140_000, "y": "1"})
    assert caught.value.names == ("x",)


@pytest.mark.parametrize(
    "piece", ["echo {x} | cat; ", "a{x}", "[[ {x} == a ]] ", "$(t {x} ", "bash; ", "a#{x}[", "{{ "]
)
def test_the_longest_commands_are_read(piece: str) -> None:
    """Reading takes time in proportion to the length: with the square of it, this would not end in time."""
    command = piece * (100_000 // len(piece))
    with contextlib.suppress(MlfleetError):
        rendered(command, {"x": "1"})


def test_unusual_names_are_refused_in_place_of_a_variable() -> None:
    with pytest.raises(SpecError, match="cannot stand behind a"):
        rendered("echo ${a'b}", {"a'b": "1"})


PIECES = st.sampled_from(
    ["{x}", "{y}", "{{", "}}", *"\\'\"$`#(){}[]<>;|&\n =a!", "$(", "$((", "${", "<<E", "[[ ", "]] ", "case ", "eval "]
)


@settings(deadline=None, database=None, max_examples=500)
@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=30).map("".join)), st.text(max_size=20))
def test_any_command_raises_only_mlfleet_errors(command: str, value: str) -> None:
    with contextlib.suppress(MlfleetError):
        rendered(command, {"x": value, "y": "1"}, {value or "z": value})
