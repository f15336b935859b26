"""The file that an environment is made of where the project names none."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mlfleet._environments.env_files import PythonRequirements
from mlfleet._environments.manager import EnvironmentPlan, choose_manager, create_manager
from mlfleet._project.spec import read_project
from mlfleet.errors import SpecError

PYPROJECT = """
[project]
name = "thing"
version = "0"
requires-python = ">=3.9,<3.99"
dependencies = ["six>=1", "attrs; python_version > '3'"]
"""
TOOLS = "[tool.ruff]\nline-length = 100\n"
DYNAMIC = "[project]\nname = 'thing'\nversion = '0'\ndynamic = ['dependencies']\n"
LOCK = "version = 1\nrequires-python = '>=3.10'\n"
REQUIREMENTS = "# comment\nsix==1.16.0 \\\n  --hash=sha256:0123\n-c limits.txt\n"


def plan(folder: Path, files: dict[str, str], manager: str | None = None) -> EnvironmentPlan:
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "limits.txt").write_text("six<2\n")
    spec = read_project(folder)
    return create_manager(choose_manager(manager, spec.environment)).plan(spec.folder, spec.environment)


def packages(found: EnvironmentPlan) -> tuple[str, ...]:
    """Return what is installed: lines, then arguments; nothing for a lock file, which uv reads itself."""
    if not isinstance(found.details, PythonRequirements):
        return ()
    return (*found.details.packages.lines, *found.details.packages.arguments)


@pytest.mark.parametrize(
    ("files", "manager", "source", "dependencies"),
    [
        (
            {"requirements.txt": REQUIREMENTS},
            "virtualenv",
            "requirements.txt",
            ("six==1.16.0   --hash=sha256:0123", "-c", "{}/limits.txt"),
        ),
        (
            {"pyproject.toml": PYPROJECT, "requirements.txt": "attrs"},
            "virtualenv",
            "pyproject.toml",
            ("six>=1", 'attrs; python_version > "3"'),
        ),
        ({"pyproject.toml": TOOLS, "requirements.txt": "attrs"}, "virtualenv", "requirements.txt", ("attrs",)),
        ({"pyproject.toml": DYNAMIC, "requirements.txt": "attrs"}, "virtualenv", "requirements.txt", ("attrs",)),
        ({"pyproject.toml": TOOLS}, "virtualenv", None, ()),
        (
            {"uv.lock": LOCK, "pyproject.toml": PYPROJECT, "requirements.txt": "attrs"},
            "uv",
            "uv.lock",
            (),
        ),
        ({"uv.lock": LOCK, "requirements.txt": "attrs"}, "virtualenv", "requirements.txt", ("attrs",)),
        (
            {"python_env.yaml": "dependencies: [six]", "requirements.txt": "attrs", "pyproject.toml": PYPROJECT},
            "virtualenv",
            "python_env.yaml",
            ("six",),
        ),
        ({"MLproject": "name: x", "requirements.txt": "attrs"}, "virtualenv", "requirements.txt", ("attrs",)),
        (
            {"MLproject": "python_env: my.yaml", "my.yaml": "dependencies: [six]", "requirements.txt": "attrs"},
            "virtualenv",
            "my.yaml",
            ("six",),
        ),
    ],
)
def test_the_first_list_that_the_project_has_is_taken(
    tmp_path: Path, files: dict[str, str], manager: str, source: str | None, dependencies: tuple[str, ...]
) -> None:
    found = plan(tmp_path, files)
    assert found.manager == manager
    assert (found.source.path if found.source else None) == (tmp_path / source if source else None)
    assert packages(found) == tuple(line.format(tmp_path) for line in dependencies)


def test_the_python_is_the_one_that_pyproject_requires(tmp_path: Path) -> None:
    assert plan(tmp_path, {"pyproject.toml": PYPROJECT}).python == ">=3.9,<3.99"
    assert plan(tmp_path, {"uv.lock": LOCK}).python == ">=3.10"


def test_a_lock_file_without_uv_leaves_the_dependencies_of_pyproject(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = plan(tmp_path, {"uv.lock": LOCK, "pyproject.toml": PYPROJECT}, "virtualenv")
    assert packages(found)[0] == "six>=1"
    assert f"the project names no environment: {tmp_path}/pyproject.toml lists what it needs" in caplog.text


def test_docker_projects_and_spark_jobs_have_no_environment_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("six")
    for text in ("docker_env: {image: x}", "databricks_spark_job: {python_file: x.py}"):
        (tmp_path / "MLproject").write_text(text)
        assert read_project(tmp_path).environment is None


def test_a_changed_list_is_another_environment(tmp_path: Path) -> None:
    keys = {plan(tmp_path, {"requirements.txt": text}).key for text in ("six", "attrs")}
    keys |= {plan(tmp_path, {"pyproject.toml": text}).key for text in (PYPROJECT, PYPROJECT.replace("six", "wheel"))}
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[project", "pyproject.toml: not TOML"),
        ("[project]\ndependencies = 'six'", "line 2: project.dependencies must be a list of requirements"),
        ("[project]\ndependencies = ['six', 3]", "line 2: project.dependencies must be a list of requirements"),
        ("[project]\ndependencies = ['six ==']", "line 2: project.dependencies must be a list of requirements"),
        (
            "[project]\nrequires-python = 'three'",
            "line 2: project.requires-python must be conditions .*: Invalid specifier: 'three'",
        ),
    ],
)
def test_a_mistake_in_pyproject_is_an_error_of_the_project(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        plan(tmp_path, {"pyproject.toml": text})


def test_a_mistake_in_requirements_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"requirements\.txt, line 2: this is not a requirement, as pip takes it"):
        plan(tmp_path, {"requirements.txt": "six\nnot a requirement\n"})
