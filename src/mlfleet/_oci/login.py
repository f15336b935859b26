"""Credentials for image registries: the caller's, else those that ``docker login`` has stored."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio

from mlfleet._concurrency.threads import LOGINS
from mlfleet._oci.references import split_registry
from mlfleet._process.process import run_process
from mlfleet._run_log import get_logger
from mlfleet.errors import BackendError, UsageError

__all__ = ["check_auth", "config_folder", "find_credentials", "header", "read_config", "registry_of"]

_HUB = "https://index.docker.io/v1/"
_KEYS = ("username", "password", "email", "registry", "reauth", "dockercfg_path", "identitytoken")
_HELPER_TIME = 30.0  # seconds
_NOT_FOUND = 127  # as the shell says it
_log = get_logger("mlfleet.docker")


def check_auth(auth: Mapping[str, Any] | None) -> None:
    """Check the argument ``docker_auth``.

    Raises:
        UsageError: A key is unknown or missing. The text contains no value.
    """
    if auth is None:
        return
    unknown = sorted(str(key) for key in auth if key not in _KEYS)
    if unknown:
        raise UsageError(f"docker_auth has {', '.join(unknown)}: it takes {', '.join(_KEYS)}")
    if not auth.get("identitytoken") and not (auth.get("username") and auth.get("password")):
        raise UsageError("docker_auth needs username and password, or identitytoken")


def config_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of Docker's own configuration: ``DOCKER_CONFIG``, else ``~/.docker``."""
    given = environ.get("DOCKER_CONFIG")
    return Path(given) if given else Path.home() / ".docker"


def read_config(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return Docker's ``config.json``; an empty one if the file does not exist. Blocking.

    Raises:
        BackendError: It is not a JSON object.
    """
    path = config_folder(environ) / "config.json"
    try:
        data = json.loads(path.read_bytes())
    except OSError:
        return {}
    except ValueError as error:
        raise BackendError(f"Docker's configuration {path} is not JSON: {error}", backend="docker") from error
    if not isinstance(data, dict):
        raise BackendError(f"Docker's configuration {path} is not a JSON object", backend="docker")
    return data


def registry_of(image: str) -> str:
    """Return the registry of an image, as Docker's configuration names it."""
    registry, _ = split_registry(image)
    return _HUB if registry == "docker.io" else registry


def header(credentials: Mapping[str, str] | None) -> dict[str, str]:
    """Return the header with which a request shows `credentials`."""
    if not credentials:
        return {}
    return {"X-Registry-Auth": base64.urlsafe_b64encode(json.dumps(dict(credentials)).encode()).decode()}


async def find_credentials(image: str, given: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Return the credentials for the registry of `image`; None if there are none.

    Credentials that the caller gave without a registry are for Docker Hub only, as in docker-py: a project must not be
    able to send them to a registry of its choice.

    Raises:
        BackendError: Docker's configuration cannot be read.
    """
    registry = registry_of(image)
    if given is not None and _canonical(str(given.get("registry") or _HUB)) == _canonical(registry):
        known = {key: str(given[key]) for key in ("username", "password", "email", "identitytoken") if given.get(key)}
        return {**known, "serveraddress": registry}
    environ = dict(os.environ)
    config = await LOGINS.run(lambda: read_config(environ))
    helper = (config.get("credHelpers") or {}).get(registry) or config.get("credsStore")
    if helper:
        found = await _ask_helper(str(helper), registry)
        if found is not None:
            return found
    return _stored(config, registry, str(config_folder(environ)))


def _canonical(registry: str) -> str:
    name = registry.removeprefix("https://").removeprefix("http://").rstrip("/")
    name = name.removesuffix("/v1").removesuffix("/v2").rstrip("/")
    return "index.docker.io" if name in ("docker.io", "registry-1.docker.io") else name


def _stored(config: Mapping[str, Any], registry: str, folder: str) -> dict[str, str] | None:
    for name, entry in (config.get("auths") or {}).items():
        if _canonical(str(name)) != _canonical(registry) or not isinstance(entry, dict):
            continue
        if entry.get("identitytoken"):
            return {"identitytoken": str(entry["identitytoken"]), "serveraddress": registry}
        if entry.get("auth"):
            try:
                user, _, password = base64.b64decode(str(entry["auth"]), validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError) as error:
                text = f"what {folder} holds for the registry {registry} is damaged: do 'docker login {registry}' again"
                raise BackendError(text, backend="docker") from error
            return {"username": user, "password": password.rstrip("\0"), "serveraddress": registry}
    return None


async def _ask_helper(helper: str, registry: str) -> dict[str, str] | None:
    """Return the answer of ``docker-credential-<helper> get``; None if it knows no credentials.

    https://github.com/docker/docker-credential-helpers#development
    """
    program = f"docker-credential-{helper}"
    # The program reads the registry's name from its stdin; the name is not secret, the answer is.
    ask = ("sh", "-c", 'printf %s "$2" | "$1" get', "sh", program, registry)
    try:
        with anyio.fail_after(_HELPER_TIME):
            answer = await run_process(ask, limit=2**16)
    except TimeoutError as error:
        text = f"{program} gave no credentials for {registry} within {_HELPER_TIME:g} s"
        raise BackendError(text, backend="docker") from error
    if answer.returncode != 0:
        # "credentials not found in native keychain" is not an error: the image may be public.
        _log.debug("%s knows no credentials for %s", program, registry)
        if answer.returncode == _NOT_FOUND:
            text = f"Docker's configuration names the credential helper {program}, which is not on PATH"
            raise BackendError(text, backend="docker")
        return None
    try:
        found = json.loads(answer.stdout)
        user, secret = str(found["Username"]), str(found["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        text = f"the answer of {program} for {registry} is not what a credential helper says"
        raise BackendError(text, backend="docker") from error
    if user == "<token>":
        return {"identitytoken": secret, "serveraddress": registry}
    return {"username": user, "password": secret, "serveraddress": registry}
