"""Values must reach bash unchanged: commands are rendered, run by bash, and compared."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlfleet._project.command import render
from mlfleet._project.parameters import ResolvedParameters, resolve
from mlfleet._project.spec import EntryPoint, Parameter
from mlfleet.errors import SpecError

QUICK = settings(
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example],
)

# `show` prints its arguments, `pwn` is what no value may reach. Each command is run by a bash of its own.
RUNNER = r"""
show() { printf '%s\0' "$#" "$@"; }
pwn() { : > "$PWNED"; }
export -f show pwn
for command; do bash -c "$command" < /dev/null; printf 'end\0'; done
"""


def run_bash(commands: Sequence[str], folder: Path) -> list[list[str]]:
    """Return the arguments that `show` received in each of the commands."""
    done = subprocess.run(
        ["bash", "-c", RUNNER, "bash", *commands],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PWNED": str(folder / "pwned"), "LC_ALL": "C.UTF-8", "SHELL": "/bin/bash"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    outputs = done.stdout.decode(errors="surrogateescape").split("end\0")
    return [output.split("\0")[1:-1] for output in outputs[:-1]]


def rendered(command: str, value: str, extra: dict[str, str] | None = None) -> str:
    entry_point = EntryPoint("main", command, {"x": Parameter("x")})
    # Not by `resolve`, which refuses some names: the command is safe whatever they are.
    return render(entry_point, ResolvedParameters({"x": value, **(extra or {})}, {"x": value}, extra or {}))


SPECIAL = "'\"\\$`!#~*?[]{}()<>|&;=%^,. \n\t-a1é"
VALUES = st.one_of(
    st.text(st.sampled_from(SPECIAL), max_size=12),
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=12),
    st.sampled_from(["$(pwn)", "`pwn`", "';pwn;'", '";pwn;"', "\npwn\n", "a[$(pwn)]", "\\", "{x}", "{{", "${x}", "-n"]),
)


@dataclass(frozen=True)
class Piece:
    """A part of a command, and what show receives for it; VALUE stands for the value in both."""

    text: str
    received: str


VALUE = "\ue000"
PIECES = [
    Piece("lit", "lit"),
    Piece("{x}", VALUE),
    Piece("'{x}'", VALUE),
    Piece('"{x}"', VALUE),
    Piece("$'{x}'", VALUE),
    Piece("'a \"$(pwn)`#{x}\\'", 'a "$(pwn)`#' + VALUE + "\\"),
    Piece('"a\'\\"\\$\\`\\\\{x}#("', "a'\"$`\\" + VALUE + "#("),
    Piece("$'\\'\\t\"{x}\\n.'", "'\t\"" + VALUE + "\n."),
    Piece('$"{x}"', VALUE),
    Piece('"$(printf %s. {x} # it\'s a comment )\n)"', VALUE + "."),
    Piece('"<$(printf %s. "{x}")>"', "<" + VALUE + ".>"),
    Piece('"$( (printf %s. "$(printf %s \'{x}.\')") )"', VALUE + ".."),
    Piece('"${v}{x}${v#e}"', "" + VALUE),
    Piece("$((1+(2*3)))", "7"),
    Piece("a#{x}", "a#" + VALUE),
    Piece("\\'{x}\\\"", "'" + VALUE + '"'),
    Piece("\\\n", ""),
    Piece("'{{{x}}}'", "{" + VALUE + "}"),
    Piece('\'{"a": {"b": "{x}"}}\'', '{"a": {"b": "' + VALUE + '"}}'),
]
WORDS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4)
FRAMES = [
    "CALL",
    "CALL # it's {x}",
    "# it's \"{x}\nCALL",
    "(CALL)",
    "{{ CALL; }}",
    "{ CALL; }",
    "true {x} && CALL || false",
    "v={x}; v=; CALL",
    "if [ -n '{x}' ] || true; then CALL; fi",
    '[[ a{x} == a"{x}" ]] && CALL',
    "case {x} in (b) ;; *) CALL;; esac",
    'f() {{ "$@"; }}; f CALL',
    "true <<< {x}; CALL",
    "true > /dev/null 2>&1 \\\n  {x}; CALL",
    "a=(b 'c d' # it's\n {x}); CALL",
    "(( 1 < 2 )) && CALL",
    "for i in {x}; do CALL; done",
    'while read -r line; do CALL; done <<< "{x}" | head -zn 100',
]


@QUICK
@given(st.lists(st.tuples(st.sampled_from(FRAMES), st.lists(WORDS, max_size=3), VALUES), min_size=12, max_size=16))
def test_every_value_arrives_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, cases: list[tuple[str, list[list[Piece]], str]]
) -> None:
    folder = tmp_path_factory.mktemp("bash")
    commands, expected = [], []
    for frame, words, value in cases:
        call = " ".join(["show first", *("w" + "".join(piece.text for piece in word) for word in words)])
        commands.append(rendered(frame.replace("CALL", call), value))
        expected.append(["first", *("w" + "".join(p.received.replace(VALUE, value) for p in word) for word in words)])
    for command, received, wanted in zip(commands, run_bash(commands, folder), expected, strict=True):
        if "while read" in command:
            # As often as the value has lines.
            received = received[: len(wanted)]
        assert received == wanted, command
    assert not (folder / "pwned").exists()


@QUICK
@given(st.lists(st.dictionaries(st.text(SPECIAL, min_size=1, max_size=8), VALUES, max_size=4), min_size=8, max_size=8))
def test_extra_parameters_arrive_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, cases: list[dict[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("bash")
    commands = [rendered("show {x}\n", "y", {k: v for k, v in extra.items() if k != "x"}) for extra in cases]
    for extra, received in zip(cases, run_bash(commands, folder), strict=True):
        assert received == ["y", *(text for k, v in extra.items() if k != "x" for text in (f"--{k}", v))]
    assert not (folder / "pwned").exists()


# Whatever stands here, honest or not, is never to run a value.
FRAGMENTS = [
    *("{x}", "'", '"', "$'", '$"', "\\", "`", "$", "#", "(", ")", "$(", "$((", "((", "))", "${", "}", "{{", "}}", "$["),
    *(
        "[[ ",
        " ]]",
        "<<E\n",
        "<<'E'\n",
        "\nE\n",
        "<<<",
        "<(",
        "\n",
        " ",
        ";",
        "&",
        "|",
        "=",
        "a",
        "a[",
        "]",
        "1",
        "\\\n",
    ),
    *(
        "case ",
        " in ",
        "a)",
        ";;",
        " esac",
        "; eval ",
        "; let ",
        "bash -c '",
        " -eq ",
        "; declare -i ",
        "if ",
        "then ",
        "fi",
    ),
    *("! ", "echo ", "${a:-", "${a#"),
    *(
        "; test -v ",
        "; declare ",
        "; printf -v ",
        "; read ",
        "; unset ",
        " | bash",
        "bash ",
        '"bash" -c "',
        "$SHELL -c ",
    ),
    *("> f ", 'A="b c" ', "eval ", "[ ", " -v ", " -c ", "env -S ", "flock f ", "source ", ">(bash", "{{ ", "; }}"),
]
HOSTILE = [
    *("$(pwn)", "`pwn`", "';pwn;'", '";pwn;"', "\npwn\n", ";pwn;", "a[$(pwn)]", "'\npwn\n'", "\\';pwn;\\'", ")\npwn;("),
    *("E\npwn\nE", "))\npwn\n", "}\npwn\n", "' pwn '", "`\npwn\n`", "\\\npwn\n", "|pwn|", "$(pwn)'$(pwn)\"$(pwn)"),
    "'`pwn`'\"`pwn`\"",
]
TEMPLATES = st.tuples(
    st.lists(st.sampled_from(FRAGMENTS), max_size=9).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join),
).map("{x}".join)


@QUICK
@given(st.lists(st.tuples(TEMPLATES, st.sampled_from(HOSTILE), st.booleans()), min_size=24, max_size=30))
def test_no_template_runs_a_value(tmp_path_factory: pytest.TempPathFactory, cases: list[tuple[str, str, bool]]) -> None:
    folder = tmp_path_factory.mktemp("bash")
    commands = []
    for template, value, extra in cases:
        try:
            commands.append(rendered(template, value, {"y": value} if extra else None))
        except SpecError:
            continue
    run_bash(commands, folder)
    assert not (folder / "pwned").exists(), commands


# Where bash or another shell evaluates a value, however it is quoted. One in a line; a here-document takes three.
EVALUATING = r"""
$SHELL -c "echo {x}"
"$SHELL" -c "echo {x}"
${{SHELL}} -c "echo {x}"
"bash" -c "echo {x}"
'bash' -c "echo {x}"
b"as"h -c 'echo {x}'
\bash -c "echo {x}"
/bin/"sh" -c "echo {x}"
bash -c {x}
bash -c "{x}"
bash -c -x "echo {x}"
bash -o pipefail -c "echo {x}"
bash -c -o pipefail "echo {x}"
bash -c "$(echo {x})"
exec $SHELL -c "echo {x}"
env A=1 "$SHELL" -c "echo {x}"
nohup "bash" -c "echo {x}"
bash <<< "{x}"
bash <<< {x}
<<< "{x}" bash
bash -s <<< "{x}"
bash - <<< "{x}"
sh 2>&1 <<< "{x}"
bash < <(echo "{x}")
bash <(echo "{x}")
source <(echo "{x}")
. /dev/stdin <<< "{x}"
source /dev/stdin <<< {x}
echo "{x}" | bash
echo {x} | bash
printf %s "{x}" | sh
echo "{x}" |& bash
echo "{x}" | cat | bash
echo "{x}" | "bash"
echo "{x}" | $SHELL
echo "{x}" | sudo bash
echo "{x}" | env bash
(echo "{x}") | bash
{{ echo "{x}"; }} | bash
for i in 1; do echo "{x}"; done | bash
if true; then echo {x}; fi | bash
echo "{x}" | (cat; bash)
echo "{x}" | (bash)
echo "{x}" | (bash; cat)
echo "{x}" | {{ bash; }}
echo "{x}" | {{ true; bash; }}
echo "{x}" | while true; do bash; break; done
echo "{x}" | if true; then bash; fi
(bash) <<< "{x}"
{{ bash; }} <<< "{x}"
{{ true; bash; }} <<< {x}
echo "{x}" > >(bash); sleep 0.1
tee >(bash) <<< "{x}"; sleep 0.1
echo "{x}" | tee >(bash); sleep 0.1
echo {x} | source /dev/stdin
echo {x} | . /dev/stdin
A="b c" eval "echo {x}"
A='b c' eval echo {x}
> f eval "echo {x}"
> f eval echo {x}
2>f eval echo {x}
A=1 B="2 3" > f eval echo {x}
"eval" echo {x}
'eval' "{x}"
e'va'l {x}
$'eval' {x}
command eval {x}
command -p eval {x}
builtin eval {x}
time eval {x}
time -p eval {x}
! eval {x}
coproc eval {x}; wait
for i in 1; do eval {x}; done
for ((i=0;i<1;i++)) do eval {x}; done
for ((i=0;i<1;i++)) {{ eval {x}; }}
for i do true; done; eval {x}
f() {{ eval {x}; }}; f
function f {{ eval {x}; }}; f
function f() {{ eval {x}; }}; f
if [[ 1 ]] then eval {x}; fi
if (( 1 )) then eval {x}; fi
if (true) then eval {x}; fi
case a in a) eval {x};; esac
case [[ in [[ ) eval {x};; esac
case a in b) ;; [[ ) ;; a) eval {x};; esac
true && eval {x}
true & eval {x}
true || true; eval {x}
true | eval {x}
eval "$(echo {x})"
eval `echo {x}`
trap {x} EXIT
trap "{x}" EXIT
compgen -W {x}
compgen -C {x}
flock F -c "echo {x}"
flock F -c {x}
flock -x F -c "echo {x}"
flock F --command "echo {x}"
flock F --command="echo {x}"
flock F -c"echo {x}"
flock F "bash" -c "echo {x}"
sudo -n flock F -c "echo {x}"
script -qc "echo {x}" f
script -c "echo {x}" f
script -c"echo {x}" f
env -S "bash -c '{x}'"
env -S"bash -c '{x}'"
env -vS "bash -c '{x}'"
env --split-string="bash -c '{x}'"
env --split-string "bash -c '{x}'"
env A=1 -S "bash -c '{x}'"
test -v {x}
test -v "{x}"
[ -v {x} ]
[ -v '{x}' ]
[[ -v {x} ]]
[[ -v "{x}" ]]
[[ a == a && -v {x} ]]
test -R {x}
"test" -v {x}
declare {x}
declare "{x}"
declare a{x}
declare -i n={x}
declare -a n={x}
declare -A n={x}
declare -i n; declare -i n={x}
declare -n r={x}; r=1
typeset {x}
readonly {x}
export {x}
export "{x}"
f() {{ local {x}; }}; f
A="b c" declare {x}
"declare" {x}
builtin declare {x}
printf -v {x} a
printf -v "{x}" a
printf -v{x} a
printf "-v{x}" a
printf {x} a
printf "{x}" a
read {x} <<< 1
read -r {x} <<< 1
unset {x}
unset -v {x}
mapfile {x} <<< 1
readarray {x} <<< 1
getopts a {x}
let {x}
let "a={x}"
let a=$(echo {x})
(( {x} ))
(( a = {x} ))
echo $(( {x} + 1 ))
echo $[ {x} ]
a[{x}]=1
a["{x}"]=1
a['{x}']=1
a[b[1]+{x}]=1
a=([{x}]=1)
a=( ["{x}"]=1 )
declare -a a=([{x}]=1)
echo ${{a[{x}]}}
echo "${{a[{x}]}}"
echo ${{a[0]:{x}}}
echo ${{HOME:{x}:1}}
echo ${{a:-{x}}}
echo ${{!{x}}}
[[ {x} -gt 1 ]]
[[ 1 -gt "{x}" ]]
[[ ( {x} -eq 1 ) ]]
[[ a == b || {x} -eq 1 ]]
[[ "]]" != a && {x} -eq 1 ]]
[[ {x} -eq `echo '1'` ]]
wait -n -p {x}
export -f pwn; bash -c "{x}"
xargs -I% sh -c "{x}" <<< a
find . -maxdepth 0 -exec sh -c "{x}" \;
find . -maxdepth 0 -exec "bash" -c '{x}' \;
timeout 5 bash -c "{x}"
timeout 5 "$SHELL" -c "{x}"
cat <<E | bash
{x}
E
bash <<E
{x}
E
bash <<'E'
echo {x}
E
echo `echo {x}`
echo "`echo {x}`"
X=1 . <(echo {x})
alias a={x}; shopt -s expand_aliases
{{ eval {x}; }}
( eval {x} )
$( eval {x} )
"$(eval {x})"
echo <(eval {x}); sleep 0.1
bash -ic "{x}"
bash --norc -c "{x}"
bash -lc '{x}'
$0 -c "{x}"
$BASH -c "{x}"
${{BASH}} <<< "{x}"
a=bash; $a -c "{x}"
a=bash; "${{a}}" -c "{x}"
$(which bash) -c "{x}"
"$(which bash)" -c "{x}"
`which bash` -c "{x}"
$(which bash) <<< "{x}"
exec -a name bash -c "{x}"
test -n a -a -v {x}
declare -- {x}
export -n {x}
read -p a {x} <<< 1
: "${{a:={x}}}"
for (( i={x}; i<1; i++ )); do :; done
echo $(( a[{x}] ))
time -- eval {x}
command -- eval {x}
! ! eval {x}
if ! eval {x}; then :; fi
while eval {x}; do break; done
until eval {x}; do break; done
if false; then :; elif eval {x}; then :; fi
if false; then :; else eval {x}; fi
case a in a|b) eval {x};; esac
case a in (a) eval {x};; esac
case a in a) ;& b) eval {x};; esac
f() ( eval {x} ); f
f() if true; then eval {x}; fi; f
coproc X {{ eval {x}; }}; wait
a+=1 eval {x}
a[0]=1 eval {x}
a=(1 2) eval {x}
>f </dev/null eval {x}
{{fd}}>f eval {x}
2>&1 eval {x}
>&2 eval {x}
&>f eval {x}
<<<a eval {x}
>|f eval {x}
ev""al {x}
e$''val {x}
true; : ; eval {x} # a
echo a#b; eval {x}
echo "a;b" 'c' & eval {x}
true |& eval {x}
[[ a && b ]] && eval {x}
[[ a ]] || ! [[ b ]] || eval {x}
[[ a ]]; eval {x}
[[ a < b ]]; eval {x}
[[ a =~ (a|b) ]]; eval {x}
[[ ( a ) ]]; eval {x}
[ a ]; eval {x}
echo $(eval {x})
echo "$(true; eval {x})"
echo "$( (eval {x}) )"
echo ${{HOME}} "${{HOME}}"; eval {x}
x=`true`; eval {x}
function f {{ true; }}; eval {x}
f() {{ true; }}; eval {x}
for i in a; do true; done; eval {x}
for i in a; do true; done && eval {x}
for i in eval; do true; eval {x}; done
select i in 1; do eval {x}; done <<< 1
while read l; do eval {x}; done <<< a
case eval in eval) eval {x} ;; esac
(( 1 )) && eval {x}
((1)); eval {x}
$((1)) ; eval {x}
unset -f {x}
printf -v a[{x}] b
printf -v "a[{x}]" b
declare "a[{x}]=1"
declare a[{x}]=1
read "a[{x}]" <<< 1
echo {x} | tee >(cat | bash); sleep 0.1
echo {x} | sh -s
echo {x} | sh -s a
echo {x} | sh /dev/stdin
echo {x} | sh /dev/fd/0
echo {x} | bash -x
echo {x} | bash -o pipefail
cat <(echo {x}) | bash
cat <<< {x} | bash
bash <<< "$(cat <<< {x})"
exec bash <<< {x}
"b"ash<<<{x}
bash 0<<<{x}
env -i bash <<< {x}
env -i /bin/bash -c "{x}"
bash -c "{x}"
bash -c - "echo {x}"
bash $(echo {x})
A=1 [[ a; eval {x}
A=1 [[ a || eval {x}
> f [[ a || eval {x}
nohup [[ a || eval {x}
command [[ a || eval {x}
function [[ {{ eval {x}; }}; "[["
case [[ in b) ;; [[ ) eval {x};; esac
time -p [[ {x} -gt 3 ]]
[[ {x}${{a:-""}} -gt 3 ]]
declare -ia a=({x})
set -- 1; for i do eval {x}; done
echo {x} | {{ (bash) }}
echo {x} | if true; then (bash) fi
echo > >(bash) {x}; sleep 0.1
"""
VALUES_OF_CODE = [
    *("$(pwn)", "`pwn`", "; pwn;", "';pwn;'", '";pwn;"', "a[$(pwn)]", "a[$(pwn)]=1", "([$(pwn)]=1)", "\npwn\n"),
    *("-va[$(pwn)]", "-c pwn", "x[$(pwn)]", "a[0$(pwn)]", " -gt 1 ]]; pwn; [[ 1", "[$(pwn)]=1", "pwn;"),
]


@pytest.mark.parametrize("template", re.findall(r".*<<'?E\b.*\n.*\n.*|.+", EVALUATING))
def test_no_place_that_is_evaluated_runs_a_value(tmp_path: Path, template: str) -> None:
    commands = []
    for value in VALUES_OF_CODE:
        with contextlib.suppress(SpecError):
            commands.append(rendered(template, value))
    run_bash(commands, tmp_path)
    assert not (tmp_path / "pwned").exists(), commands
    assert rendered(template, "7")


@pytest.mark.parametrize(
    "template",
    [
        "test {x} {y}",
        "[ {x} {y} ]",
        "[ -{x} {y} ]",
        "printf {x} {y} a",
        "bash {x} {y}",
        "declare {x} a={y}",
        "echo {y} ${a[{x}]}",
        "echo {y} $(( {x} ))",
    ],
)
def test_no_value_turns_another_value_into_code(tmp_path: Path, template: str) -> None:
    commands = []
    for first in ("-v", "v", "-c", "-a", "__mlfleet_1", "__mlfleet_2"):
        for second in ("a[$(pwn)]", "([$(pwn)]=1)", "$(pwn)"):
            entry_point = EntryPoint("main", template, {"x": Parameter("x"), "y": Parameter("y")})
            with contextlib.suppress(SpecError):
                commands.append(render(entry_point, resolve(entry_point, {"x": first, "y": second})))
    run_bash(commands, tmp_path)
    assert not (tmp_path / "pwned").exists(), commands


def test_values_are_not_in_the_environment(tmp_path: Path) -> None:
    command = rendered('show "$(env | grep -c __mlfleet)" {x}', "a b")
    assert run_bash([command], tmp_path) == [["0", "a b"]]


def test_the_check_detects_a_value_that_is_run(tmp_path: Path) -> None:
    """Run the command that mlflow renders for a quoted placeholder: it runs the value, and the tests detect that."""
    assert run_bash(["show \"'$(pwn)'\""], tmp_path) == [["''"]]
    assert (tmp_path / "pwned").exists()
