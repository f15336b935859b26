"""Finding backends, with plugins installed for real: each test asks a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlfleet.backends.base import Backend
from mlfleet.backends.local.backend import LocalBackend
from mlfleet.backends.registry import available, find
from mlfleet.errors import BackendNotFound

PLUGIN = """
from mlfleet.backends.base import Backend

class Pbs(Backend):
    name = "pbs"
    async def submit(self, job):
        raise NotImplementedError

not_a_backend = object()
"""


def install(folder: Path, **targets: str) -> None:
    """Put a distribution into `folder` that announces these backends."""
    info = folder / "mlfleet_pbs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlfleet-pbs\nVersion: 1.0\n")
    entries = "\n".join(f"{name} = {target}" for name, target in targets.items())
    (info / "entry_points.txt").write_text(f"[mlfleet.backends]\n{entries}\n")


def ask(folder: Path, code: str) -> str:
    program = "from mlfleet.backends.registry import available, find\n" + code
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, env={"PYTHONPATH": path}
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_local() -> None:
    assert find("local") is LocalBackend
    assert "local" in available()
    assert issubclass(find("local"), Backend)


def test_an_unknown_name_is_an_error_that_names_the_nearest_and_the_installed() -> None:
    with pytest.raises(BackendNotFound) as caught:
        find("Locl")
    assert str(caught.value).startswith("there is no backend 'Locl'. Did you mean 'local'? Installed are: ")
    assert caught.value.backend == "Locl"


def test_plugin(tmp_path: Path) -> None:
    (tmp_path / "mlfleet_pbs.py").write_text(PLUGIN)
    install(tmp_path, pbs="mlfleet_pbs:Pbs")
    assert ask(tmp_path, "print(find('pbs').name, 'pbs' in available())") == "pbs True"


def test_plugin_cannot_take_the_name_of_a_built_in_backend(tmp_path: Path) -> None:
    (tmp_path / "mlfleet_pbs.py").write_text(PLUGIN)
    install(tmp_path, local="mlfleet_pbs:Pbs")
    assert ask(tmp_path, "print(find('local').__module__)") == "mlfleet.backends.local.backend"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mlfleet_pbs:Pbss", "announced as 'mlfleet_pbs:Pbss': module 'mlfleet_pbs' has no attribute 'Pbss'"),
        (
            "mlfleet_pbs:not_a_backend",
            "announced as 'mlfleet_pbs:not_a_backend', which is not a subclass of Backend",
        ),
        ("mlfleet_gone:Pbs", "cannot be loaded: No module named 'mlfleet_gone'"),
    ],
)
def test_broken_plugin(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "mlfleet_pbs.py").write_text(PLUGIN)
    install(tmp_path, pbs=target)
    answer = ask(tmp_path, "find('pbs')")
    assert answer.startswith("mlfleet.errors.BackendNotFound: the backend 'pbs' ")
    assert message in answer


def test_missing_extra_says_what_to_install(tmp_path: Path) -> None:
    # A built-in backend on an interpreter without its library.
    (tmp_path / "docker.py").write_text("import a_library_that_is_not_installed\n")
    answer = ask(tmp_path, f"import mlfleet.backends as b; b.__path__.insert(0, {str(tmp_path)!r}); find('docker')")
    assert "pip install 'mlfleet[docker]'" in answer
    assert "No module named 'a_library_that_is_not_installed'" in answer
