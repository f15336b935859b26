"""An empty sqlite store of mlflow, whose tables are created once for all tests, since that takes seconds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from components import missing

__all__ = ["new_store"]

_MAKE_TABLES = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1]).get_experiment('0')"


@pytest.fixture(scope="session")
def _empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    made = subprocess.run(
        [sys.executable, "-c", _MAKE_TABLES, f"sqlite:///{database}"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        missing("mlflow with sqlalchemy and alembic", f"pip install 'mlfleet[mlflow]'\n{made.stderr[-500:]}")
    return database


@pytest.fixture
def new_store(_empty_store: Path) -> Callable[[Path], str]:
    """A function that creates a store at the given path and returns its URI."""

    def make(database: Path) -> str:
        shutil.copyfile(_empty_store, database)
        return f"sqlite:///{database}"

    return make
