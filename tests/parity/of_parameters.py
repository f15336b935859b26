"""Cases of parameters and of the command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from parity.case import Case, entry_point
from parity.places import Place

__all__ = ["CASES"]


def data(place: Place) -> None:
    """``@files/data.csv``, and a file of the same name in the caller's folder."""
    (place.folder / "data.csv").write_text("a,b\n")
    place.ground.files.files["/" + "/".join([*place.folder.parts[-2:], "data.csv"])] = b"a,b\n"


def artifact(place: Place) -> None:
    """``@artifact``: a file that another MLflow run has logged."""
    tracking = place.ground.tracking
    run_id = tracking.create_run("0")
    tracking.put_artifact(run_id, "data.csv", b"a,b\n")
    place.words["@artifact"] = f"runs:/{run_id}/data.csv"


def case(
    name: str,
    *differs: str,
    command: str = "echo {a}",
    declared: str = "",
    given: Mapping[str, object] | None = None,
    storage: str = "",
    prepare: Callable[[Place], None] | None = None,
) -> Case:
    """Return a case with one entry point.

    Args:
        name: The name of the case.
        differs: The differences that it shows, as in `Case`.
        command: The command of the entry point.
        declared: The parameters of the entry point, as YAML in one line.
        given: The parameters of the call.
        storage: The ``storage_dir``.
        prepare: A function that prepares the place, as in `Case`.
    """
    arguments: dict[str, Any] = {"parameters": given}
    if storage:
        arguments["storage_dir"] = storage
    return Case(name, differs, mlproject=entry_point(command, declared), arguments=arguments, prepare=prepare)


TYPED = "a: {default: 0.10}, b: {default: yes}, c: {default: 1e3}, d: {default: 2024-01-02}"

PARAMETERS = [
    case("parameter-string", declared="a: string", given={"a": "x"}),
    case("parameter-untyped", declared="a: {}", given={"a": "x"}),
    case("parameter-default", declared="a: {type: string, default: x}"),
    case("parameter-default-typed", command="echo {a} {b} {c} {d}", declared=TYPED),
    case("parameter-empty", declared="a: string", given={"a": ""}),
    case("parameter-boolean", declared="a: string", given={"a": True}),
    case("parameter-path-object", declared="a: string", given={"a": "data.csv"}),
    case("parameter-backslash", "values-in-variables", declared="a: string", given={"a": "x\\"}),
    case("parameter-none", "plain-values", declared="a: string", given={"a": None}),
    case("parameter-list", "plain-values", declared="a: string", given={"a": [1, 2]}),
    case("parameter-unknown-type", declared="a: number", given={"a": "x"}),
    case("parameter-int", declared="a: int", given={"a": 3}),
    case("parameter-int-wrong", "types-checked", declared="a: int", given={"a": "x"}),
    case("parameter-bool-wrong", "types-checked", declared="a: bool", given={"a": "x"}),
    # An MLproject with all extensions gives the same command, where each placeholder is the value of an option.
    case(
        "parameter-extensions",
        command="echo --flag {flag} --tags {tags} --note {note} --steps {steps}",
        declared="flag: {type: bool, default: false}, tags: {type: list, default: [], option: --tags}, "
        "note: {default: '', optional: true}, steps: {type: int, default: 3}",
        given={"tags": "x", "note": "y"},
    ),
    case(
        "parameter-options",
        "options-rendered",
        command="echo {flag} --note {note}",
        declared="flag: {type: bool, default: true}, note: {default: '', optional: true}",
    ),
    case(
        "parameter-repeated",
        "options-rendered",
        command="echo --tags {tags}",
        declared="tags: list",
        given={"tags": "[1,2]"},
    ),
    case("parameter-float", declared="a: float", given={"a": 0.1}),
    case("parameter-float-wrong", "types-checked", declared="a: float", given={"a": "x"}),
    case("parameter-uri", declared="a: uri", given={"a": "s3://bucket/key"}),
    case("parameter-uri-wrong", "no-run-left", declared="a: uri", given={"a": "no uri"}),
    case("parameter-path", declared="a: path", given={"a": "data.csv"}, prepare=data),
    case("parameter-path-file-uri", declared="a: path", given={"a": "file://@case/data.csv"}, prepare=data),
    case("parameter-path-default", declared="a: {type: path, default: data.csv}", prepare=data),
    Case(
        "parameter-path-default-in-project",
        ("path-default-in-project",),
        mlproject=entry_point("cat {a}", "a: {type: path, default: only-here.csv}"),
        files={"only-here.csv": "a,b\n"},
    ),
    case("parameter-path-missing", "no-run-left", declared="a: path", given={"a": "nowhere"}),
    case(
        "parameter-path-download",
        command="cat {b}",
        declared="a: string, b: path",
        given={"a": "x", "b": "@artifact"},
        storage="@case/storage",
        prepare=artifact,
    ),
    case(
        "parameter-path-download-missing",
        "no-run-left",
        declared="a: path",
        given={"a": "@artifact.nowhere"},
        storage="@case/storage",
        prepare=artifact,
    ),
    case("parameter-path-http", "http-downloads", declared="a: path", given={"a": "@files/data.csv"}, prepare=data),
    case(
        "storage-dir-new", declared="a: path", given={"a": "@artifact"}, storage="@case/storage/new", prepare=artifact
    ),
    case("parameters-missing", declared="a: float, b: string"),
    case("parameters-none", command="echo hello"),
    case(
        "parameters-extra",
        "values-in-variables",
        command="echo hello",
        given={"z": 1, "a": "x y", "m": "$(date)"},
    ),
    case("parameters-extra-and-declared", declared="a: float", given={"b": 1, "a": 2}),
    case("parameters-extra-name", "extra-names-logged", "extra-names-quoted", command="echo hello", given={"a b": 1}),
    case("parameters-extra-name-refused", "no-run-left", command="echo hello", given={"z[0]": 1}),
]

COMMANDS = [
    case(
        "command-quotes",
        "values-in-variables",
        declared="a: string",
        given={"a": 'it\'s $(date) `date` "$HOME" ; *'},
    ),
    case(
        "command-in-double-quotes", "quoted-in-place", command='echo "is {a}"', declared="a: string", given={"a": "x y"}
    ),
    case(
        "command-in-single-quotes",
        "quoted-in-place",
        command="echo 'is {a}'",
        declared="a: string",
        given={"a": "$(date)"},
    ),
    case("command-plain-in-quotes", command='echo "is {a}"', declared="a: float", given={"a": 0.5}),
    case("command-doubled-braces", command="echo ${{HOME}} {a}", declared="a: float", given={"a": 1}),
    case("command-shell-variable", "braces-stay", command="echo ${HOME} {a}", declared="a: float", given={"a": 1}),
    case("command-json", "braces-stay", command="echo '{\"a\": 1}'"),
    case("command-undeclared", "braces-stay", command="echo {b}"),
    case("command-format", "format-specs", command="echo {a:5}.", declared="a: string", given={"a": "x"}),
    case("command-backslash", command="echo hello \\"),
    case("command-backslash-and-extra", "extra-after-backslash", command="echo hello \\", given={"a": 1}),
    case("command-pipes", command="echo hello | tr a-z A-Z && false || echo other; echo $?"),
    case("command-reads-stdin", command="cat"),
    Case(
        "command-block-and-extra",
        ("extra-after-newline",),
        mlproject="entry_points:\n  main:\n    command: |\n      echo hello\n",
        arguments={"parameters": {"a": 1}},
    ),
]

CASES = [*PARAMETERS, *COMMANDS]
