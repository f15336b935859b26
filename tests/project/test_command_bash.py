"""Whether bash receives what was given: commands are rendered, run by bash, and compared."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlfleet._project.command import render
from mlfleet._project.parameters import resolve
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
    """What `show` received in each of the commands."""
    done = subprocess.run(
        ["bash", "-c", RUNNER, "bash", *commands],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PWNED": str(folder / "pwned"), "LC_ALL": "C.UTF-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    outputs = done.stdout.decode(errors="surrogateescape").split("end\0")
    return [output.split("\0")[1:-1] for output in outputs[:-1]]


def rendered(command: str, value: str, extra: dict[str, str] | None = None) -> str:
    entry_point = EntryPoint("main", command, {"x": Parameter("x")})
    return render(entry_point, resolve(entry_point, {"x": value, **(extra or {})}))


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


def test_the_canary_sings(tmp_path: Path) -> None:
    """What the reference makes of quotes around a placeholder runs the value: the tests above would see it."""
    assert run_bash(["show \"'$(pwn)'\""], tmp_path) == [["''"]]
    assert (tmp_path / "pwned").exists()
