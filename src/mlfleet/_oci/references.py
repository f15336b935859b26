"""Names of container images."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlfleet.errors import UsageError

__all__ = ["Reference", "parse_reference", "split_registry"]

_HUB = "registry-1.docker.io"
"""The host of Docker Hub's registry."""

_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:\d+)?|\[[0-9a-fA-F:]+\](:\d+)?")


@dataclass(frozen=True, slots=True)
class Reference:
    """The full name of an image.

    Attributes:
        host: The host of the registry, with its port.
        repository: The repository in the registry.
        tag: The tag or the digest of the image.
    """

    host: str
    repository: str
    tag: str = "latest"

    @property
    def registry(self) -> str:
        """The registry, as people write it."""
        return "docker.io" if self.host == _HUB else self.host

    @property
    def name(self) -> str:
        """The name without the tag, as people write it."""
        return f"{self.registry}/{self.repository}"

    def __str__(self) -> str:
        return f"{self.name}{'@' if ':' in self.tag else ':'}{self.tag}"


def split_registry(name: str) -> tuple[str, str]:
    """Return the registry that the name of an image begins with, and the rest. Without one it is ``docker.io``."""
    first, slash, rest = name.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        return "docker.io", name
    return "docker.io" if first == "index.docker.io" else first, rest


def parse_reference(text: str) -> Reference:
    """Parse the name of an image as Docker does: without a host it is on Docker Hub.

    Raises:
        UsageError: It is not a valid name.
    """
    rest, _, digest = text.partition("@")
    host, rest = split_registry(rest)
    head, colon, tag = rest.rpartition(":")
    repository = head if colon else rest
    if host == "docker.io":
        host = _HUB
        repository = repository if "/" in repository else f"library/{repository}"
    if (
        not _HOST.fullmatch(host)
        or not _NAME.fullmatch(repository)
        or (colon and not re.fullmatch(r"\w[\w.-]{0,127}", tag))
    ):
        hint = "; it is written in small letters" if _NAME.fullmatch(repository.lower()) else ""
        raise UsageError(f"{text!r} is not the name of an image such as host:5000/team/image:tag{hint}")
    return Reference(host, repository, digest or (tag if colon else "latest"))
