"""What every test gets: a home of its own, no settings of the person who runs it, and no blocking of the event loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

pytest_plugins: list[str] = [
    "components.browser",
    "components.conda",
    "components.docker",
    "components.fake_kubernetes",
    "components.git_http",
    "components.http_files",
    "components.minilake",
    "components.mlflow_server",
    "components.mlflow_store",
    "components.nginx",
    "components.own_engine",
    "components.plugins",
    "components.registry",
    "components.s3",
    "components.ssh_server",
]


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """A call of mlfleet that blocks the event loop fails the test."""
    with blockbuster_ctx("mlfleet") as checks:
        yield checks


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches and state in a temporary folder, and no MLflow or mlfleet settings from outside."""
    home: Path = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "MLFLEET_")) and name != "MLFLEET_REQUIRE_ALL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLEET_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("MLFLEET_STATE_DIR", str(home / "state"))
