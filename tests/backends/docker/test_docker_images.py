"""Images: built once for the same content, pulled once, from registries that ask for a password."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import anyio
import pytest

from components.docker import DockerEngine, shell_files, tar
from components.projects import write_project
from components.registry import Registry
from mlfleet import Fleet, RunEvent, Stage
from mlfleet.testing import FakeTracking

pytestmark = pytest.mark.timeout(120)  # builds, pushes and pulls of images on a busy machine


@pytest.fixture
def events() -> list[RunEvent]:
    return []


@pytest.fixture
async def fleet(events: list[RunEvent]) -> AsyncIterator[Fleet]:
    async with Fleet(tracking=FakeTracking(), max_concurrent=16, on_event=events.append) as fleet:
        yield fleet


def docker_project(folder: Path, image: str, command: str) -> str:
    return write_project(folder, command, extra=f"docker_env: {{image: '{image}'}}\n")


async def lines(fleet: Fleet, uri: str, **options: object) -> list[str]:
    run = await fleet.submit(uri, **options)  # type: ignore[arg-type]
    await run.check()
    return [line async for line in run.logs()]


async def built_image(fleet: Fleet, uri: str) -> str:
    run = await fleet.submit(uri, build_image=True)
    await run.check()
    assert isinstance(fleet.tracking, FakeTracking)
    return fleet.tracking.runs[run.run_id].tags["mlflow.docker.image.uri"]


async def test_the_project_is_built_into_the_image_with_modes_and_links(
    fleet: Fleet, shell_image: str, tmp_path: Path
) -> None:
    uri = docker_project(tmp_path / "demo", shell_image, "pwd; ./run.sh; readlink link; [ ! -e secret.txt ]; echo $?")
    (tmp_path / "demo" / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "demo" / "run.sh").chmod(0o755)
    (tmp_path / "demo" / "link").symlink_to("run.sh")
    (tmp_path / "demo" / "secret.txt").write_text("not for others")
    (tmp_path / "demo" / ".dockerignore").write_text("secret.txt\n")
    assert await lines(fleet, uri, build_image=True) == ["/mlflow/projects/code", "ran", "run.sh", "0"]


async def test_one_build_for_many_runs_and_another_for_other_content(
    fleet: Fleet, events: list[RunEvent], docker_engine: DockerEngine, shell_image: str, tmp_path: Path
) -> None:
    uri = docker_project(tmp_path / "Demo Project", shell_image, "cat data.txt")
    data = tmp_path / "Demo Project" / "data.txt"
    data.write_text("one")
    images = await asyncio.gather(*(built_image(fleet, uri) for _ in range(8)))
    assert len(set(images)) == 1
    assert images[0].startswith("demo-project:")
    data.write_text("two")
    changed = await built_image(fleet, uri)
    assert changed != images[0]
    data.write_text("one")
    assert await built_image(fleet, uri) == images[0]
    builds = [event.stage for event in events if event.detail.startswith("building")]
    assert builds == [Stage.STARTING] * 2
    for name in (images[0], changed):
        assert await anyio.to_thread.run_sync(docker_engine.has_image, name)
        await anyio.to_thread.run_sync(docker_engine.remove_image, name)


async def test_an_image_is_pulled_once_for_many_runs(
    fleet: Fleet,
    events: list[RunEvent],
    docker_engine: DockerEngine,
    registry: Registry,
    tmp_path: Path,
) -> None:
    def push() -> str:
        # Of its own: of an image whose layers are here already, the engine tells nothing.
        name, mark = f"mlfleet-test/pulled:{uuid.uuid4().hex[:8]}", tmp_path / "mark"
        mark.write_text(name)
        docker_engine.import_image(name, tar([*shell_files(), ("mark", mark)]), "ENV PATH=/usr/bin:/bin")
        pushed = registry.push(docker_engine, name, "team/open:1")
        docker_engine.remove_image(name)
        return pushed

    image = await anyio.to_thread.run_sync(push)
    uri = docker_project(tmp_path / "demo", image, "echo hello")
    assert await asyncio.gather(*(lines(fleet, uri) for _ in range(8))) == [["hello"]] * 8
    pulls = [event.detail for event in events if event.detail.startswith(f"pulling the image {image}")]
    assert pulls.count(f"pulling the image {image}") == 1
    assert pulls[-1] == f"pulling the image {image}: 1 of 1 layers"
    await anyio.to_thread.run_sync(docker_engine.remove_image, image)


async def reason(fleet: Fleet, uri: str, **options: object) -> str:
    run = await fleet.submit(uri, **options)  # type: ignore[arg-type]
    return str((await run.outcome()).reason)


@pytest.fixture
async def private_image(
    docker_engine: DockerEngine, registry_with_password: Registry, shell_image: str
) -> AsyncIterator[str]:
    push = partial(registry_with_password.push, docker_engine, shell_image, "team/private:1")
    image = await anyio.to_thread.run_sync(push)
    yield image
    await anyio.to_thread.run_sync(docker_engine.remove_image, image)


async def test_a_private_image_needs_credentials(
    fleet: Fleet, private_image: str, registry_with_password: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = registry_with_password.host
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "nothing"))
    uri = docker_project(tmp_path / "demo", private_image, "echo hello")
    text = await reason(fleet, uri)
    assert f"{private_image!r} is not on the engine and cannot be pulled" in text
    assert f"'docker login {host}', or give docker_auth" in text
    wrong = {"username": "someone", "password": "wrong-password", "registry": host}
    text = await reason(fleet, uri, docker_auth=wrong)
    assert "does not take the credentials that it was shown" in text
    assert "wrong-password" not in text
    # Without a registry they are for Docker Hub, and are shown to nobody else.
    right = {"username": registry_with_password.username, "password": registry_with_password.password}
    assert "'docker login" in await reason(fleet, uri, docker_auth=right)
    assert await lines(fleet, uri, docker_auth={**right, "registry": host}) == ["hello"]


async def test_credentials_stored_by_docker_login_are_used(
    fleet: Fleet, private_image: str, registry_with_password: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_with_password
    stored = base64.b64encode(f"{registry.username}:{registry.password}".encode()).decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": stored}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert await lines(fleet, docker_project(tmp_path / "demo", private_image, "echo hello")) == ["hello"]


async def test_a_credential_helper_is_asked(
    fleet: Fleet, private_image: str, registry_with_password: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_with_password
    answer = json.dumps({"ServerURL": registry.host, "Username": registry.username, "Secret": registry.password})
    helper = tmp_path / "docker-credential-tests"
    helper.write_text(f'#!/bin/sh\n[ "$1" = get ] && [ "$(cat)" = {registry.host} ] && echo \'{answer}\'\n')
    helper.chmod(0o755)
    (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {registry.host: "tests"}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    uri = docker_project(tmp_path / "demo", private_image, "echo hello")
    assert "docker-credential-tests, which is not on PATH" in await reason(fleet, uri)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert await lines(fleet, uri) == ["hello"]


async def test_pull_never_and_unknown_tags(
    fleet: Fleet, docker_engine: DockerEngine, registry: Registry, shell_image: str, tmp_path: Path
) -> None:
    await anyio.to_thread.run_sync(registry.push, docker_engine, shell_image, "team/open:1")
    uri = docker_project(tmp_path / "demo", f"{registry.host}/team/open:2", "true")
    assert "docker_args has pull=never" in await reason(fleet, uri, docker_args={"pull": "never"})
    assert "(check its name and tag)" in await reason(fleet, uri)
