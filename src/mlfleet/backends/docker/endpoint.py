"""Where the Docker engine is, found as the docker command finds it."""

from __future__ import annotations

import hashlib
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlfleet._hosts import has_loopback_host
from mlfleet._oci.docker_config import config_folder, read_config
from mlfleet.errors import BackendError

__all__ = ["Endpoint", "find_endpoint"]

_DEFAULT = "unix:///var/run/docker.sock"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach an engine.

    Attributes:
        url: ``unix:///path`` or ``tcp://host:port``.
        tls: for a ``tcp`` engine that asks for it.
        certificates: the folder that they are from.
    """

    url: str
    tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    certificates: Path | None = None

    @property
    def socket(self) -> str | None:
        """The path of its Unix socket; None if it is reached over the network."""
        return self.url.removeprefix("unix://") if self.url.startswith("unix://") else None

    @property
    def local(self) -> bool:
        """Whether it is on this machine, as far as its address tells."""
        return self.socket is not None or has_loopback_host(self.url)


def find_endpoint(environ: Mapping[str, str]) -> Endpoint:
    """The engine that ``DOCKER_HOST``, else ``DOCKER_CONTEXT``, else the current context names. Blocking: reads files.

    Raises:
        BackendError: what is named there cannot be used; the text says why.
    """
    url = environ.get("DOCKER_HOST")
    if url:
        folder = Path(environ.get("DOCKER_CERT_PATH") or config_folder(environ))
        verify = bool(environ.get("DOCKER_TLS_VERIFY"))
        wanted = verify or bool(environ.get("DOCKER_TLS"))
        return _endpoint(url, folder if wanted else None, "DOCKER_HOST", verify=verify)
    name = environ.get("DOCKER_CONTEXT") or read_config(environ).get("currentContext")
    if name and name != "default":
        return _context(str(name), config_folder(environ))
    return Endpoint(_DEFAULT)


def _context(name: str, folder: Path) -> Endpoint:
    # https://github.com/docker/cli/blob/master/cli/context/store/doc.go
    key = hashlib.sha256(name.encode()).hexdigest()
    path = folder / "contexts" / "meta" / key / "meta.json"
    try:
        endpoint = json.loads(path.read_bytes())["Endpoints"]["docker"]
        url, verify = str(endpoint["Host"]), not endpoint.get("SkipTLSVerify", False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"the Docker context {name!r} cannot be read from {path}: choose another with 'docker context use'"
        raise BackendError(text, backend="docker") from error
    certificates = folder / "contexts" / "tls" / key / "docker"
    given = certificates if certificates.is_dir() else None
    return _endpoint(url, given, f"the Docker context {name!r}", verify=verify)


def _endpoint(url: str, certificates: Path | None, source: str, *, verify: bool) -> Endpoint:
    if not url.startswith(("unix://", "tcp://", "http://", "https://")):
        hint = "; for a machine behind ssh, forward its socket: ssh -L /tmp/docker.sock:/var/run/docker.sock HOST"
        text = f"{source} is {url!r}: unix:///path and tcp://host:port are understood{hint}"
        raise BackendError(text, backend="docker")
    # A socket of this machine has no use for them, whatever else is set.
    if certificates is None or url.startswith("unix://"):
        return Endpoint(url)
    return Endpoint(url, _tls(certificates, verify=verify), certificates)


def _tls(folder: Path, *, verify: bool) -> ssl.SSLContext:
    files = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
    try:
        authority, certificate, key = (path if path.exists() else None for path in files)
        context = ssl.create_default_context(cafile=authority)
        if not verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if certificate is not None and key is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        text = f"the certificates for the Docker engine in {folder} cannot be used: {error}"
        raise BackendError(text, backend="docker") from error
    if (certificate is None) != (key is None):
        text = f"the certificates for the Docker engine in {folder} need both, cert.pem and key.pem"
        raise BackendError(text, backend="docker")
    return context
