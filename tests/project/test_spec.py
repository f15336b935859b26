"""MLproject: what is read, and what a mistake's message says."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlfleet._project.command import render
from mlfleet._project.parameters import resolve
from mlfleet._project.spec import DockerEnv, EnvironmentFile, EnvironmentFileKind, Parameter, ProjectSpec, read_project
from mlfleet.errors import MlfleetError, ParameterError, SpecError


def project(folder: Path, text: str | None = None, *files: str, name: str = "MLproject") -> ProjectSpec:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")
    if text is not None:
        (folder / name).write_text(text)
    return read_project(folder)


def mistake(folder: Path, text: str, *files: str) -> str:
    with pytest.raises(SpecError) as caught:
        project(folder, text, *files).entry_point("main")
    return str(caught.value).removeprefix(str(folder / "MLproject") + ", ")


def test_a_whole_project(tmp_path: Path) -> None:
    text = """
name: tutorial
conda_env: envs/train.yaml
entry_points:
  main:
    parameters:
      alpha: float
      l1: {type: float, default: 0.10}
      data: {type: path, default: data.csv}
      any: {default: yes}
      day: {default: 2024-05-06}
      typeless:
      strange: {type: int, default: 1e3}
    command: "python train.py {alpha}"
  other:
    parameters:
    command: ls
"""
    spec = project(tmp_path, text, "envs/train.yaml", "python_env.yaml")
    assert (spec.name, spec.path, spec.folder) == ("tutorial", tmp_path / "MLproject", tmp_path)
    assert spec.environment == EnvironmentFile(EnvironmentFileKind.CONDA, tmp_path / "envs/train.yaml")
    assert list(spec.entry_points) == ["main", "other"]
    # The texts of defaults are those that the reference gives: str() of the value.
    assert list(spec.entry_point("main").parameters.values()) == [
        Parameter("alpha", "float"),
        Parameter("l1", "float", "0.1"),
        Parameter("data", "path", "data.csv"),
        Parameter("any", "string", "True"),
        Parameter("day", "string", "2024-05-06"),
        Parameter("typeless"),
        Parameter("strange", "int", "1e3"),
    ]
    assert spec.entry_point("other").parameters == {}


@pytest.mark.parametrize("name", ["MLproject", "mlproject", "MLPROJECT", "MlProject"])
def test_the_file_is_found_in_any_case(tmp_path: Path, name: str) -> None:
    assert project(tmp_path, "name: x", name=name).path == tmp_path / name


def test_the_usual_file_name_is_preferred_among_several(tmp_path: Path) -> None:
    (tmp_path / "MLPROJECT").write_text("name: other")
    assert project(tmp_path, "name: usual").name == "usual"


@pytest.mark.parametrize("text", ["", "name:\nentry_points:\ndocker_env:\nconda_env:\n", "{}"])
def test_empty_sections_are_read_as_empty(tmp_path: Path, text: str) -> None:
    spec = project(tmp_path, text)
    assert (spec.name, spec.entry_points, spec.environment, spec.docker) == (None, {}, None, None)


def test_files_of_the_root_decide_the_environment(tmp_path: Path) -> None:
    assert project(tmp_path).environment is None
    assert project(tmp_path, None, "conda.yaml").environment == EnvironmentFile(
        EnvironmentFileKind.CONDA, tmp_path / "conda.yaml"
    )
    assert project(tmp_path, "name: x", "python_env.yaml").environment == EnvironmentFile(
        EnvironmentFileKind.PYTHON_ENV, tmp_path / "python_env.yaml"
    )


def test_an_environment_file_may_be_beside_the_project(tmp_path: Path) -> None:
    (tmp_path / "shared.yaml").write_text("")
    (tmp_path / "p").mkdir()
    (tmp_path / ".git").mkdir()  # one repository
    spec = project(tmp_path / "p", "python_env: ../shared.yaml")
    assert spec.environment == EnvironmentFile(EnvironmentFileKind.PYTHON_ENV, tmp_path / "shared.yaml")


def test_docker(tmp_path: Path) -> None:
    text = """
docker_env:
  image: registry/base:1
  volumes: ["/a:/a", "/b:/b:ro"]
  environment: [["NAME", "va=lue"], COPIED, [PORT, 8080], ["EMPTY", ""]]
"""
    spec = project(tmp_path, text, "python_env.yaml")
    assert spec.environment is None
    assert spec.docker == DockerEnv(
        "registry/base:1",
        ("/a:/a", "/b:/b:ro"),
        (("NAME", "va=lue"), ("COPIED", None), ("PORT", "8080"), ("EMPTY", "")),
    )


def test_databricks_spark_job(tmp_path: Path) -> None:
    text = "databricks_spark_job: {python_file: 'a b.py', parameters: ['x{y}', 1], python_libraries: [numpy]}"
    spec = project(tmp_path, text, "python_env.yaml")
    assert spec.databricks_spark_job == {
        "python_file": "a b.py",
        "parameters": ["x{y}", "1"],
        "python_libraries": ["numpy"],
    }
    assert spec.environment is None
    entry_point = spec.entry_point("main")
    assert render(entry_point, resolve(entry_point, {})) == "python 'a b.py' 'x{y}' 1"


ENTRY = "entry_points: {main: {command: ls, parameters: {p: path}}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "line 1, column 1: expected a mapping with the keys of an MLproject file, found a list"),
        ("name: [a]", "line 1, column 7: name: expected a text, found a list"),
        ("entry_points: [a]", "line 1, column 15: entry_points: expected a mapping, found a list"),
        ("entry_points:\n  main: ls", "line 2, column 9: entry_points.main: expected a mapping with a command"),
        ("entry_points:\n  main:\n    parameters: {}", "line 3, column 5: entry_points.main: the command is missing"),
        ("entry_points: {main: {command: [ls]}}", "entry_points.main.command: expected a command, found a list"),
        ("entry_points: {main: {command: 5}}", "entry_points.main.command: expected a command, found the number 5"),
        (
            "entry_points: {main: {command: ls, parameters: [a]}}",
            "entry_points.main.parameters: expected a mapping of names and types, found a list",
        ),
        (
            "entry_points:\n  main:\n    command: ls\n    parameters:\n      alpha: 0.5",
            "line 5, column 14: entry_points.main.parameters.alpha: expected a type, or a mapping with type and"
            " default, found the number 0.5",
        ),
        (
            "entry_points: {main: {command: ls, parameters: {a: {type: [float]}}}}",
            "parameters.a.type: expected a type (string, float, int, bool, list, path or uri), found a list",
        ),
        (
            "entry_points: {main: {command: ls, parameters: {a: float, a: float}}}",
            "line 1, column 59: entry_points.main.parameters: the key 'a' is there twice",
        ),
        (
            "docker_env: {image: a}\nconda_env: b",
            "line 2, column 12: conda_env: only one of docker_env, python_env, conda",
        ),
        ("conda_env: nothing.yaml", "conda_env: there is no file '"),
        ("conda_env: .", "conda_env: there is no file '"),
        (f"conda_env: {'x' * 5000}", "conda_env: there is no file '"),
        ("python_env: [a]", "python_env: expected the path of a file, found a list"),
        ("docker_env: a", "docker_env: expected a mapping with an image, found the string 'a'"),
        ("docker_env: {volumes: []}", "docker_env: the image is missing"),
        ("docker_env: {image: ''}", "docker_env.image: the image is empty"),
        ("docker_env: {image: a, volumes: /a}", 'expected a list such as ["/data:/data:ro"], found the string'),
        ("docker_env: {image: a, volumes: [[a]]}", "docker_env.volumes[0]: expected a volume"),
        ("docker_env: {image: a, environment: {A: b}}", "docker_env.environment: expected a list such as [["),
        ("docker_env: {image: a, environment: [[A]]}", "environment[0]: expected a pair"),
        ("docker_env: {image: a, environment: [5]}", "environment[0]: expected a pair"),
        (
            "docker_env: {image: a, environment: ['A=b']}",
            "'A=b' is not the name of a variable; to set one, write [\"NAME\"",
        ),
        ("docker_env: {image: a, environment: [[A, [b]]]}", "expected a string, a number, a boolean or a date"),
        ("databricks_spark_job: {}", "databricks_spark_job: python_file or entry_points must say what to run"),
        (ENTRY + "databricks_spark_job: {python_file: a}", "cannot both be given"),
        (ENTRY + "databricks_spark_job: {}", "the parameter 'p' is a path, which a databricks_spark_job cannot have"),
        (
            "databricks_spark_job: {python_file: a}\ndocker_env: {image: a}",
            "line 2, column 13: docker_env: a databricks",
        ),
        ("databricks_spark_job: {python_file: a, parameters: [[a]]}", "parameters[0]: expected a string, a number"),
        ("name: a\nname: b", "line 2, column 1: the key 'name' is there twice"),
    ],
)
def test_mistakes_have_a_place_and_say_what_was_expected(tmp_path: Path, text: str, message: str) -> None:
    assert message in mistake(tmp_path, text)


def test_unknown_keys_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "mlfleet.project")
    project(tmp_path, "entrypoints: {}\nentry_points: {main: {comand: a, command: b}}")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/MLproject: keys that are unknown and have no effect: "
        "'entrypoints' (line 1, did you mean 'entry_points'?), "
        "'comand' in entry_points.main (line 2, did you mean 'command'?)"
    ]


def test_descriptions_of_parameters_are_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "mlfleet.project")
    text = "entry_points: {main: {command: ls, parameters: {a: {type: float, description: its use}}}}"
    assert project(tmp_path, text).entry_point("main").parameters["a"] == Parameter("a", "float")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{command: ls, command: pwd}", "the key 'command' is there twice"),
        ("{parameters: {a: float}}", "the command is missing"),
        ("{command: ls, parameters: {a: {type: 5}}}", "expected a type"),
        ("{command: ls, parameters: {a: float, a: float}}", "the key 'a' is there twice"),
        ("ls", "expected a mapping with a command"),
    ],
)
def test_a_mistake_in_another_entry_point_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: str, message: str
) -> None:
    caplog.set_level(logging.WARNING, "mlfleet.project")
    spec = project(tmp_path, f"entry_points:\n  main: {{command: ls}}\n  other: {wrong}\n")
    assert spec.entry_point("main").command == "ls"
    (warning,) = caplog.records
    assert "another entry point of the project is wrong" in warning.getMessage()
    assert message in warning.getMessage()
    with pytest.raises(SpecError, match=message):
        spec.entry_point("other")


def test_a_default_that_cannot_be_used_counts_only_without_a_value(tmp_path: Path) -> None:
    text = "entry_points: {main: {command: 'ls {a}', parameters: {a: {default: [1, 2]}}}}"
    entry_point = project(tmp_path, text).entry_point("main")
    assert render(entry_point, resolve(entry_point, {"a": "x"})) == "ls x"
    with pytest.raises(ParameterError, match=r"'a': its default is wrong .*line 1, column 68: .*found a list"):
        resolve(entry_point, {})


def test_a_path_that_is_not_a_project_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no such folder"):
        read_project(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="a project is a folder, this is a file"):
        read_project(tmp_path / "file")
    (tmp_path / "MLproject").mkdir()
    with pytest.raises(SpecError, match="this is a folder, a file was expected"):
        read_project(tmp_path)


@pytest.mark.parametrize(
    ("script", "shell", "command"),
    [
        ("train.py", None, "python train.py"),
        ("sub/a b.py", None, "python 'sub/a b.py'"),
        ("-c.py", None, "python ./-c.py"),
        ("{x}.py", None, "python '{x}.py'"),
        ("$(a).py", None, "python '$(a).py'"),
        ("run.sh", "/bin/zsh", "/bin/zsh run.sh"),
        ("run.sh", "", "bash run.sh"),
        ("run.sh", None, "bash run.sh"),
        ("train.R", None, "Rscript -e \"mlflow::mlflow_source('train.R')\" --args"),
        ("it's $x.R", None, "Rscript -e \"mlflow::mlflow_source('it\\\\'s \\$x.R')\" --args"),
    ],
)
def test_scripts_are_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, shell: str | None, command: str
) -> None:
    monkeypatch.delenv("SHELL", raising=False)
    if shell is not None:
        monkeypatch.setenv("SHELL", shell)
    entry_point = project(tmp_path, None, script).entry_point(script)
    assert render(entry_point, resolve(entry_point, {"x": "1"})) == f"{command} --x 1"


def test_scripts_stay_inside_the_project(tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text("")
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "link.py").symlink_to(tmp_path / "outside.py")
    spec = project(folder, "name: x", "sub/in.py")
    for name in ("../outside.py", str(tmp_path / "outside.py"), "link.py"):
        with pytest.raises(SpecError, match="is outside the project"):
            spec.entry_point(name)
    assert spec.entry_point("sub/../sub/in.py").command == "python sub/../sub/in.py"


@pytest.mark.parametrize("name", ["tr\ud800.py", "main\ud800", "loop.py", "a\0.py", "x" * 300 + ".py"])
def test_an_entry_point_that_cannot_be_a_file_raises_an_mlfleet_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.py").symlink_to("loop.py")
    with pytest.raises(SpecError, match="there is no entry point"):
        read_project(tmp_path).entry_point(name)


def test_an_mlproject_that_is_a_loop_of_links_raises_an_mlfleet_error(tmp_path: Path) -> None:
    (tmp_path / "MLproject").symlink_to("MLproject")
    with pytest.raises(SpecError, match="MLproject: cannot be read: Too many levels of symbolic links"):
        read_project(tmp_path)


def test_an_unknown_entry_point_lists_the_known_ones(tmp_path: Path) -> None:
    text = "entry_points: {main: {command: a}, validate: {command: b}}"
    spec = project(tmp_path, text, "train.py", "data.csv")
    with pytest.raises(SpecError) as caught:
        spec.entry_point("validat")
    assert str(caught.value) == (
        f"{tmp_path}/MLproject: there is no entry point 'validat', did you mean 'validate'?; "
        "MLproject declares main, validate; a script (.py, .sh, .R) of the project can be given by its path, "
        "here train.py"
    )
    for name in ("", "trian.py", "sub/train.py", "a\0b.py", "x" * 5000 + ".py", "data.csv"):
        with pytest.raises(SpecError, match="there is no entry point"):
            spec.entry_point(name)
    with pytest.raises(SpecError, match=r"the project has no MLproject file; a script .* here b.py"):
        project(tmp_path / "other", None, "b.py").entry_point("main")
    with pytest.raises(SpecError, match="MLproject declares none"):
        project(tmp_path, "name: a").entry_point("main")


KEYS = [
    "name",
    "docker_env",
    "python_env",
    "conda_env",
    "entry_points",
    "databricks_spark_job",
    "parameters",
    "command",
]
KEYS += ["type", "default", "image", "volumes", "environment", "python_file", "main", "x"]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["float", "path", "{x}"])
)
DOCUMENTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=12,
)
TEXTS = st.one_of(st.binary(max_size=100), DOCUMENTS.map(lambda data: yaml.safe_dump(data).encode()))


@settings(
    deadline=None,
    database=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(TEXTS, st.text(max_size=8))
def test_any_project_file_raises_only_mlfleet_errors(tmp_path: Path, text: bytes, name: str) -> None:
    (tmp_path / "MLproject").write_bytes(text)
    with contextlib.suppress(MlfleetError):
        spec = read_project(tmp_path)
        for entry_point in spec.entry_points.values():
            with contextlib.suppress(MlfleetError):
                render(entry_point, resolve(entry_point, {"x": name, name: "1"}))
        spec.entry_point(name)
