"""The uv manager, with the real uv."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from anyio import to_thread

from components import missing
from components.packages import Package, make_package
from mlfleet._environments.interpreters import installed
from mlfleet._environments.manager import EnvironmentPlan, PreparedEnvironment, choose_manager, create_manager
from mlfleet._environments.store import list_environments
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind, read_project
from mlfleet.errors import EnvironmentSetupError, SpecError

pytestmark = pytest.mark.timeout(120)  # real builds on a busy machine

ASK = "import sys, tinypkg; print(sys.prefix, tinypkg.VALUE)"
LOCKED = """
[project]
name = "locked"
version = "0"
requires-python = ">=3.9"
dependencies = ["tinypkg"]

[tool.uv.sources]
tinypkg = { path = "package" }
"""


@pytest.fixture(autouse=True)
def uv_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    try:
        import uv
    except ImportError:
        found = shutil.which("uv")
        return found or missing("uv", "pip install uv")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    monkeypatch.setenv("UV_OFFLINE", "1")
    return str(uv.find_uv_bin())


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return make_package(tmp_path / "project" / "package", value="forty-two")


async def plan(project: Path, source: EnvironmentFile | None) -> EnvironmentPlan:
    return await to_thread.run_sync(create_manager("uv").plan, project, source)


async def prepare(project: Path, source: EnvironmentFile | None = None) -> PreparedEnvironment:
    return await create_manager("uv").prepare(await plan(project, source))


def write_env(package: Package, text: str) -> tuple[Path, EnvironmentFile]:
    project = package.folder.parent
    (project / "python_env.yaml").write_text(text)
    return project, EnvironmentFile(EnvironmentFileKind.PYTHON_ENV, project / "python_env.yaml")


def run(environment: PreparedEnvironment, *argv: str) -> str:
    environ = environment.apply(os.environ)
    return subprocess.run(argv, env=environ, check=True, capture_output=True, text=True).stdout.strip()


async def test_the_command_gets_the_packages(package: Package) -> None:
    environment = await prepare(*write_env(package, "dependencies: [./package]\n"))
    assert run(environment, "python", "-c", ASK) == f"{environment.root} forty-two"
    (stored,) = await to_thread.run_sync(list_environments)
    assert (stored.kind, stored.version) == ("uv", sys.version.split()[0])


async def test_a_conda_file_under_uv(package: Package) -> None:
    project = package.folder.parent
    (project / "conda.yaml").write_text("dependencies: [numpy=1.26, {pip: [./package]}]\n")
    environment = await prepare(project, EnvironmentFile(EnvironmentFileKind.CONDA, project / "conda.yaml"))
    assert run(environment, "python", "-c", ASK).endswith("forty-two")


async def test_another_version_that_only_shims_on_path_seem_to_have(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    shims = package.folder.parent / "shims"
    shims.mkdir()
    (shims / "python3.99").write_text("#!/bin/sh\necho pyenv: command not found >&2\nexit 127\n")
    (shims / "python3.99").chmod(0o755)
    monkeypatch.setenv("PATH", f"{shims}:{os.environ['PATH']}")
    with pytest.raises(EnvironmentSetupError) as caught:
        await prepare(*write_env(package, "python: '3.99'\n"))
    text = str(caught.value)
    assert "the uv environment of " in text
    assert "3.99" in text
    assert "there is no Python 3.99 here, only " in text
    assert (await installed())[0] in text
    assert "127" not in text
    assert not await to_thread.run_sync(list_environments)


async def test_a_package_that_is_not_there(package: Package) -> None:
    with pytest.raises(EnvironmentSetupError) as caught:
        await prepare(*write_env(package, "dependencies: [--no-index, no-such-package-anywhere]\n"))
    assert "uv pip install" in str(caught.value)
    assert "no-such-package-anywhere" in "\n".join(caught.value.output)
    assert "(check the package's name and version" in str(caught.value)


async def test_index_passwords_are_masked(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV_OFFLINE")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_INDEX_URL", "http://user:in-the-environment@127.0.0.1:9/simple")
    source = write_env(
        package, "dependencies: [--extra-index-url http://user:in-the-file@127.0.0.1:9/more, no-such-package]\n"
    )
    with pytest.raises(EnvironmentSetupError) as caught:
        await prepare(*source)
    seen = "\n".join((str(caught.value), *caught.value.output, repr(await plan(*source))))
    assert "127.0.0.1:9" in seen
    assert "in-the-file" not in seen
    assert "in-the-environment" not in seen


@pytest.fixture
def locked(package: Package, uv_program: str) -> Package:
    project = package.folder.parent
    (project / "pyproject.toml").write_text(LOCKED)
    argv = [uv_program, "lock", "--quiet", "--python", sys.executable]
    subprocess.run(argv, cwd=project, check=True)
    return package


async def test_a_lock_file_determines_the_packages(locked: Package) -> None:
    project = locked.folder.parent
    before = sorted(project.iterdir())
    environment = await prepare(project)
    assert run(environment, "python", "-c", ASK) == f"{environment.root} forty-two"
    assert sorted(project.iterdir()) == before  # no .venv in the user's tree
    assert await prepare(project) == environment
    # The same without an environment manager: the lock file is the only list.
    lines: list[str] = []
    spec = await to_thread.run_sync(read_project, project)
    chosen = create_manager(choose_manager(None, spec.environment))
    again = await to_thread.run_sync(chosen.plan, project, spec.environment)
    assert await chosen.prepare(again, on_progress=lines.append) == environment
    assert lines == [f"the environment is made of {project}/uv.lock"]


async def test_local_packages_of_a_lock_file_change_the_key(locked: Package) -> None:
    project = locked.folder.parent
    before = (await plan(project, None)).key
    (project / "train.py").write_text("pass")
    assert (await plan(project, None)).key == before
    locked.set_value("changed")
    assert (await plan(project, None)).key != before


async def test_a_lock_file_that_is_wrong(locked: Package, caplog: pytest.LogCaptureFixture) -> None:
    source = write_env(locked, "dependencies: [six]\n")
    await plan(*source)
    assert "python_env.yaml: only its Python counts, since the project has a uv.lock" in caplog.text
    project = locked.folder.parent
    (project / "uv.lock").write_text("version = \n")
    with pytest.raises(SpecError, match=r"uv.lock: not TOML: Invalid value \(at line 1, column 11\)"):
        await plan(project, None)
    (project / "pyproject.toml").unlink()
    with pytest.raises(SpecError, match=r"uv.lock: there is no pyproject.toml beside it"):
        await plan(project, None)
