"""Parameters: what is checked, what becomes of values, what the messages say."""

from __future__ import annotations

import contextlib
import decimal
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfleet._project.parameters import Download, resolve
from mlfleet._project.spec import EntryPoint, Parameter
from mlfleet.errors import ParameterError


def entry_point(*parameters: Parameter) -> EntryPoint:
    return EntryPoint("main", "t", {parameter.name: parameter for parameter in parameters})


def fault(parameter: Parameter, value: object) -> str:
    with pytest.raises(ParameterError) as caught:
        resolve(entry_point(parameter), {parameter.name: value})
    assert caught.value.names == (parameter.name,)
    return str(caught.value)


def test_given_values_defaults_and_extra_ones() -> None:
    point = entry_point(Parameter("a", "float", "0.1"), Parameter("b"), Parameter("c", "int", "7"))
    resolved = resolve(point, {"z": True, "b": 3, "y": 1e-05, "x": Path("p/q"), "w": decimal.Decimal("1.50")})
    assert resolved.declared == {"a": "0.1", "b": "3", "c": "7"}
    assert list(resolved.extra.items()) == [("z", "True"), ("y", "1e-05"), ("x", "p/q"), ("w", "1.50")]
    assert resolved.logged == {**resolved.declared, **resolved.extra}
    assert resolve(entry_point(), None).logged == {}


@pytest.mark.parametrize("name", ["++x.y", "z[0]", "a=b", "a//b", "./a", "../a", "/a", "a/", ".", "x" * 251])
def test_a_name_that_mlflow_refuses_is_found_before_there_is_a_run(name: str) -> None:
    with pytest.raises(ParameterError, match="MLflow") as caught:
        resolve(entry_point(), {name: "1"})
    assert caught.value.names == (name,)
    with pytest.raises(ParameterError, match="MLflow"):
        resolve(entry_point(Parameter(name, default="1")), {})


def test_all_missing_and_wrong_parameters_are_reported_together() -> None:
    point = entry_point(
        Parameter("alpha"), Parameter("beta"), Parameter("rate", "float"), Parameter("set", default="1")
    )
    with pytest.raises(ParameterError) as caught:
        resolve(point, {"rate": "fast", "alhpa": "1", "zzz": None})
    assert str(caught.value) == (
        "the parameters of the entry point 'main' are wrong: no value is given for 'alpha', 'beta' "
        "('alhpa' was given, did you mean 'alpha'?); "
        "'zzz': a string, a number, a boolean or a path was expected, got nothing; "
        "'rate': a number was expected, got 'fast'"
    )
    assert set(caught.value.names) == {"alpha", "beta", "rate", "zzz"}


def test_a_name_like_that_of_a_default_is_mentioned_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mlfleet.project")
    resolved = resolve(entry_point(Parameter("learning_rate", "float", "0.1")), {"learning-rate": "0.5"})
    assert resolved.extra == {"learning-rate": "0.5"}
    assert "'learning-rate' was given, did you mean 'learning_rate'?" in caplog.text


@pytest.mark.parametrize("value", ["1", "-0.5", "1e-3", "inf", "nan", " 5 ", 3, 2.5])
def test_numbers(value: object) -> None:
    assert resolve(entry_point(Parameter("x", "float")), {"x": value}).declared == {"x": str(value)}


@pytest.mark.parametrize("value", ["", "a", "1,5", "1;touch pwned", "0x10", "True"])
def test_values_that_are_not_numbers_are_refused(value: str) -> None:
    assert f"'x': a number was expected, got {value!r}" in fault(Parameter("x", "float"), value)


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, (1,), b"bytes", object()])
def test_values_that_have_no_text(value: object) -> None:
    assert "a string, a number, a boolean or a path was expected, got" in fault(Parameter("x"), value)


def test_a_default_path_is_looked_for_in_the_project_after_the_callers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, project = tmp_path / "elsewhere" / "caller", tmp_path / "project"
    for folder in (caller, project / "data"):
        folder.mkdir(parents=True)
    (project / "data" / "a.csv").touch()
    (tmp_path / "b.csv").touch()
    (project / "link.csv").symlink_to("../b.csv")
    monkeypatch.chdir(caller)

    def place(path: str, index: int) -> str | None:
        return f"/mnt/{Path(path).name}" if Path(path).exists() else None

    def declared(default: str, given: dict[str, object] | None = None) -> str:
        point = entry_point(Parameter("x", "path", default))
        placed = resolve(point, given, place, project_dir=project)
        assert placed.logged == {"x": (given or {}).get("x", default)}
        assert resolve(point, given, project_dir=project).declared.keys() == {"x"}
        return placed.declared["x"]

    # The command runs in the project's folder, wherever that is; there is nothing to place.
    assert declared("data/a.csv") == "data/a.csv"
    for wrong in ("../b.csv", "link.csv", "data/none.csv"):
        with pytest.raises(ParameterError, match="there is no file"):
            declared(wrong)
    with pytest.raises(ParameterError, match="there is no file"):
        declared("x", {"x": "data/a.csv"})
    (caller / "data").mkdir()
    (caller / "data" / "a.csv").touch()
    assert declared("data/a.csv") == "/mnt/a.csv"


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
def test_values_that_no_command_can_hold(value: str) -> None:
    assert "NUL" in fault(Parameter("x"), value)
    with pytest.raises(ParameterError, match="cannot be the name of a parameter"):
        resolve(entry_point(), {value: "1"})


def test_uris() -> None:
    assert resolve(entry_point(Parameter("x", "uri")), {"x": "models:/m/1"}).declared == {"x": "models:/m/1"}
    assert "a URI such as s3://bucket/key was expected, got 'data.csv'" in fault(Parameter("x", "uri"), "data.csv")
    assert "got '://a'" in fault(Parameter("x", "uri"), "://a")


def test_local_paths_become_absolute_and_are_logged_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.csv").write_text("")
    parameter = Parameter("x", "path")
    for given_path in ("a b.csv", "./a b.csv", f"{tmp_path}/sub/../a b.csv", f"file://{tmp_path}/a%20b.csv"):
        resolved = resolve(entry_point(parameter), {"x": given_path})
        assert resolved.declared == {"x": f"{tmp_path}/a b.csv"}
        assert resolved.logged == {"x": given_path}
        assert resolved.downloads == ()
    assert resolve(entry_point(parameter), {"x": tmp_path}).declared == {"x": str(tmp_path)}
    assert f"there is no file or folder '{tmp_path}/nothing'" in fault(parameter, "nothing")
    assert "got an empty text" in fault(parameter, "")
    assert "there is no file or folder" in fault(parameter, "x" * 5000)
    assert "is on another machine" in fault(parameter, "file://server/share")


def test_paths_mapped_by_the_backend_are_neither_resolved_nor_downloaded() -> None:
    point = entry_point(Parameter("a", "path"), Parameter("b", "path"), Parameter("c"), Parameter("d", "path"))
    given = {"a": "/not/here", "b": "s3://bucket/f", "c": "s3://bucket/g", "d": "s3://bucket/h"}
    places = {("/not/here", 0): "/there", ("s3://bucket/f", 1): "/b"}
    resolved = resolve(point, given, lambda path, index: places.get((path, index)))
    assert resolved.declared == {"a": "/there", "b": "/b", "c": "s3://bucket/g", "d": "s3://bucket/h"}
    assert resolved.placed == {"/there": "/not/here", "/b": "s3://bucket/f"}
    assert resolved.downloads == (Download("d", "s3://bucket/h", 3),)
    assert resolved.logged == given


def test_remote_paths_are_downloads() -> None:
    point = entry_point(Parameter("a"), Parameter("b", "path"), Parameter("c", "path", "runs:/1/model"))
    resolved = resolve(point, {"a": "s3://not/a/path", "b": "https://host/f?sig=s"})
    assert resolved.downloads == (Download("b", "https://host/f?sig=s", 1), Download("c", "runs:/1/model", 2))
    assert resolved.logged["b"] == "https://host/f?sig=s"


def test_secrets_of_uris_are_not_in_errors() -> None:
    text = fault(Parameter("x", "float"), "https://user:hunter2@host/f?X-Amz-Signature=hunter3")
    assert "https://***@host/f?***" in text
    assert "hunter" not in text


@settings(deadline=None, database=None, max_examples=200)
@given(
    st.dictionaries(st.one_of(st.text(max_size=5), st.sampled_from("abcd")), st.text(max_size=10), max_size=5),
)
def test_any_value_raises_only_parameter_errors(given_values: dict[str, str]) -> None:
    point = entry_point(Parameter("a", "float", "1"), Parameter("b", "path", "/"), Parameter("c", "uri", "a:"))
    with contextlib.suppress(ParameterError):
        assert set(given_values) <= set(resolve(point, given_values).logged)
