"""The project's code as a layer of an image, made and pushed by a Docker engine or without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlfleet._oci.references import parse_reference
from mlfleet.backends.base import Job
from mlfleet.backends.docker.client import Engine
from mlfleet.backends.docker.image import Images
from mlfleet.backends.kubernetes.config import KubernetesConfig
from mlfleet.backends.kubernetes.engine_push import push_from_engine
from mlfleet.backends.kubernetes.image import push_project
from mlfleet.backends.kubernetes.registry import Registries

__all__ = ["push"]


async def push(job: Job, config: KubernetesConfig, base: str) -> str:
    """Push an image with the project.

    Args:
        job: the run.
        config: of its backend.
        base: the image to build on.

    Returns:
        Its name, with its digest.

    Raises:
        MlfleetError: it cannot be made or pushed; the text says why.
    """
    auth: Mapping[str, Any] | None = job.docker.auth if job.docker is not None else None
    repository = config.repository_uri or ""
    if config.builder == "docker":
        async with Engine() as engine:
            await engine.locate()
            images = Images(engine)
            found = await images.base(base, platform=config.platform, credentials=auth, on_progress=job.on_progress)
            built = await images.built(found, job.project_dir, project=job.project_name, on_progress=job.on_progress)
            return await push_from_engine(engine, built, repository, auth, job.on_progress)
    async with Registries(auth) as registries:
        return await push_project(
            registries,
            parse_reference(base),
            parse_reference(repository),
            job.project_dir,
            platform=config.platform,
            on_progress=job.on_progress,
        )
