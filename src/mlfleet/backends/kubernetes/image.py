"""``code-delivery: image``: an image with the project, made and pushed by a Docker engine or without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import IO, Any

from mlfleet._oci import login
from mlfleet._oci.image import ImageError, NewLayer, push_layer
from mlfleet._oci.references import parse_reference
from mlfleet._oci.registry import Registries
from mlfleet._project.content import content_hash, pack
from mlfleet.backends.base import Job
from mlfleet.backends.docker.client import Engine, EngineError
from mlfleet.backends.docker.image import Image, Images
from mlfleet.backends.kubernetes.config import KubernetesConfig
from mlfleet.backends.kubernetes.manifest import PROJECT_FOLDER
from mlfleet.errors import SubmitError

__all__ = ["push_image"]


async def push_image(job: Job, config: KubernetesConfig, base: str) -> str:
    """Push an image with the project.

    Args:
        job: The job of the run.
        config: The configuration of the backend.
        base: The image to build on.

    Returns:
        The name of the image, with its digest.

    Raises:
        MlfleetError: It cannot be made or pushed; the text says why.
    """
    auth: Mapping[str, Any] | None = job.docker.auth if job.docker is not None else None
    repository = config.repository_uri or ""
    if config.builder == "docker":
        async with Engine() as engine:
            await engine.locate()
            images = Images(engine)
            found = await images.base(base, platform=config.platform, credentials=auth, on_progress=job.on_progress)
            built = await images.built(found, job.project_dir, project=job.project_name, on_progress=job.on_progress)
            return await _push_from_engine(engine, built, repository, auth, job.on_progress)

    async def packed() -> tuple[IO[bytes], str]:
        made = await pack(job.project_dir, prefix=f"{PROJECT_FOLDER[1:]}/")
        return made.file, made.digest

    layer = NewLayer(await content_hash(job.project_dir), packed, PROJECT_FOLDER)
    try:
        async with Registries(auth) as registries:
            return await push_layer(
                registries,
                parse_reference(base),
                parse_reference(repository),
                layer,
                platform=config.platform,
                on_progress=job.on_progress,
            )
    except ImageError as error:
        hint = ", or give builder: 'docker' in backend_config to build on the images of this machine's Docker engine"
        raise SubmitError(f"{error}{hint if error.is_missing else ''}", backend="kubernetes") from error


async def _push_from_engine(
    engine: Engine,
    image: Image,
    repository: str,
    credentials: Mapping[str, Any] | None,
    on_progress: Callable[[str], None],
) -> str:
    """Tag and push an image that the engine has built.

    Returns:
        The name of the image, with tag and digest.

    Raises:
        SubmitError: The registry refused it.
    """
    name, tag = parse_reference(repository).name, image.uri.rpartition(":")[2]
    await engine.call("asked to tag an image", lambda docker: docker.images.tag(image.uri, name, tag=tag))
    found = await login.find_credentials(name, credentials)
    on_progress(f"pushing the image {name}:{tag}")
    digest = ""
    try:
        # The engine asks for the header, also where nobody has logged in.
        headers = login.header(found) or {"X-Registry-Auth": "e30="}
        async for item in engine.json_lines(
            "asked to push an image", f"images/{name}/push", params={"tag": tag}, headers=headers
        ):
            digest = str((item.get("aux") or {}).get("Digest") or digest)
    except EngineError as error:
        hint = f" (do 'docker login {login.registry_of(name)}', or give docker_auth)" if found is None else ""
        text = f"the image {name}:{tag} cannot be pushed: {error.message}{hint}"
        raise SubmitError(text, backend="kubernetes") from error
    return f"{name}:{tag}" + (f"@{digest}" if digest else "")
