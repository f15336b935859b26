"""The requirements in python_env.yaml and conda.yaml, and the keys that let projects share an environment."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.packages import make_package
from mlfleet._environments.env_files import matches, read_conda_file, read_python_requirements
from mlfleet._environments.manager import EnvironmentPlan
from mlfleet._environments.virtualenv import plan_python
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet._text.documents import Report
from mlfleet.errors import SpecError

# Without what leads out of the folder, into a walk through all of the disk.
WORDS = st.text(st.characters(exclude_characters="/.", exclude_categories=["Cs"]))


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def python_env(folder: Path) -> EnvironmentFile:
    return EnvironmentFile(EnvironmentFileKind.PYTHON_ENV, folder / "python_env.yaml")


def conda_env(folder: Path) -> EnvironmentFile:
    return EnvironmentFile(EnvironmentFileKind.CONDA, folder / "conda.yaml")


def plan(folder: Path, manager: str = "virtualenv") -> EnvironmentPlan:
    return plan_python(manager, folder, python_env(folder))


def test_lines_keep_their_text_and_paths_become_absolute(tmp_path: Path) -> None:
    make_package(tmp_path / "package")
    make_package(tmp_path / "other package")
    (tmp_path / "wheels").mkdir()
    write(
        tmp_path,
        {
            "python_env.yaml": """
                python: 3.10
                build_dependencies: [pip, setuptools==70.0]
                dependencies:
                  - numpy>=1.26 ; python_version > "3.9"  # for speed
                  - -r requirements.txt
                  - --constraint=more/limits.txt
                  - ./package[fast]
                  - -e "./other package"
                  - --find-links wheels
                  - -f https://user:secret@example.com/wheels
                  - thing @ https://example.com/thing.whl
            """,
            "requirements.txt": "six\n",
            "more/limits.txt": "six<2\n",
        },
    )
    needs = read_python_requirements(tmp_path, python_env(tmp_path))
    assert needs.python == "3.10"  # not 3.1, although YAML takes it for a number
    assert needs.build.lines == ("pip", "setuptools==70.0")
    assert needs.packages.lines == (
        'numpy>=1.26 ; python_version > "3.9"',
        "-f https://user:secret@example.com/wheels",
        "thing @ https://example.com/thing.whl",
    )
    assert needs.packages.arguments == (
        *("-r", f"{tmp_path}/requirements.txt"),
        *("-c", f"{tmp_path}/more/limits.txt"),
        f"{tmp_path}/package[fast]",
        *("-e", f"{tmp_path}/other package"),
        *("-f", f"{tmp_path}/wheels"),
    )
    assert "secret" not in repr(plan(tmp_path))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("python_env.yaml", "python: '3.11'\ndependencies: [-r requirements.txt, ./package, extra]\n"),
        ("requirements.txt", "six==1.16\n"),
        ("deep/more.txt", "# changed\nattrs\n"),
        ("limits.txt", "six<3\n"),
        ("package/tinypkg.py", "VALUE = 'changed'\n"),
    ],
)
def test_every_file_that_counts_changes_the_key(tmp_path: Path, name: str, text: str) -> None:
    make_package(tmp_path / "package")
    write(
        tmp_path,
        {
            "python_env.yaml": "python: '3.11'\ndependencies: [-r requirements.txt, ./package]\n",
            "requirements.txt": "six\n-r deep/more.txt\n",
            "deep/more.txt": "-c ../limits.txt\nattrs\n",
            "limits.txt": "six<2\n",
        },
    )
    before = plan(tmp_path)
    write(tmp_path, {"data.csv": "1,2", "package/__pycache__/x.py": "", "package/result.csv": "3"})
    assert plan(tmp_path).key == before.key
    assert plan(tmp_path, "uv").key != before.key
    write(tmp_path, {name: text})
    assert plan(tmp_path).key != before.key


def test_a_package_beside_many_data_files(tmp_path: Path) -> None:
    write(tmp_path, {"python_env.yaml": "dependencies: [.]", "pyproject.toml": "", "code.py": "1"})
    before = plan(tmp_path).key
    (tmp_path / "data").mkdir()
    for number in range(50_001):
        os.close(os.open(tmp_path / "data" / f"{number}.csv", os.O_CREAT))
    assert plan(tmp_path).key == before
    (tmp_path / "data" / "code.py").write_text("2")
    assert plan(tmp_path).key != before


def test_changes_of_an_editable_package_need_no_new_environment(tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    write(tmp_path, {"python_env.yaml": "dependencies: [-e ./package]\n"})
    before = plan(tmp_path).key
    package.set_value("other")
    assert plan(tmp_path).key == before
    with (package.folder / "pyproject.toml").open("a") as file:
        file.write('dependencies = ["six"]\n')
    assert plan(tmp_path).key != before


def test_projects_with_the_same_needs_share_a_key(tmp_path: Path) -> None:
    files = {"python_env.yaml": "dependencies: [six, -c limits.txt]\n", "limits.txt": "six<2\n"}
    one, two = (write(tmp_path / name, files) for name in ("one", "two"))
    assert (
        read_python_requirements(one, python_env(one)).packages.contents
        == read_python_requirements(two, python_env(two)).packages.contents
    )
    assert plan(one).key == plan(two).key


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"python_env.yaml": "python: 3.x\n"},
            r"python_env.yaml, line 1, column 9: .*'3.x' is not a version of Python",
        ),
        ({"python_env.yaml": "python: [3]\n"}, "expected a version of Python, found a list"),
        ({"python_env.yaml": "dependencies: six\n"}, "line 1, column 15: dependencies: expected a list, found the str"),
        ({"python_env.yaml": "- six\n"}, "expected a mapping with python and dependencies, found a list"),
        (
            {"python_env.yaml": "dependencies:\n- six\n- {a: 1}\n"},
            r"line 3, column 3: dependencies\[1\]: expected a requirement",
        ),
        (
            {"python_env.yaml": "dependencies:\n- six\n- -r gone.txt\n"},
            r"python_env.yaml, line 3, column 3: .*'gone.txt' cannot be read: No such file",
        ),
        (
            {"python_env.yaml": "dependencies: [-r a.txt]\n", "a.txt": "six\n\n-r \\\n  b/c.txt\n"},
            r"a.txt, line 3: the requirements file 'b/c.txt' cannot be read: No such file",
        ),
        ({"python_env.yaml": "dependencies:\n- ./gone\n"}, r"line 2, column 3: .*there is no package at './gone'"),
        (
            {"python_env.yaml": "dependencies: [-r a.txt]\n", "a.txt": "-e gone\n-e ./gone\n"},
            r"a.txt, line 2: there is no package at './gone'",
        ),
    ],
)
def test_a_mistake_is_reported_with_its_position(tmp_path: Path, files: dict[str, str], message: str) -> None:
    write(tmp_path, files)
    with pytest.raises(SpecError, match=message):
        plan(tmp_path)


@pytest.mark.parametrize("name", [".", "pipe"])
def test_a_path_that_is_not_a_regular_file_is_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path, {"python_env.yaml": f"dependencies: ['-r {name}']\n"})
    with pytest.raises(SpecError, match="cannot be read: not a regular file"):
        plan(tmp_path)
    write(tmp_path, {"python_env.yaml": "dependencies: ['-r /dev/zero']\n"})
    with pytest.raises(SpecError, match="'/dev/zero' is outside of the project's repository"):
        plan(tmp_path)


@settings(deadline=None)  # the machine may be busy
@given(WORDS, st.sampled_from(["", "-r ", "-e ", "-f", "./", "--constraint=", "name @ "]))
def test_any_requirements_file_raises_only_mlfleet_errors(
    tmp_path_factory: pytest.TempPathFactory, line: str, start: str
) -> None:
    folder = write(
        tmp_path_factory.getbasetemp() / "fuzz", {"python_env.yaml": "dependencies: [-r r.txt]", "r.txt": start + line}
    )
    with contextlib.suppress(SpecError):
        plan(folder)


@settings(deadline=None)  # the machine may be busy
@given(WORDS, st.sampled_from(["", "-r ", "-e ", "-f", "./", "--constraint=", "python", "python="]))
def test_any_dependency_list_raises_only_mlfleet_errors(
    tmp_path_factory: pytest.TempPathFactory, line: str, start: str
) -> None:
    items = json.dumps([start + line])
    folder = write(
        tmp_path_factory.getbasetemp() / "fuzz",
        {"python_env.yaml": f"dependencies: {items}", "conda.yaml": f"dependencies: {items}"},
    )
    for read in (lambda: plan(folder), lambda: read_python_requirements(folder, conda_env(folder))):
        with contextlib.suppress(SpecError):
            read()


def test_all_mistakes_of_a_conda_file_are_collected(tmp_path: Path) -> None:
    write(tmp_path, {"conda.yaml": "dependencies:\n- [1]\n- python=x\n- {pipp: [six]}\n- pip: [./gone]\n"})
    report = Report(collect=True)
    read_python_requirements(tmp_path, conda_env(tmp_path), report)
    assert sorted(mistake.line or 0 for mistake in report.mistakes) == [2, 3, 4, 5]


def test_only_python_and_pip_packages_of_a_conda_file_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(
        tmp_path,
        {
            "conda.yaml": """
                name: ignored
                channels: [conda-forge]
                dependencies:
                  - conda-forge::python=3.10
                  - pip=24.0=pyh_0
                  - setuptools>=65,<80
                  - wheel
                  - numpy=1.26
                  - cudatoolkit
                  - pip: [six, -r requirements.txt]
            """,
            "requirements.txt": "attrs\n",
        },
    )
    with caplog.at_level(logging.WARNING, "mlfleet"):
        for _ in range(3):
            needs = read_python_requirements(tmp_path, conda_env(tmp_path))
    assert needs.python == "3.10"
    assert needs.build.lines == ("pip==24.0.*", "setuptools>=65,<80", "wheel")
    assert needs.packages.lines == ("six",)
    assert needs.packages.arguments == ("-r", f"{tmp_path}/requirements.txt")
    assert len(caplog.records) == 1
    assert "numpy, cudatoolkit" in caplog.text


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("python", None),
        ("python=3.10", "3.10"),
        ("python==3.10.4", "3.10.4"),
        ("python=3.10.*", "3.10"),
        ("python 3.10", "3.10"),
        ("python[version=3.10]", "3.10"),
        ('python[build=h0, version="3.10.*"]', "3.10"),
        ("python =3.10", "3.10"),
        ("python=3.10=h123_cpython", "3.10"),
        ("python 3.10.4 h123_cpython", "3.10.4"),
        ("python>=3.9,<3.12", ">=3.9,<3.12"),
        ("defaults::python<=3.11", "<=3.11"),
    ],
)
def test_a_conda_spec_of_python(tmp_path: Path, spec: str, wanted: str | None) -> None:
    write(tmp_path, {"conda.yaml": f"dependencies: ['{spec}']\n"})
    assert read_python_requirements(tmp_path, conda_env(tmp_path)).python == wanted


def test_what_conda_is_to_install(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "conda.yaml": "name: x\nprefix: /opt/x\nchannels: [conda-forge, file:///c]\n"
            "dependencies: [python=3.10, numpy, {pip: [six]}]\nvariables: {THREADS: 4}\n"
        },
    )
    needs = read_conda_file(tmp_path / "conda.yaml")
    assert needs.channels == ("conda-forge", "file:///c")
    assert needs.specs == ("python=3.10", "numpy")
    assert needs.packages.lines == ("six",)
    assert needs.variables == (("THREADS", "4"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "dependencies: [{conda: [x]}]\n",
            "line 1, column 16: .*expected a package or `pip:`.*found a mapping with conda",
        ),
        ("dependencies: [{pip: six}]\n", "expected a list of requirements for pip, found the string 'six'"),
        ("dependencies: {python: 3}\n", "dependencies: expected a list, found a mapping"),
        ("channels: conda-forge\n", "channels: expected a list, found the string"),
    ],
)
def test_a_mistake_in_a_conda_file(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, {"conda.yaml": text})
    with pytest.raises(SpecError, match=message):
        read_conda_file(tmp_path / "conda.yaml")


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("3.10.13", None, True),
        ("3.10.13", "3", True),
        ("3.10.13", "3.10", True),
        ("3.10.13", "3.1", False),
        ("3.10.13", "3.10.1", False),
        ("3.10.13", "3.10.13", True),
        ("3.10.13", ">=3.9,<3.11", True),
        ("3.12.1", ">=3.9,<3.11", False),
        ("3.13.0rc1", ">=3.12", True),
    ],
)
def test_versions_match(version: str, wanted: str | None, expected: bool) -> None:
    assert matches(version, wanted) is expected


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("-r ${SERVICE_TOKEN}", "the requirements file '${SERVICE_TOKEN}' cannot be read"),
        ("-r ../${SERVICE_TOKEN}", r"the requirements file '../${SERVICE_TOKEN}' is outside"),
        ("./${SERVICE_TOKEN}", "there is no package at './${SERVICE_TOKEN}'"),
        ("-e ./pkg/${SERVICE_TOKEN}[fast]", "there is no package at './pkg/${SERVICE_TOKEN}[fast]'"),
        ("-r all.txt", "there is no package at './${SERVICE_TOKEN}'"),
    ],
)
def test_a_variable_in_a_line_is_not_shown_by_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, shown: str
) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", "hush-hush")
    files = {"python_env.yaml": f"dependencies: ['{line}']\n", "all.txt": "./${SERVICE_TOKEN}\n"}
    with pytest.raises(SpecError) as caught:
        plan(write(tmp_path / "demo", files))
    assert shown in str(caught.value)
    assert "hush-hush" not in str(caught.value)
