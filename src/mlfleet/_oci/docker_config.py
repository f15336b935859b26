"""The docker command's own configuration file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlfleet.errors import BackendError

__all__ = ["config_folder", "read_config"]


def config_folder(environ: Mapping[str, str]) -> Path:
    """The folder of Docker's own configuration: ``DOCKER_CONFIG``, else ``~/.docker``."""
    given = environ.get("DOCKER_CONFIG")
    return Path(given) if given else Path.home() / ".docker"


def read_config(environ: Mapping[str, str]) -> dict[str, Any]:
    """Docker's ``config.json``; empty if there is none. Blocking.

    Raises:
        BackendError: it is no JSON object.
    """
    path = config_folder(environ) / "config.json"
    try:
        data = json.loads(path.read_bytes())
    except OSError:
        return {}
    except ValueError as error:
        raise BackendError(f"Docker's configuration {path} is no JSON: {error}", backend="docker") from error
    if not isinstance(data, dict):
        raise BackendError(f"Docker's configuration {path} is no JSON object", backend="docker")
    return data
