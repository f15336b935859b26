"""The virtualenv manager, with real interpreters, virtualenv, venv and pip."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from anyio import to_thread

from components import missing
from components.packages import Package, make_package
from mlfleet._environments.interpreters import Interpreter, find, installed
from mlfleet._environments.manager import PreparedEnvironment, create_manager
from mlfleet._environments.store import list_environments
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind, read_project
from mlfleet.errors import EnvironmentSetupError

pytestmark = pytest.mark.timeout(120)  # real builds on a busy machine

ASK = "import sys, tinypkg; print(sys.prefix, '%d.%d' % sys.version_info[:2], tinypkg.VALUE)"


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return make_package(tmp_path / "project" / "package", value="forty-two")


def write_env(package: Package, text: str) -> tuple[Path, EnvironmentFile]:
    project = package.folder.parent
    (project / "python_env.yaml").write_text(text)
    return project, EnvironmentFile(EnvironmentFileKind.PYTHON_ENV, project / "python_env.yaml")


async def prepare(name: str, project: Path, source: EnvironmentFile | None) -> PreparedEnvironment:
    chosen = create_manager(name)
    return await chosen.prepare(await to_thread.run_sync(chosen.plan, project, source))


def run(environment: PreparedEnvironment, *argv: str) -> str:
    """Run a command in an environment as a backend does, and return its output."""
    environ = environment.apply(os.environ)
    return subprocess.run(argv, env=environ, check=True, capture_output=True, text=True).stdout.strip()


def short(version: str) -> str:
    return ".".join(version.split(".")[:2])


async def other_python() -> Interpreter:
    """An interpreter that is not the current one's version, and new enough for virtualenv and pip."""
    current = short(platform.python_version())
    others = [each for each in await installed() if short(each) != current and int(each.split(".")[1]) >= 9]
    found = await find(others[0]) if others else _pypy()
    return found or missing("a second Python", "apt-get install pypy3, or install one with pyenv")


def _pypy() -> Interpreter | None:
    """PyPy, the second Python that Debian has, which implements another version."""
    program = shutil.which("pypy3")
    if program is None:
        return None
    argv = [program, "-c", "import platform; print(platform.python_version())"]
    version = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    return Interpreter(Path(program), version)


async def test_the_command_gets_the_python_and_the_packages(package: Package) -> None:
    environment = await prepare("virtualenv", *write_env(package, "dependencies: [./package]\n"))
    version = short(platform.python_version())
    assert run(environment, "python", "-c", ASK) == f"{environment.root} {version} forty-two"
    assert environment.apply({"PYTHONHOME": "/x"})["VIRTUAL_ENV"] == str(environment.root)
    assert "PYTHONHOME" not in environment.apply({"PYTHONHOME": "/x"})
    (stored,) = await to_thread.run_sync(list_environments)
    assert stored.complete
    assert stored.uri == str(package.folder.parent / "python_env.yaml")
    assert stored.version == sys.version.split()[0]
    # A project's own tree is not written to, but by its own build.
    assert not [path for path in package.folder.parent.iterdir() if path.name not in ("package", "python_env.yaml")]


async def test_a_project_that_lists_nothing_gets_a_plain_python(tmp_path: Path) -> None:
    environment = await prepare("virtualenv", tmp_path, None)
    assert run(environment, "python", "-c", "import sys; print(sys.prefix)") == str(environment.root)


async def test_another_version_of_python(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    other = await other_python()
    wanted = short(other.version)
    # It is found where pyenv keeps it, although PATH has only what pyenv's shims do for a version that is not active.
    shims, versions = package.folder.parent / "shims", package.folder.parent / "pyenv" / "versions"
    shims.mkdir()
    for name in (f"python{wanted}", "python3"):
        (shims / name).write_text("#!/bin/sh\necho pyenv: command not found >&2\nexit 127\n")
        (shims / name).chmod(0o755)
    (versions / other.version / "bin").mkdir(parents=True)
    (versions / other.version / "bin" / "python").symlink_to(other.path)
    monkeypatch.setenv("PYENV_ROOT", str(versions.parent))
    monkeypatch.setenv("PATH", f"{shims}:/usr/bin:/bin")
    source = write_env(package, f"python: {wanted}\ndependencies: [./package]\n")
    environment = await prepare("virtualenv", *source)
    assert run(environment, "python", "-c", ASK) == f"{environment.root} {wanted} forty-two"


async def test_venv_is_used_when_virtualenv_does_not_work(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    package_lines = "dependencies: [./package]\n"
    # What an installation of virtualenv does that is too new for the interpreter.
    broken = package.folder.parent / "broken"
    (broken / "virtualenv").mkdir(parents=True)
    (broken / "virtualenv" / "__init__.py").touch()
    (broken / "virtualenv" / "__main__.py").write_text("raise SystemExit('no support for this Python')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(broken), os.environ.get("PYTHONPATH")))))
    environment = await prepare("virtualenv", *write_env(package, package_lines))
    monkeypatch.delenv("PYTHONPATH")
    assert run(environment, "python", "-c", ASK).endswith("forty-two")


async def test_a_python_that_is_not_there(package: Package) -> None:
    with pytest.raises(EnvironmentSetupError) as caught:
        await prepare("virtualenv", *write_env(package, "python: 3.99\n"))
    text = str(caught.value)
    assert "python_env.yaml cannot be built: there is no Python 3.99 here, only " in text
    assert sys.version.split()[0] in text
    assert "uv (`pip install uv`) and pyenv (`pyenv install 3.99`) can fetch a Python" in text


async def test_a_package_that_is_not_there(package: Package) -> None:
    source = write_env(package, "dependencies:\n- --no-index\n- no-such-package-anywhere==1.0\n")
    with pytest.raises(EnvironmentSetupError) as caught:
        await prepare("virtualenv", *source)
    text = str(caught.value)
    assert "pip install" in text
    assert "ended with exit code 1" in text
    assert "No matching distribution found for no-such-package-anywhere==1.0" in text
    assert "(check the package's name and version" in text
    assert caught.value.manager == "virtualenv"
    assert any("no-such-package-anywhere" in line for line in caught.value.output)
    assert not await to_thread.run_sync(list_environments)


async def test_index_passwords_are_masked(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("INDEX_PASSWORD", "from-the-environment")
    source = write_env(
        package,
        "dependencies:\n- --index-url http://user:in-the-file@127.0.0.1:9/simple\n"
        "- --extra-index-url http://127.0.0.1:9/${INDEX_PASSWORD}/simple\n- no-such-package-anywhere\n",
    )
    lines: list[str] = []
    chosen = create_manager("virtualenv")
    plan = await to_thread.run_sync(chosen.plan, *source)
    with pytest.raises(EnvironmentSetupError) as caught:
        await chosen.prepare(plan, on_progress=lines.append)
    seen = "\n".join((str(caught.value), *caught.value.output, *lines, repr(plan)))
    assert "127.0.0.1:9" in seen
    assert "in-the-file" not in seen
    assert "from-the-environment" not in seen


async def test_python_variables_of_the_caller_do_not_reach_the_build(
    package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A package of that name on PYTHONPATH must not pass for an installed one, nor may pip install it elsewhere.
    fake = tmp_path / "fake"
    (fake / "tinypkg-1.0.dist-info").mkdir(parents=True)
    (fake / "tinypkg-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tinypkg\nVersion: 1.0\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(fake), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PIP_USER", "1")
    # And the project's files are not taken for modules of the tools.
    (package.folder.parent / "types.py").write_text("raise SystemExit('this is no module of pip')\n")
    environment = await prepare("virtualenv", *write_env(package, "dependencies: [./package]\n"))
    monkeypatch.delenv("PYTHONPATH")
    assert run(environment, "python", "-c", ASK).endswith("forty-two")
    assert not (tmp_path / "elsewhere").exists()


async def test_the_interpreter_of_an_environment_vanishes(package: Package) -> None:
    source = write_env(package, "dependencies: [./package]\n")
    first = await prepare("virtualenv", *source)
    assert first.root is not None
    again = await prepare("virtualenv", *source)
    assert again == first
    assert package.builds == 1
    for name in ("python", "python3"):
        (first.root / "bin" / name).unlink()
        (first.root / "bin" / name).symlink_to("/no/such/python")
    second = await prepare("virtualenv", *source)
    assert run(second, "python", "-c", ASK).endswith("forty-two")
    assert package.builds == 2


async def test_a_folder_that_cannot_be_written(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    (package.folder / "file").touch()
    monkeypatch.setenv("MLFLOW_ENV_ROOT", str(package.folder / "file"))
    with pytest.raises(EnvironmentSetupError, match=r"cannot be kept in .*Not a directory.*set MLFLOW_ENV_ROOT"):
        await prepare("virtualenv", *write_env(package, "dependencies: []\n"))


async def test_requirements_of_a_project_that_names_no_environment(package: Package) -> None:
    project = package.folder.parent
    (project / "requirements.txt").write_text("# what it needs\n./package\n")
    spec = await to_thread.run_sync(read_project, project)
    environment = await prepare("virtualenv", project, spec.environment)
    assert run(environment, "python", "-c", ASK).endswith("forty-two")
