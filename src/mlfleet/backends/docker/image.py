"""Images: pulled or built once for all runs that need the same one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from mlfleet._concurrency.single_flight import SingleFlight
from mlfleet._concurrency.threads import PROJECTS
from mlfleet._oci import login
from mlfleet._project.content import content_hash, pack
from mlfleet._run_log import get_logger
from mlfleet.backends.docker.client import Engine, EngineError
from mlfleet.errors import SubmitError, UsageError

__all__ = ["CONTENT_LABEL", "WORKDIR", "Image", "Images", "check_reference"]

WORKDIR = "/mlflow/projects/code/"
"""The folder of the project in an image that is built, the same as mlflow's."""
CONTENT_LABEL = "mlfleet.content"

_log = get_logger("mlfleet.docker")
_CHUNK = 2**18
# https://pkg.go.dev/github.com/distribution/reference, without its limits of length.
_REFERENCE = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::\d+)?/)?[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*"
    r"(?::\w[\w.-]{0,127})?(?:@[A-Za-z][\w+.-]*:[0-9a-fA-F]{32,})?"
)
_ID = re.compile(r"(?:sha256:)?[0-9a-f]{12,64}")
_DIGESTS_AND_PROGRESS = re.compile(r"[0-9a-f]{12}")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Image:
    """An image that the engine has.

    Attributes:
        uri: The name to run it by.
        id: The id, ``sha256:…``.
        entrypoint: The program and arguments that start its commands.
        stop_signal: The signal that asks its programs to stop.
    """

    uri: str
    id: str
    entrypoint: tuple[str, ...] = ()
    stop_signal: str | None = None


def check_reference(image: str) -> None:
    """Check the name of an image.

    Raises:
        UsageError: It is not a name of an image.
    """
    if not (_REFERENCE.fullmatch(image) or _ID.fullmatch(image)):
        hint = "; it is written in small letters" if _REFERENCE.fullmatch(image.lower()) else ""
        raise UsageError(
            f"docker_env: {image!r} is not the name of an image, such as python:3.11 or host:5000/team/image{hint}"
        )


class Images:
    """The images of one engine, pulled and built once for all runs.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pulls: SingleFlight[tuple[str, str | None], Image] = SingleFlight()
        self._builds: SingleFlight[str, Image] = SingleFlight()

    async def base(
        self,
        name: str,
        *,
        pull: str = "missing",
        platform: str | None = None,
        credentials: Mapping[str, Any] | None = None,
        on_progress: Progress,
    ) -> Image:
        """Return the image of that name; pull it if necessary.

        Args:
            name: The name of the image.
            pull: ``missing``, ``always`` or ``never``.
            platform: The platform, such as ``linux/arm64``; None: the engine's.
            credentials: The argument ``docker_auth``.
            on_progress: Called with lines on the progress.

        Raises:
            SubmitError: The engine neither has nor can pull it; the text says why and what to do.
        """
        if pull != "always":
            found = await self._find(name)
            if found is not None:
                return found
            if pull == "never" or _ID.fullmatch(name):
                why = "docker_args has pull=never" if pull == "never" else "an id cannot be pulled"
                raise SubmitError(f"the image {name!r} is not on the engine, and {why}", backend="docker")
        work = partial(self._pull, name, platform, credentials, on_progress)
        return await self._pulls((name, platform), work)

    async def built(self, base: Image, folder: Path, *, project: str, on_progress: Progress) -> Image:
        """Return an image of `base` with the project in it, built once for the same base and content.

        Args:
            base: The image to build on.
            folder: The folder of the project.
            project: The project's name, which becomes the image's.
            on_progress: Called with lines on the progress.

        Raises:
            SubmitError: The engine cannot build it.
            FetchError: The project's files cannot be read.
        """
        digest = await content_hash(folder)
        name = _tag(base, digest, project)
        found = await self._find(name)
        if found is not None:
            return found
        return await self._builds(name, partial(self._build, base, folder, project, on_progress))

    async def _find(self, name: str) -> Image | None:
        try:
            return await self._inspect(name)
        except EngineError as error:
            if error.status == 404:
                return None
            raise

    async def _inspect(self, name: str) -> Image:
        found = await self._engine.call("asked for an image", lambda docker: docker.images.inspect(name))
        config = found.get("Config") or {}
        return Image(name, str(found["Id"]), tuple(config.get("Entrypoint") or ()), config.get("StopSignal"))

    async def _pull(
        self, name: str, platform: str | None, given: Mapping[str, Any] | None, on_progress: Progress
    ) -> Image:
        credentials = await login.find_credentials(name, given)
        on_progress(f"pulling the image {name}")
        layers: dict[str, bool] = {}
        told = ""
        params = {"fromImage": name, "platform": platform}
        if ":" not in name.rpartition("/")[2] and "@" not in name:
            params["tag"] = "latest"  # without it the engine pulls every tag there is
        try:
            async for item in self._engine.json_lines(
                "asked to pull an image", "images/create", params=params, headers=login.header(credentials)
            ):
                line = _pull_progress(name, layers, item)
                if line and line != told:
                    on_progress(told := line)
        except EngineError as error:
            raise _cannot_pull(name, error, with_credentials=credentials is not None) from error
        return await self._inspect(name)

    async def _build(self, base: Image, folder: Path, project: str, on_progress: Progress) -> Image:
        dockerfile = f"FROM {base.uri}\nCOPY project/ {WORKDIR}\nWORKDIR {WORKDIR}\n".encode()
        packed = await pack(folder, prefix="project/", extra=(("Dockerfile", dockerfile),))
        with closing(packed.file):
            # The content may have changed since it was hashed: the name tells what was packed.
            name = _tag(base, packed.digest, project)
            on_progress(f"building the image {name} ({packed.size / 2**20:.1f} MiB of project files)")
            params = {
                "t": name,
                "rm": True,
                "forcerm": True,
                "labels": {CONTENT_LABEL: packed.digest, "mlfleet.project": project},
            }
            headers = {"Content-Type": "application/x-tar"}
            try:
                async for item in self._engine.json_lines(
                    "asked to build an image",
                    "build",
                    params=params,
                    headers=headers,
                    data=_chunks(packed.file),
                ):
                    line = str(item.get("stream") or "").strip()
                    if line:
                        _log.debug("%s: %s", name, line)
            except EngineError as error:
                text = f"the image {name} cannot be built on {base.uri}: {error.message}"
                raise SubmitError(text, backend="docker") from error
        return await self._inspect(name)


async def _chunks(file: IO[bytes]) -> AsyncIterator[bytes]:
    while data := await PROJECTS.run(partial(file.read, _CHUNK)):
        yield data


def _tag(base: Image, digest: str, project: str) -> str:
    """Return ``<project>:<hash of base and content>``, so that other content never replaces an image."""
    name = re.sub(r"[^a-z0-9]+", "-", project.lower()).strip("-")[:100] or "docker-project"
    content = hashlib.sha256(f"{base.id} {digest}".encode()).hexdigest()
    return f"{name}:{content[:16]}"


def _pull_progress(name: str, layers: dict[str, bool], item: Mapping[str, Any]) -> str:
    layer, status = str(item.get("id") or ""), str(item.get("status") or "")
    if not _DIGESTS_AND_PROGRESS.fullmatch(layer):
        return ""
    layers[layer] = layers.get(layer, False) or status in ("Pull complete", "Already exists")
    return f"pulling the image {name}: {sum(layers.values())} of {len(layers)} layers"


def _cannot_pull(name: str, error: EngineError, *, with_credentials: bool) -> SubmitError:
    message = error.message.lower()
    registry = login.registry_of(name)
    if error.unreachable:
        return SubmitError(str(error), backend="docker")
    if any(text in message for text in ("no basic auth", "unauthorized", "denied", "authentication required")):
        todo = (
            "the registry does not take the credentials that it was shown"
            if with_credentials
            else f"log in with 'docker login {registry}', or give docker_auth with username, password and registry"
        )
        hint = f"{todo}; or there is no such image"
    elif any(text in message for text in ("not found", "manifest unknown", "no such image")):
        hint = "check its name and tag"
    else:
        hint = "" if "no space left" in message else "is the registry reachable from the engine?"
    text = f"the image {name!r} is not on the engine and cannot be pulled: {error.message}"
    if hint:
        text += f" ({hint})"
    return SubmitError(text, backend="docker")
