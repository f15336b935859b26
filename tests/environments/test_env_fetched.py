"""Interpreters that a project asks for and the machine does not have: a real uv fetches them, or pyenv does."""

from __future__ import annotations

import json
import os
import platform
import sys
import tarfile
from pathlib import Path

import pytest
from anyio import to_thread

from components import missing
from mlfleet._environments.manager import PreparedEnvironment, create_manager
from mlfleet._environments.store import list_environments
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet.errors import EnvironmentSetupError

pytestmark = pytest.mark.timeout(120)  # real builds on a busy machine

# What an interpreter does without, so that packing and unpacking it is quick.
_LEFT_OUT = ("test", "idlelib", "tkinter", "site-packages", "__pycache__", "lib2to3", "turtledemo")


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without pyenv, and without programs on PATH but those of the system and of this test."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("XDG_BIN_HOME", str(tmp_path / "home" / ".local" / "bin"))


def project(folder: Path, python: str) -> tuple[Path, EnvironmentFile]:
    folder.mkdir()
    (folder / "python_env.yaml").write_text(f"python: '{python}'\n")
    return folder, EnvironmentFile(EnvironmentFileKind.PYTHON_ENV, folder / "python_env.yaml")


async def prepare(manager: str, folder: Path, source: EnvironmentFile, lines: list[str]) -> PreparedEnvironment:
    chosen = create_manager(manager)
    plan = await to_thread.run_sync(chosen.plan, folder, source)
    return await chosen.prepare(plan, on_progress=lines.append)


def other_python() -> Path:
    """The folder of a complete Python of another minor version than this one's."""
    own = ".".join(platform.python_version_tuple()[:2])
    found = [path for path in Path.home().glob(".pyenv/versions/3.*") if path.name.split(".")[1].isdigit()]
    found = [path for path in found if int(path.name.split(".")[1]) >= 9 and not path.name.startswith(f"{own}.")]
    if not found or platform.system() != "Linux" or platform.machine() != "x86_64":
        missing("a second Python made by pyenv on Linux", "pyenv install 3.12")
    return max(found, key=lambda path: int(path.name.split(".")[1]))


@pytest.fixture
def downloadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The version of a Python that uv can download: an archive, and the list that leads uv to it."""
    pytest.importorskip("uv")
    source = other_python()
    version = source.name
    major, minor, patch = version.split(".")
    archive = tmp_path / "python.tar.gz"

    def is_needed(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = member.name.split("/")
        is_kept = not parts[-1].startswith("config-") and set(_LEFT_OUT).isdisjoint(parts)
        return member if is_kept else None

    with tarfile.open(archive, "w:gz", compresslevel=1) as file:
        for name in (f"bin/python{major}.{minor}", f"lib/python{major}.{minor}"):
            file.add(source / name, f"python/{name}", filter=is_needed)
    entry = {
        "name": "cpython", "arch": {"family": "x86_64", "variant": None}, "os": "linux", "libc": "gnu",
        "major": int(major), "minor": int(minor), "patch": int(patch), "prerelease": "", "url": archive.as_uri(),
        "sha256": None, "variant": None, "build": None,
    }  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps({f"cpython-{version}-linux-x86_64-gnu": entry}))
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS_JSON_URL", str(tmp_path / "list.json"))
    monkeypatch.delenv("UV_OFFLINE")
    return version


@pytest.mark.parametrize("manager", ["virtualenv", "uv"])
async def test_uv_fetches_the_python_that_is_asked_for(tmp_path: Path, downloadable: str, manager: str) -> None:
    lines: list[str] = []
    wanted = downloadable if manager == "virtualenv" else f"=={downloadable.rpartition('.')[0]}.*"
    environment = await prepare(manager, *project(tmp_path / "project", wanted), lines)
    assert any(f"uv python install {wanted}" in line.replace("'", "") for line in lines)
    (stored,) = await to_thread.run_sync(list_environments)
    assert stored.version == downloadable
    assert environment.root is not None
    assert (environment.root / "bin" / "python").resolve().is_relative_to(tmp_path / "uv")
    assert not list(tmp_path.glob("home/.local/bin/*"))


async def test_uv_that_may_not_download_is_not_asked(
    tmp_path: Path, downloadable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    lines: list[str] = []
    with pytest.raises(EnvironmentSetupError, match=f"there is no Python {downloadable} here, only "):
        await prepare("virtualenv", *project(tmp_path / "project", downloadable), lines)
    assert not any("uv python install" in line for line in lines)


# pyenv compiles what it downloads, so this one only says that it has done so: its Python is the one of this test.
PYENV = """\
#!/bin/sh
case "$*" in
  "install --list") printf '  %s\\n' Available versions: 3.98.0 3.99.1 3.99.2 3.99.3rc1 pypy3.99-7.3 4.0.0 ;;
  root) echo "$PYENV_ROOT" ;;
  "install --skip-existing 3.99."[12])
    mkdir -p "$PYENV_ROOT/versions/$3/bin"
    printf '#!/bin/sh\\ncase "$*" in *python_version*) echo %s; echo "$0";; *) exec {python} "$@";; esac\\n' "$3" \
      > "$PYENV_ROOT/versions/$3/bin/python"
    chmod +x "$PYENV_ROOT/versions/$3/bin/python" ;;
  *) echo "pyenv: $*: no such version"; exit 1 ;;
esac
"""


@pytest.mark.parametrize(("wanted", "version"), [("3.99.1", "3.99.1"), ("3.99", "3.99.2"), (">=3.99,<4", "3.99.2")])
async def test_pyenv_installs_the_python_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, version: str
) -> None:
    monkeypatch.setitem(sys.modules, "uv", None)
    program = tmp_path / "bin" / "pyenv"
    program.write_text(PYENV.replace("{python}", os.path.realpath(sys.executable)))
    program.chmod(0o755)
    lines: list[str] = []
    await prepare("virtualenv", *project(tmp_path / "project", wanted), lines)
    assert f"$ {program} install --skip-existing {version}" in lines
    (stored,) = await to_thread.run_sync(list_environments)
    assert stored.version == version
    with pytest.raises(EnvironmentSetupError) as caught:
        await prepare("virtualenv", *project(tmp_path / "other", "3.97.5"), lines)
    assert "there is no Python 3.97.5 here" in str(caught.value)
    assert "pyenv: install --skip-existing 3.97.5: no such version" in str(caught.value)


async def test_without_uv_and_pyenv_the_error_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uv", None)
    with pytest.raises(EnvironmentSetupError) as caught:
        await prepare("virtualenv", *project(tmp_path / "project", "3.97.5"), [])
    assert "there is no Python 3.97.5 here, only " in str(caught.value)
    assert "uv (`pip install uv`) and pyenv (`pyenv install 3.97.5`) can fetch a Python" in str(caught.value)
