"""An image with one more layer than its base, made and pushed without a container engine."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, Any, cast

from mlfleet._concurrency.threads import PROJECTS
from mlfleet._gzip import Compressed, compress
from mlfleet._oci.references import Reference
from mlfleet._oci.registry import Registries, RegistryError
from mlfleet.errors import BackendError

__all__ = ["ImageError", "NewLayer", "push_layer"]

_CHUNK = 2**18
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


class ImageError(BackendError):
    """The base image cannot be built on.

    Attributes:
        is_missing: True if the base image is not in its registry.
    """

    def __init__(self, message: str, *, is_missing: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing


@dataclass(frozen=True, slots=True)
class NewLayer:
    """The content of the layer to add.

    Attributes:
        digest: A hash of the content, known before it is packed.
        pack: A function that packs the content into a reproducible tar file, and returns it with the hash of what was
            packed, which differs from `digest` if the content has changed meanwhile. The caller of `pack` closes it.
        folder: The folder of the content in the image, which becomes the working directory.
    """

    digest: str
    pack: Callable[[], Awaitable[tuple[IO[bytes], str]]]
    folder: str


@dataclass(frozen=True, slots=True)
class _Image:
    """An image of one platform.

    Attributes:
        reference: The name of the image.
        digest: The digest of its manifest.
        kind: The media type of its manifest.
        manifest: The manifest, which names the layers.
    """

    reference: Reference
    digest: str
    kind: str
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer.

    Attributes:
        compressed: The compressed tar file.
        diff_id: The digest of the tar file.
    """

    compressed: Compressed
    diff_id: str

    @property
    def digest(self) -> str:
        """The digest of the compressed file."""
        return f"sha256:{self.compressed.sha256}"


async def push_layer(
    registries: Registries,
    base: Reference,
    target: Reference,
    layer: NewLayer,
    *,
    platform: str,
    on_progress: Callable[[str], None],
) -> str:
    """Push a base image with one more layer to a registry, unless the same image is there already.

    Args:
        registries: The client for the registries.
        base: The image to build on.
        target: The repository to push to; the tag derives from base and content.
        layer: The layer to add.
        platform: The platform as ``os/architecture``, for a base that exists for several.
        on_progress: A function that takes one line about the progress.

    Returns:
        The name of the image, with tag and digest.

    Raises:
        ImageError: The base does not exist, or not for that platform.
        RegistryError: A registry refused a request.
    """
    image = await _find(registries, base, platform)
    target = replace(target, tag=_tag(image.digest, layer.digest))
    existing = await registries.exists(target, f"manifests/{target.tag}", accept=_ACCEPT)
    if existing is not None and existing.get("Docker-Content-Digest"):
        return f"{target}@{existing['Docker-Content-Digest']}"
    tar, packed = await layer.pack()
    with closing(tar):
        added = await PROJECTS.run(partial(_compress, tar), undo=_discard)
    with closing(added.compressed.file):
        # The content may have changed since it was hashed: the tag names what was packed.
        target = replace(target, tag=_tag(image.digest, packed))
        on_progress(f"pushing the image {target} ({added.compressed.size / 2**20:.1f} MiB of project files)")
        digest = await _push(registries, image, target, added, layer.folder, on_progress)
    return f"{target}@{digest}"


async def _find(registries: Registries, base: Reference, platform: str) -> _Image:
    path = f"manifests/{base.tag}"
    try:
        data, headers = await registries.read(base, path, accept=_ACCEPT)
    except RegistryError as error:
        if error.status != 404:
            raise
        raise ImageError(f"the base image {base} is in no registry: push it there", is_missing=True) from error
    manifest, kind = _manifest(data, headers.get("Content-Type", ""), base)
    if kind in _INDEXES:
        base = replace(base, tag=_choose(manifest, platform, base))
        data, headers = await registries.read(base, f"manifests/{base.tag}", accept=_ACCEPT)
        manifest, kind = _manifest(data, headers.get("Content-Type", ""), base)
    if kind not in _LAYERS:
        raise ImageError(f"the base image {base} is of a kind that cannot be built on: {kind}")
    return _Image(base, _digest(data), kind, manifest)


def _manifest(data: bytes, content_type: str, image: Reference) -> tuple[dict[str, Any], str]:
    try:
        manifest = cast("dict[str, Any]", json.loads(data))
        kind = str(manifest.get("mediaType") or content_type.partition(";")[0])
    except (ValueError, AttributeError) as error:
        raise ImageError(f"the manifest of the image {image} cannot be read") from error
    return manifest, kind


def _choose(index: dict[str, Any], platform: str, base: Reference) -> str:
    """Return the digest of the image for a platform."""
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
    raise ImageError(
        f"the base image {base} is not there for {platform}, only for {known}: give platform in backend_config"
    )


async def _push(
    registries: Registries,
    image: _Image,
    target: Reference,
    layer: _Layer,
    folder: str,
    on_progress: Callable[[str], None],
) -> str:
    base, manifest = image.reference, copy.deepcopy(image.manifest)
    data, _ = await registries.read(base, f"blobs/{manifest['config']['digest']}")
    config = json.loads(data)
    for number, each in enumerate(manifest["layers"], 1):
        if not each.get("urls"):  # such a layer is fetched from elsewhere by everybody
            on_progress(f"pushing the image {target}: layer {number} of {len(manifest['layers'])} of its base")
            await _copy_blob(registries, base, target, each)
    if await registries.exists(target, f"blobs/{layer.digest}") is None:
        content = partial(PROJECTS.read, layer.compressed.file, _CHUNK)
        await registries.upload(target, layer.digest, layer.compressed.size, content)
    config["rootfs"]["diff_ids"].append(layer.diff_id)
    config.setdefault("history", []).append({"created_by": f"COPY project {folder}", "comment": "mlfleet"})
    config["config"] = {**(config.get("config") or {}), "WorkingDir": folder}
    data = json.dumps(config, sort_keys=True).encode()
    digest = _digest(data)
    if await registries.exists(target, f"blobs/{digest}") is None:
        await registries.upload(target, digest, len(data), partial(_single, data))
    manifest["config"] = {**manifest["config"], "digest": digest, "size": len(data)}
    entry = {"mediaType": _LAYERS[image.kind], "digest": layer.digest, "size": layer.compressed.size}
    manifest["layers"].append(entry)
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
            # As the registry has them: a layer that is compressed stays so.
            async for chunk in response.aiter_raw(_CHUNK):
                yield chunk

    await registries.upload(target, digest, size, content)


def _tag(base: str, content: str) -> str:
    """Return a tag that only the same base and content have."""
    return hashlib.sha256(f"{base} {content}".encode()).hexdigest()[:24]


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _compress(tar: IO[bytes]) -> _Layer:
    """Compress a tar file. Blocking."""
    diff_id = f"sha256:{hashlib.file_digest(tar, 'sha256').hexdigest()}"  # type: ignore[arg-type]
    tar.seek(0)
    return _Layer(compress(tar), diff_id)


async def _discard(layer: _Layer) -> None:
    layer.compressed.file.close()


async def _single(data: bytes) -> AsyncIterator[bytes]:
    yield data
