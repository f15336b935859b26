"""mlflow of two versions and mlfleet, each in a process that runs what it is told to, on one tracking server."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from components import missing
from components.docker import DockerEngine
from components.git_http import serve as serve_git
from components.http_files import serve_files
from components.mlflow_server import MlflowServer
from parity import sides
from parity.case import Case
from parity.cases import CASES
from parity.places import Ground, TrackingServer
from parity.sides import Side


@pytest.fixture(scope="module")
def ground(
    tmp_path_factory: pytest.TempPathFactory, mlflow_server: MlflowServer, plugin_folder: Path
) -> Iterator[Ground]:
    """The services that all cases share."""
    root = tmp_path_factory.mktemp("parity")
    (root / "home").mkdir()
    sides.make_tools(root / "tools")
    with serve_git(root) as git, serve_files() as files:
        yield Ground(
            tracking=TrackingServer(mlflow_server.url),
            root=root,
            tools=root / "tools",
            home=root / "home",
            git=git,
            files=files,
            plugins=plugin_folder,
            unique=uuid.uuid4().hex[:8],
            words={"@path": sides.bare_path(root / "tools")},
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Path]]]:
    """The Pythons of the environments with mlflow. They are made while the tracking server starts."""
    folder = tmp_path_factory.mktemp("environments")
    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(sides.install, name, folder / name) for name in sides.REFERENCES}


@pytest.fixture(scope="module")
def all_sides(installed: dict[str, Future[Path]], ground: Ground) -> Iterator[dict[str, Side]]:
    """``mlfleet``, and mlflow by its version, as in ``sides.REFERENCES``."""
    with ExitStack() as stack:
        pythons = {"mlfleet": Path(sys.executable), **{name: python.result() for name, python in installed.items()}}
        yield {
            name: stack.enter_context(sides.start(name, python, ground, ground.root / name))
            for name, python in pythons.items()
        }


@pytest.fixture(scope="module")
def docker_image(ground: Ground, docker_engine: DockerEngine, shell_image: str) -> Iterator[str]:
    """An image with a shell; what is built on it is removed with it."""
    if shutil.which("docker") is None:
        missing("the docker command", "mlflow calls it: apt-get install docker.io (or docker-cli)")
    ground.words["@image"] = shell_image
    yield shell_image
    for name in sides.REFERENCES:
        docker_engine.remove_image(f"parity-{ground.unique}-{name}:latest")


@pytest.fixture
def asked(case: Case, all_sides: dict[str, Side], request: pytest.FixtureRequest) -> dict[str, Side]:
    """All sides, while they run the selected cases."""
    if case.docker:
        request.getfixturevalue("docker_image")
    selected = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    ask(all_sides, [each for each in selected if isinstance(each, Case) and each.docker <= case.docker])
    return all_sides


@pytest.fixture
def asked_all(all_sides: dict[str, Side], docker_image: str) -> dict[str, Side]:
    """All sides, while they run all cases."""
    ask(all_sides, CASES)
    return all_sides


def ask(all_sides: dict[str, Side], cases: list[Case]) -> None:
    for case in cases:
        for side in all_sides.values():
            side.ask(case)
