"""An image with the project in it: the base image and one layer more, pushed without a Docker engine."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from mlfleet._concurrency.threads import PROJECTS
from mlfleet._oci.references import Reference
from mlfleet._project.content import content_hash, pack
from mlfleet.backends.kubernetes.delivery import FOLDER
from mlfleet.backends.kubernetes.registry import Registries, RegistryError
from mlfleet.errors import SubmitError

__all__ = ["push_project"]

_log = logging.getLogger("mlfleet.kubernetes")
_CHUNK = 2**18
_IN_MEMORY = 2**23
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_OCI = "application/vnd.oci.image.manifest.v1+json"
_DOCKER = "application/vnd.docker.distribution.manifest.v2+json"
_ACCEPT = ", ".join((_OCI, _DOCKER, *_INDEXES))
_LAYERS = {
    _OCI: "application/vnd.oci.image.layer.v1.tar+gzip",
    _DOCKER: "application/vnd.docker.image.rootfs.diff.tar.gzip",
}


@dataclass(frozen=True, slots=True)
class _Image:
    """An image of one platform.

    Attributes:
        reference: of it.
        digest: of its manifest.
        kind: the manifest's media type.
        manifest: its layers.
    """

    reference: Reference
    digest: str
    kind: str
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A packed project.

    Attributes:
        file: compressed.
        digest: of the file.
        diff_id: of what is in it.
        size: of the file in bytes.
    """

    file: IO[bytes]
    digest: str
    diff_id: str
    size: int


async def push_project(
    registries: Registries,
    base: Reference,
    target: Reference,
    folder: Path,
    *,
    platform: str,
    on_progress: Callable[[str], None],
) -> str:
    """Push base + project to a registry, unless the same is there already.

    Args:
        registries: to send requests by.
        base: the image to build on.
        target: where it is pushed to; its tag derives from the content.
        folder: of the project.
        platform: ``os/architecture``, where the base is there for several.
        on_progress: takes one line on how far it is.

    Returns:
        The image's name, with tag and digest.

    Raises:
        SubmitError: the base is not there for that platform.
        RegistryError: a registry refused.
        FetchError: the project's files cannot be read.
    """
    image = await _find(registries, base, platform)
    target = replace(target, tag=_tag(image.digest, await content_hash(folder)))
    there = await registries.exists(target, f"manifests/{target.tag}", accept=_ACCEPT)
    if there is not None and there.get("Docker-Content-Digest"):
        return f"{target}@{there['Docker-Content-Digest']}"
    packed = await pack(folder, prefix=f"{FOLDER[1:]}/")
    with closing(packed.file):
        layer = await PROJECTS.run(partial(_compress, packed.file), undo=_discard)
    with closing(layer.file):
        # The content may have changed since it was hashed: the tag tells what was packed.
        target = replace(target, tag=_tag(image.digest, packed.digest))
        on_progress(f"pushing the image {target} ({layer.size / 2**20:.1f} MiB of project files)")
        digest = await _push(registries, image, target, layer, on_progress)
    return f"{target}@{digest}"


async def _find(registries: Registries, base: Reference, platform: str) -> _Image:
    path = f"manifests/{base.tag}"
    try:
        data, headers = await registries.read(base, path, accept=_ACCEPT)
    except RegistryError as error:
        if error.status != 404:
            raise
        raise SubmitError(
            f"the base image {base} is in no registry: push it there, or give builder: 'docker' in backend_config to"
            " build on the images of this machine's Docker engine",
            backend="kubernetes",
        ) from error
    manifest, kind = _manifest(data, headers.get("Content-Type", ""), base)
    if kind in _INDEXES:
        base = replace(base, tag=_choose(manifest, platform, base))
        data, headers = await registries.read(base, f"manifests/{base.tag}", accept=_ACCEPT)
        manifest, kind = _manifest(data, headers.get("Content-Type", ""), base)
    if kind not in _LAYERS:
        raise SubmitError(f"the base image {base} is of a kind that cannot be built on: {kind}", backend="kubernetes")
    return _Image(base, _digest(data), kind, manifest)


def _manifest(data: bytes, content_type: str, image: Reference) -> tuple[dict[str, Any], str]:
    try:
        manifest = cast("dict[str, Any]", json.loads(data))
        kind = str(manifest.get("mediaType") or content_type.partition(";")[0])
    except (ValueError, AttributeError) as error:
        raise SubmitError(f"the manifest of the image {image} cannot be read", backend="kubernetes") from error
    return manifest, kind


def _choose(index: dict[str, Any], platform: str, base: Reference) -> str:
    """The digest of the image for a platform."""
    system, _, rest = platform.partition("/")
    architecture, _, variant = rest.partition("/")
    offered: list[str] = []
    for each in index.get("manifests") or ():
        found = each.get("platform") or {}
        offered.append("/".join(filter(None, (found.get("os"), found.get("architecture"), found.get("variant")))))
        if (found.get("os"), found.get("architecture")) == (system, architecture) and (
            not variant or found.get("variant") == variant
        ):
            return str(each["digest"])
    known = ", ".join(sorted({each for each in offered if "unknown" not in each})) or "none"
    raise SubmitError(
        f"the base image {base} is not there for {platform}, only for {known}: give platform in backend_config",
        backend="kubernetes",
    )


async def _push(
    registries: Registries, image: _Image, target: Reference, layer: _Layer, on_progress: Callable[[str], None]
) -> str:
    base, manifest = image.reference, copy.deepcopy(image.manifest)
    data, _ = await registries.read(base, f"blobs/{manifest['config']['digest']}")
    config = json.loads(data)
    for number, each in enumerate(manifest["layers"], 1):
        if not each.get("urls"):  # such a layer is fetched from elsewhere by everybody
            on_progress(f"pushing the image {target}: layer {number} of {len(manifest['layers'])} of its base")
            await _copy_blob(registries, base, target, each)
    if await registries.exists(target, f"blobs/{layer.digest}") is None:
        await registries.upload(target, layer.digest, layer.size, partial(_chunks, layer.file))
    config["rootfs"]["diff_ids"].append(layer.diff_id)
    config.setdefault("history", []).append({"created_by": f"COPY project {FOLDER}", "comment": "mlfleet"})
    config.setdefault("config", {})
    config["config"] = {**(config["config"] or {}), "WorkingDir": FOLDER}
    content = json.dumps(config, sort_keys=True).encode()
    digest = _digest(content)
    if await registries.exists(target, f"blobs/{digest}") is None:
        await registries.upload(target, digest, len(content), partial(_once, content))
    manifest["config"] = {**manifest["config"], "digest": digest, "size": len(content)}
    manifest["layers"].append({"mediaType": _LAYERS[image.kind], "digest": layer.digest, "size": layer.size})
    manifest["mediaType"] = image.kind
    body = json.dumps(manifest, sort_keys=True).encode()
    return await registries.put_manifest(target, body, image.kind) or _digest(body)


async def _copy_blob(registries: Registries, base: Reference, target: Reference, layer: dict[str, Any]) -> None:
    digest, size = str(layer["digest"]), int(layer["size"])
    if await registries.exists(target, f"blobs/{digest}") is not None:
        return
    if base.host == target.host and await registries.mount(target, digest, base.repository):
        return

    async def content() -> AsyncIterator[bytes]:
        async with registries.request("GET", base, f"blobs/{digest}") as response:
            async for chunk in response.content.iter_chunked(_CHUNK):
                yield chunk

    await registries.upload(target, digest, size, content)


def _tag(base: str, content: str) -> str:
    """The same base and content have the same tag, and no others."""
    return hashlib.sha256(f"{base} {content}".encode()).hexdigest()[:24]


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _compress(tar: IO[bytes]) -> _Layer:
    """Compress a tar so that the same content gives the same bytes. Blocking."""
    diff_id = _hash(tar)
    file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - the caller closes it
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as compressed:
        shutil.copyfileobj(tar, compressed, _CHUNK)
    size = file.tell()
    file.seek(0)
    return _Layer(file, _hash(file), diff_id, size)


async def _discard(layer: _Layer) -> None:
    layer.file.close()


def _hash(file: IO[bytes]) -> str:
    """Of the rest of a file, which is at its beginning afterwards. Blocking."""
    digest = hashlib.sha256()
    while data := file.read(_CHUNK):
        digest.update(data)
    file.seek(0)
    return f"sha256:{digest.hexdigest()}"


async def _chunks(file: IO[bytes]) -> AsyncIterator[bytes]:
    await PROJECTS.run(partial(file.seek, 0))
    while data := await PROJECTS.run(partial(file.read, _CHUNK)):
        yield data


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
