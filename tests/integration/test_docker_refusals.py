"""What a real engine says only in a bad hour, said by a server that speaks its protocol on a Unix socket."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from components.projects import write_project
from mlfleet import Fleet, RunStatus
from mlfleet.testing import FakeTracking

FULL = "write /var/lib/docker/tmp/x: no space left on device"


@pytest.fixture
async def full_engine(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """An engine whose disk is full: it knows the image ``here``, and can make no container and pull nothing."""

    async def version(request: web.Request) -> web.Response:
        return web.json_response({"ApiVersion": "1.41"})

    async def image(request: web.Request) -> web.Response:
        if request.match_info["name"] == "here":
            return web.json_response({"Id": "sha256:0", "Config": {}})
        return web.json_response({"message": "No such image"}, status=404)

    async def pull(request: web.Request) -> web.Response:
        lines = [{"status": "Pulling"}, {"errorDetail": {"message": FULL}, "error": "x"}]
        return web.Response(text="".join(json.dumps(line) + "\r\n" for line in lines))

    async def create(request: web.Request) -> web.Response:
        return web.json_response({"message": FULL}, status=500)

    application = web.Application()
    application.router.add_get("/version", version)
    application.router.add_get("/v1.41/images/{name:.+}/json", image)
    application.router.add_post("/v1.41/images/create", pull)
    application.router.add_post("/v1.41/containers/create", create)
    runner = web.AppRunner(application)
    await runner.setup()
    folder = tempfile.mkdtemp(dir="/tmp")  # pytest's folders are too long for a socket
    await web.UnixSite(runner, f"{folder}/engine.sock").start()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{folder}/engine.sock")
    yield
    await runner.cleanup()
    shutil.rmtree(folder)


@pytest.mark.usefixtures("full_engine")
@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("here", "the engine does not run the container of the image here"),
        ("elsewhere", "the image 'elsewhere' is not on the engine and cannot be pulled"),
    ],
)
async def test_a_full_disk_is_told(tmp_path: Path, image: str, text: str) -> None:
    uri = write_project(tmp_path / "demo", "true", extra=f"docker_env: {{image: {image}}}\n")
    async with Fleet(tracking=FakeTracking()) as fleet:
        outcome = await (await fleet.submit(uri)).outcome()
    assert outcome.status is RunStatus.FAILED
    assert outcome.reason == f"{text}: {FULL} (the engine's disk is full: 'docker system df' tells of what)"
