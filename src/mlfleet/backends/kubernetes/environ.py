"""The variables of a run's container: which are plain, which are secret, and where tracking is for a pod."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from mlfleet._hosts import is_loopback
from mlfleet._text.masking import is_secret_name, mask_uri
from mlfleet.backends.base import DockerRequest, Job
from mlfleet.errors import SubmitError, UsageError

__all__ = ["check_copied", "check_tracking", "variables"]

_log = logging.getLogger("mlfleet.kubernetes")
_URI = "MLFLOW_TRACKING_URI"
_NAME = re.compile(r"[A-Za-z_.-][A-Za-z0-9_.-]*")


def check_copied(docker: DockerRequest | None, here: Mapping[str, str]) -> None:
    """Check that the variables which ``docker_env`` copies are there.

    Raises:
        UsageError: some are not.
    """
    names = [name for name, value in docker.env.environment if value is None] if docker is not None else []
    missing = [name for name in names if name not in here]
    if missing:
        raise UsageError(f"docker_env copies variables that are not set here: {', '.join(missing)}")


def variables(job: Job, tracking_uri: str | None, here: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The plain and the secret variables of a run.

    Args:
        job: of the run.
        tracking_uri: as pods reach it, if that is another one than here.
        here: the variables of this process.

    Raises:
        UsageError: tracking is in a file of this machine.
        SubmitError: a variable has a name that none in a container can have.
    """
    plain, secret = dict(job.environ), dict(job.secrets)
    if job.docker is not None:
        for name, value in job.docker.env.environment:
            if value is not None:
                plain[name] = value
            elif name in here:
                (secret if is_secret_name(name) else plain)[name] = here[name]
    if tracking_uri is not None:
        plain[_URI] = tracking_uri
    check_tracking(plain.get(_URI) or secret.get(_URI) or "")
    for name, value in tuple(plain.items()):
        if name in secret or (name.endswith("_URI") and mask_uri(value) != value):
            secret.setdefault(name, value)
            del plain[name]
    wrong = next((name for name in (*plain, *secret) if not _NAME.fullmatch(name)), None)
    if wrong is not None:
        raise SubmitError(f"{wrong!r} is no name that a variable of a container can have", backend="kubernetes")
    return plain, secret


def check_tracking(uri: str) -> None:
    """Check that pods may reach a tracking server or store.

    Raises:
        UsageError: it is in a file of this machine.
    """
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    if uri and scheme in ("", "file", "sqlite"):
        raise UsageError(
            f"the tracking store {mask_uri(uri)} is on this machine, where no pod reaches it. Start a server"
            " ('mlflow server') that the cluster reaches, and give its address as MLFLOW_TRACKING_URI; or as"
            " tracking-uri in backend_config (or KUBE_MLFLOW_TRACKING_URI) if pods know another one"
        )
    if is_loopback(parts.hostname):
        _log.warning(
            "the tracking server %s is on loopback, which in a pod is the pod itself: give tracking-uri",
            mask_uri(uri),
        )
