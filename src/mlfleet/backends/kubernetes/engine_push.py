"""Pushing an image that a Docker engine has built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlfleet._oci import login as auth
from mlfleet._oci.references import parse_reference
from mlfleet.backends.docker.client import Engine, EngineError
from mlfleet.backends.docker.image import Image
from mlfleet.errors import SubmitError

__all__ = ["push_from_engine"]


async def push_from_engine(
    engine: Engine,
    image: Image,
    repository: str,
    credentials: Mapping[str, Any] | None,
    on_progress: Callable[[str], None],
) -> str:
    """Tag and push an image.

    Args:
        engine: that has it.
        image: with the project.
        repository: to push to.
        credentials: the argument ``docker_auth``.
        on_progress: takes one line on how far it is.

    Returns:
        Its name there, with tag and digest.

    Raises:
        SubmitError: the registry refused it.
    """
    name, tag = parse_reference(repository).name, image.uri.rpartition(":")[2]
    await engine.call("asked to tag an image", lambda docker: docker.images.tag(image.uri, name, tag=tag))
    found = await auth.find_credentials(name, credentials)
    on_progress(f"pushing the image {name}:{tag}")
    digest = ""
    try:
        # The engine asks for the header, also where nobody has logged in.
        headers = auth.header(found) or {"X-Registry-Auth": "e30="}
        async for item in engine.json_lines(
            "asked to push an image", "POST", f"images/{name}/push", params={"tag": tag}, headers=headers
        ):
            digest = str((item.get("aux") or {}).get("Digest") or digest)
    except EngineError as error:
        hint = f" (do 'docker login {auth.registry_of(name)}', or give docker_auth)" if found is None else ""
        text = f"the image {name}:{tag} cannot be pushed: {error.message}{hint}"
        raise SubmitError(text, backend="kubernetes") from error

    return f"{name}:{tag}" + (f"@{digest}" if digest else "")
