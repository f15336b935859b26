"""Disks that are really full: of an engine, and of this machine."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio
import pytest

from components.docker import DockerEngine
from components.own_engine import OwnEngine
from components.projects import write_project
from components.registry import Registry
from mlfleet import Fleet, RunStatus
from mlfleet.backends.docker.client import Engine
from mlfleet.backends.docker.output import OutputCopy
from mlfleet.testing import FakeTracking

pytestmark = pytest.mark.timeout(120)  # an engine starts, and megabytes are pushed and packed, on a busy machine

FULL = "no space left on device"
TODO = "(the engine's disk is full: 'docker system df' tells of what)"


@pytest.fixture
async def small_engine(own_engine: Callable[..., OwnEngine], monkeypatch: pytest.MonkeyPatch) -> OwnEngine:
    engine = await anyio.to_thread.run_sync(partial(own_engine, size="32m"))
    monkeypatch.setenv("DOCKER_HOST", engine.url)
    return engine


async def reason(folder: Path, image: str, **options: bool) -> str:
    uri = write_project(folder, "true", extra=f"docker_env: {{image: '{image}'}}\n")
    async with Fleet(tracking=FakeTracking()) as fleet:
        run = await fleet.submit(uri, docker_args={"network": "none"}, build_image=options.get("build_image", False))
        outcome = await run.outcome()
    assert outcome.status is RunStatus.FAILED
    return str(outcome.reason)


def push_large_image(engine: DockerEngine, registry: Registry) -> str:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        large = tarfile.TarInfo("large")
        large.size = 30 * 2**20
        archive.addfile(large, io.BytesIO(os.urandom(large.size)))
    engine.import_image("mlfleet-test/large:1", buffer.getvalue())
    name = registry.push(engine, "mlfleet-test/large:1", "team/large:1")
    engine.remove_image("mlfleet-test/large:1")
    return name


async def test_a_full_disk_while_pulling(
    small_engine: OwnEngine, docker_engine: DockerEngine, registry: Registry, tmp_path: Path
) -> None:
    image = await anyio.to_thread.run_sync(push_large_image, docker_engine, registry)
    text = await reason(tmp_path / "demo", image)
    assert text.startswith(f"the image {image!r} is not on the engine and cannot be pulled: ")
    assert FULL in text
    assert text.endswith(TODO)


async def test_a_full_disk_while_building(small_engine: OwnEngine, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "large").write_bytes(os.urandom(30 * 2**20))
    text = await reason(tmp_path / "demo", small_engine.image, build_image=True)
    assert text.startswith("the image demo:")
    assert f" cannot be built on {small_engine.image}: " in text
    assert FULL in text
    assert text.endswith(TODO)


async def test_a_full_disk_while_creating_a_container(small_engine: OwnEngine, tmp_path: Path) -> None:
    await anyio.to_thread.run_sync(fill, small_engine.folder / "data")
    text = await reason(tmp_path / "demo", small_engine.image)
    assert text.startswith(f"the engine does not run the container of the image {small_engine.image}: ")
    assert FULL in text
    assert text.endswith(TODO)


def fill(folder: Path) -> None:
    with (folder / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:  # until there is no space left
            file.write(bytes(4096))


async def test_a_full_disk_of_this_machine_costs_lines_of_the_output_and_not_the_run(
    docker_engine: DockerEngine, shell_image: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = await anyio.to_thread.run_sync(
        docker_engine.call, "POST", "/containers/create", {"Image": shell_image, "Cmd": ["echo", "one"]}
    )
    try:
        await anyio.to_thread.run_sync(docker_engine.call, "POST", f"/containers/{made['Id']}/start")
        await anyio.to_thread.run_sync(docker_engine.call, "POST", f"/containers/{made['Id']}/wait")
        async with Engine() as engine:
            copy = OutputCopy(engine, made["Id"], Path("/dev/full"), tty=False)
            await copy.open()
            assert await copy.replay(follow=False)
            assert await copy.replay(follow=False)
        assert copy.copied == 2 * len(b"one\n")
    finally:
        await anyio.to_thread.run_sync(docker_engine.remove, made["Id"])
    (record,) = caplog.records  # one warning, however many lines are lost
    assert "output of a run is lost, /dev/full cannot be written" in record.getMessage()
