"""What every test gets: a home of its own, no settings of the person who runs it, and no blocking of the event loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

pytest_plugins: list[str] = [
    "components.browser",
    "components.certificates",
    "components.conda",
    "components.docker",
    "components.fake_kubernetes",
    "components.gcs",
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


# Names in files of tests, and what those need that a machine has one of.
_ONE_OF_A_MACHINE = {"databricks": "minilake", "object_stores": "minilake", "docker": "a Docker engine"}


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """A call of mlfleet that blocks the event loop fails the test."""
    with blockbuster_ctx("mlfleet") as checks:
        for function in checks.functions.values():
            # Runs the coroutines of kubernetes-asyncio, which block in between, on a loop of its own in a thread.
            function.can_block_in("mlfleet/backends/kubernetes/login.py", "_load")
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """With ``-n``, a file's tests stay together: they share servers. So do all that need what a machine has one of."""
    from xdist.scheduler import LoadScopeScheduling

    class ByComponent(LoadScopeScheduling):  # type: ignore[misc] # untyped
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((what for name, what in _ONE_OF_A_MACHINE.items() if name in file), file)

    return ByComponent(config, log)
