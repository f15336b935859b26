"""Choice of the environment manager for a project."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from anyio import to_thread

from mlfleet._environments.manager import choose_manager, create_manager
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet.errors import EnvironmentSetupError, UsageError

PYTHON_ENV = EnvironmentFile(EnvironmentFileKind.PYTHON_ENV, Path("/p/python_env.yaml"))
CONDA = EnvironmentFile(EnvironmentFileKind.CONDA, Path("/p/conda.yaml"))
UV_LOCK = EnvironmentFile(EnvironmentFileKind.UV_LOCK, Path("/p/uv.lock"))
REQUIREMENTS = EnvironmentFile(EnvironmentFileKind.REQUIREMENTS, Path("/p/requirements.txt"))


@pytest.mark.parametrize(
    ("asked", "source", "name"),
    [
        (None, None, "virtualenv"),
        (None, PYTHON_ENV, "virtualenv"),
        (None, CONDA, "conda"),
        (None, UV_LOCK, "uv"),
        ("virtualenv", UV_LOCK, "virtualenv"),
        (None, REQUIREMENTS, "virtualenv"),
        ("uv", CONDA, "uv"),
        ("virtualenv", CONDA, "virtualenv"),
        ("local", CONDA, "local"),
        ("local", None, "local"),
        ("conda", CONDA, "conda"),
    ],
)
def test_the_project_files_choose_the_manager_unless_the_caller_does(
    asked: str | None, source: EnvironmentFile | None, name: str
) -> None:
    assert choose_manager(asked, source) == name


@pytest.mark.parametrize(
    ("asked", "source", "message"),
    [
        (
            "virtalenv",
            None,
            "no environment manager 'virtalenv', did you mean 'virtualenv'?.*local, virtualenv, uv, conda",
        ),
        ("Docker", CONDA, "no environment manager 'Docker' .there are local, virtualenv, uv, conda"),
        (
            "conda",
            PYTHON_ENV,
            "cannot run in a conda environment: .*described by /p/python_env.yaml; use .* virtualenv",
        ),
        ("conda", None, "cannot run in a conda environment: it has no conda.yaml"),
    ],
)
def test_impossible_choices_are_refused(asked: str, source: EnvironmentFile | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_manager(asked, source)


def test_uv_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "uv", None)
    with pytest.raises(EnvironmentSetupError, match="uv is not installed: `pip install uv`"):
        create_manager("uv").plan(tmp_path, None)


def test_conda_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conda.yaml").write_text("dependencies: [python]\n")
    source = EnvironmentFile(EnvironmentFileKind.CONDA, tmp_path / "conda.yaml")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CONDA_EXE", "MAMBA_EXE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_CONDA_HOME", str(tmp_path))
    with pytest.raises(EnvironmentSetupError, match=f"MLFLOW_CONDA_HOME is {tmp_path}, but there is no .*/bin/conda"):
        create_manager("conda").plan(tmp_path, source)
    monkeypatch.delenv("MLFLOW_CONDA_HOME")
    monkeypatch.setenv("MLFLOW_CONDA_CREATE_ENV_CMD", "mamba")
    with pytest.raises(EnvironmentSetupError, match="MLFLOW_CONDA_CREATE_ENV_CMD is 'mamba', which is not on PATH"):
        create_manager("conda").plan(tmp_path, source)
    monkeypatch.delenv("MLFLOW_CONDA_CREATE_ENV_CMD")
    monkeypatch.setitem(sys.modules, "rattler", None)
    with pytest.raises(EnvironmentSetupError, match=r"no conda, mamba or micromamba.*pip install 'mlfleet\[conda\]'"):
        create_manager("conda").plan(tmp_path, source)


async def test_local_uses_the_current_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = create_manager("local")
    own = os.path.dirname(sys.executable)
    monkeypatch.setenv("PATH", f"{own}:/usr/bin:/bin")
    prepared = await local.prepare(await to_thread.run_sync(local.plan, tmp_path, None))
    assert prepared.apply({"PATH": "/usr/bin", "X": "1"}) == {"PATH": "/usr/bin", "X": "1"}
    if sys.prefix == sys.base_prefix:
        return
    # The virtual environment was not activated: `python` is its python all the same.
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    prepared = await local.prepare(await to_thread.run_sync(local.plan, tmp_path, None))
    assert prepared.apply({"PATH": "/usr/bin:/bin"})["PATH"] == f"{own}:/usr/bin:/bin"


@pytest.mark.parametrize("name", ["VIRTUAL_ENV", "CONDA_PREFIX"])
async def test_local_leaves_the_path_of_another_activated_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    local = create_manager("local")
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.setenv(name, str(tmp_path / "other"))
    monkeypatch.setenv("PATH", f"{tmp_path}/other/bin:/usr/bin:/bin")
    prepared = await local.prepare(await to_thread.run_sync(local.plan, tmp_path, None))
    assert prepared.path == ()
