"""Images with a project in them, pushed to real registries without Docker, and run by a real Docker engine."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from aiohttp import web

from components.docker import DockerEngine
from components.registry import Registry
from mlfleet._oci.image import ImageError, NewLayer, push_layer
from mlfleet._oci.references import Reference, parse_reference
from mlfleet._oci.registry import Registries, RegistryError
from mlfleet._project.content import content_hash, pack
from mlfleet.errors import UsageError

# Pulling and running containers on a machine that others use, too.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "deep").mkdir(parents=True)
    (folder / "MLproject").write_text("name: pushed\n")
    (folder / "deep" / "run.sh").write_text("#!/bin/sh\necho from the layer\n")
    (folder / "deep" / "run.sh").chmod(0o755)
    (folder / "secret.txt").write_text("not for the image\n")
    (folder / ".dockerignore").write_text("secret.txt\n")
    return folder


@pytest.fixture
async def registries() -> AsyncIterator[Registries]:
    async with Registries() as opened:
        yield opened


FOLDER = "/mlflow/projects/code"


async def layer(project: Path) -> NewLayer:
    async def packed() -> tuple[IO[bytes], str]:
        made = await pack(project, prefix=f"{FOLDER[1:]}/")
        return made.file, made.digest

    return NewLayer(await content_hash(project), packed, FOLDER)


async def push(
    registries: Registries,
    base: str,
    target: str,
    project: Path,
    platform: str = "linux/amd64",
    on_progress: Callable[[str], None] = lambda line: None,
) -> str:
    return await push_layer(
        registries,
        parse_reference(base),
        parse_reference(target),
        await layer(project),
        platform=platform,
        on_progress=on_progress,
    )


def run(engine: DockerEngine, image: str, *command: str, auth: str = "") -> tuple[int, str]:
    """Pull and run an image with the real engine; return the exit code and the output."""
    headers = {"X-Registry-Auth": auth} if auth else {}
    engine.call("POST", f"/images/create?fromImage={image}", headers=headers)
    made = engine.call("POST", "/containers/create", {"Image": image, "Cmd": list(command), "Tty": True})
    try:
        engine.call("POST", f"/containers/{made['Id']}/start")
        code = engine.call("POST", f"/containers/{made['Id']}/wait")["StatusCode"]
        parts = engine.call("GET", f"/containers/{made['Id']}/json")["Config"]["WorkingDir"]
        return int(code), str(parts)
    finally:
        engine.remove(made["Id"])


@pytest.fixture
def base(docker_engine: DockerEngine, shell_image: str, registry: Registry) -> str:
    return registry.push(docker_engine, shell_image, "team/base:1")


async def test_pushed_image_runs_on_the_real_engine(
    docker_engine: DockerEngine, registry: Registry, registries: Registries, base: str, project: Path
) -> None:
    image = await push(registries, base, f"{registry.host}/team/project", project)
    assert image.startswith(f"{registry.host}/team/project:")
    check = 'test "$(./deep/run.sh)" = "from the layer" && test ! -e secret.txt && test -f MLproject'
    code, folder = await asyncio.to_thread(run, docker_engine, image, "sh", "-c", check)
    assert (code, folder) == (0, FOLDER)


async def test_the_same_content_is_pushed_once(
    registry: Registry, registries: Registries, base: str, project: Path
) -> None:
    target = f"{registry.host}/team/same"
    first = await push(registries, base, target, project)
    said: list[str] = []
    again = await push(registries, base, target, project, on_progress=said.append)
    assert (first, said) == (again, [])
    (project / "MLproject").write_text("name: other\n")
    assert await push(registries, base, target, project) != first


async def test_base_image_in_another_registry(
    docker_engine: DockerEngine,
    registry: Registry,
    registry_with_password: Registry,
    base: str,
    project: Path,
) -> None:
    auth = {
        "username": registry_with_password.username,
        "password": registry_with_password.password,
        "registry": registry_with_password.host,
    }
    async with Registries(auth) as registries:
        image = await push(registries, base, f"{registry_with_password.host}/private/project", project)
    header = _header(auth)
    code, _ = await asyncio.to_thread(run, docker_engine, image, "sh", "deep/run.sh", auth=header)
    assert code == 0


def _header(auth: Mapping[str, str]) -> str:
    import base64

    login = {"username": auth["username"], "password": auth["password"], "serveraddress": auth["registry"]}
    return base64.urlsafe_b64encode(json.dumps(login).encode()).decode()


async def test_docker_login_credentials_are_used(
    registry: Registry,
    registry_with_password: Registry,
    base: str,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import base64

    login = f"{registry_with_password.username}:{registry_with_password.password}"
    folder = tmp_path / "docker"
    folder.mkdir()
    stored = {"auths": {registry_with_password.host: {"auth": base64.b64encode(login.encode()).decode()}}}
    (folder / "config.json").write_text(json.dumps(stored))
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    async with Registries() as registries:
        image = await push(registries, base, f"{registry_with_password.host}/private/other", project)
    assert "@sha256:" in image


async def test_missing_login_error_says_what_to_do(
    registries: Registries,
    registry_with_password: Registry,
    base: str,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "nothing"))
    with pytest.raises(RegistryError, match=f"docker login {registry_with_password.host}"):
        await push(registries, base, f"{registry_with_password.host}/private/project", project)


async def test_wrong_password_is_not_in_the_error(registry_with_password: Registry, base: str, project: Path) -> None:
    auth = {"username": "someone", "password": "wrong-and-secret", "registry": registry_with_password.host}
    async with Registries(auth) as registries:
        with pytest.raises(RegistryError, match="does not let us use") as caught:
            await push(registries, base, f"{registry_with_password.host}/private/project", project)
    assert "wrong-and-secret" not in str(caught.value)


async def test_image_index_is_resolved_to_the_platform(
    registry: Registry, registries: Registries, base: str, project: Path
) -> None:
    reference = parse_reference(base)
    data, headers = await registries.read(
        reference, "manifests/1", accept="application/vnd.docker.distribution.manifest.v2+json"
    )
    entry = {
        "mediaType": headers["Content-Type"],
        "digest": headers["Docker-Content-Digest"],
        "size": len(data),
    }
    kind = "application/vnd.oci.image.index.v1+json"
    index: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": kind,
        "manifests": [
            {**entry, "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}},
            {**entry, "platform": {"os": "linux", "architecture": "amd64"}},
        ],
    }
    many = replace(reference, tag="many")
    await registries.put_manifest(many, json.dumps(index).encode(), kind)
    target = f"{registry.host}/team/indexed"
    assert "@sha256:" in await push(registries, str(many), target, project)
    with pytest.raises(ImageError, match="not there for linux/s390x, only for linux/amd64, linux/arm64/v8"):
        await push(registries, str(many), target, project, "linux/s390x")


async def test_missing_base_image_error_says_how_to_fix_it(
    registry: Registry, registries: Registries, project: Path
) -> None:
    with pytest.raises(ImageError, match="is in no registry: push it there"):
        await push(registries, f"{registry.host}/team/none:1", f"{registry.host}/team/x", project)


async def test_unreachable_registry_is_reported(registries: Registries, project: Path) -> None:
    with pytest.raises(RegistryError, match=r"no answer from the registry 127\.0\.0\.1:1"):
        await push(registries, "127.0.0.1:1/team/base", "127.0.0.1:1/team/x", project)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python:3.11", Reference("registry-1.docker.io", "library/python", "3.11")),
        ("team/image", Reference("registry-1.docker.io", "team/image", "latest")),
        ("docker.io/team/image:1", Reference("registry-1.docker.io", "team/image", "1")),
        ("localhost/x", Reference("localhost", "x", "latest")),
        ("host:5000/a/b/c:v1.2", Reference("host:5000", "a/b/c", "v1.2")),
        ("ghcr.io/a/b@sha256:" + "0" * 64, Reference("ghcr.io", "a/b", "sha256:" + "0" * 64)),
        ("ghcr.io/a/b:tag@sha256:" + "0" * 64, Reference("ghcr.io", "a/b", "sha256:" + "0" * 64)),
    ],
)
def test_valid_image_names_are_parsed(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize("text", ["", "Upper/case", "host:5000/", "a b", "x:-tag", "../x"])
def test_invalid_image_names_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not the name of an image"):
        parse_reference(text)


async def test_bearer_token_is_fetched_when_the_registry_asks_for_it(caplog: pytest.LogCaptureFixture) -> None:
    """Docker Hub, ghcr.io and most others do so; the password is sent only to the realm."""
    caplog.set_level(logging.INFO)
    asked: list[tuple[str, list[str], str]] = []
    kind = "application/vnd.oci.image.manifest.v1+json"

    async def token(request: web.Request) -> web.Response:
        query = request.query
        asked.append((query["service"], query.getall("scope"), request.headers.get("Authorization", "")))
        return web.json_response({"token": "for-a-while"})

    async def manifest(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer for-a-while":
            realm = f'Bearer realm="http://{request.host}/token",service="registry.test"'
            return web.json_response({}, status=401, headers={"WWW-Authenticate": realm})
        return web.json_response({"layers": []}, content_type=kind)

    application = web.Application()
    application.router.add_get("/token", token)
    application.router.add_get("/v2/team/image/manifests/1", manifest)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host = f"127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with Registries({"username": "me", "password": "hush", "registry": host}) as registries:
            for _ in range(2):
                data, headers = await registries.read(parse_reference(f"{host}/team/image:1"), "manifests/1")
                assert (json.loads(data), headers["Content-Type"].partition(";")[0]) == ({"layers": []}, kind)
    finally:
        await runner.cleanup()
    assert asked == [("registry.test", ["repository:team/image:pull"], "Basic bWU6aHVzaA==")], "asked for once"
    assert f"http://{host}" not in caplog.text, "a URL may be signed"
