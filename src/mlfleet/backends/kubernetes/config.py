"""The ``backend_config`` of the Kubernetes backend, checked before anything exists."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from mlfleet._oci.references import parse_reference
from mlfleet._text.documents import nearest, read_yaml
from mlfleet.backends.kubernetes.diagnosis import PendingKind
from mlfleet.backends.kubernetes.login import Cluster, find_cluster
from mlfleet.backends.kubernetes.names import NAME
from mlfleet.backends.kubernetes.template import Checked, check_template, choose_container
from mlfleet.errors import UsageError

__all__ = ["CodeDelivery", "KubernetesConfig", "StartTimeouts", "parse_config"]

GIT_IMAGE = "alpine/git:latest"
_CHECKED = Checked("backend_config")
_DAY = 24 * 3600
_PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9]+(/[a-z0-9]+)?")


class CodeDelivery(StrEnum):
    """The ways in which the project's files get into the container."""

    IMAGE = "image"
    NONE = "none"
    CONFIGMAP = "configmap"
    GIT = "git"

    @property
    def brings_folder(self) -> bool:
        """True if the files come into a folder that is not in the image."""
        return self in (CodeDelivery.CONFIGMAP, CodeDelivery.GIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTimeouts:
    """Seconds for which a reason may keep a run from starting; None: without limit.

    Attributes:
        image: Seconds for an image that cannot be pulled.
        config: Seconds for a container that cannot be made: an invalid image name, a missing Secret.
        unschedulable: Seconds for a pod that no node takes. Without limit by default, for those who wait for GPUs.
    """

    image: float | None = 300.0
    config: float | None = 60.0
    unschedulable: float | None = None

    def of(self, kind: PendingKind) -> float | None:
        """Return the limit for a kind of reason."""
        return cast("float | None", getattr(self, kind.value))


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesConfig:
    """The checked ``backend_config``.

    Attributes:
        cluster: The cluster, from ``kube-context``.
        namespace: The namespace of the Jobs.
        repository_uri: The repository to push images with the project to.
        image: The image to run, instead of the one in the project's ``docker_env``.
        delivery: The way in which the project's files get there.
        template: The template of the Job; never changed.
        tracking_uri: The address of the tracking server as pods reach it; None: the same as here.
        resources: The resources of the run's container, as Kubernetes writes them.
        service_account: The service account of the pods.
        node_selector: The node selector of the pods.
        tolerations: The tolerations of the pods.
        image_pull_secrets: The names of the Secrets for pulling images.
        ttl: Seconds for which a Job stays after its end.
        timeouts: Limits for the reasons that keep a run from starting.
        keep_jobs: True if a Job stays for its TTL; False deletes it when its end is known.
        builder: The builder of the image: ``registry`` (needs no Docker) or ``docker``.
        platform: The platform of the image, where the base has several: ``linux/amd64``.
        git_image: An image with git, for ``code-delivery: git``.
        git_secret: A Secret with ``username`` and ``password``, or ``ssh-privatekey``, for the Git host.
    """

    cluster: Cluster
    namespace: str
    repository_uri: str | None = None
    image: str | None = None
    delivery: CodeDelivery = CodeDelivery.IMAGE
    template: Mapping[str, Any] = field(default_factory=dict)
    tracking_uri: str | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    service_account: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Mapping[str, Any]] = ()
    image_pull_secrets: Sequence[str] = ()
    ttl: int = _DAY
    timeouts: StartTimeouts = field(default_factory=StartTimeouts)
    keep_jobs: bool = True
    builder: str = "registry"
    platform: str = "linux/amd64"
    git_image: str = GIT_IMAGE
    git_secret: str | None = None


_KEYS = (
    "kube-context", "repository-uri", "kube-job-template-path", "namespace", "image", "code-delivery", "job-template",
    "tracking-uri", "resources", "service-account", "node-selector", "tolerations", "image-pull-secrets", "ttl-seconds",
    "start-timeout", "keep-jobs", "builder", "platform", "git-image", "git-secret",
)  # fmt: skip


def parse_config(config: Mapping[str, Any], environ: Mapping[str, str]) -> KubernetesConfig:
    """Check ``backend_config``. Blocking: reads the template and the kubeconfig.

    Args:
        config: The caller's ``backend_config``; not changed.
        environ: The variables, such as ``KUBECONFIG`` and ``KUBE_MLFLOW_TRACKING_URI``.

    Raises:
        UsageError: A value is wrong; the text names the key.
        SpecError: The template's file is missing or malformed.
    """
    unknown = sorted(str(key) for key in config if key not in _KEYS)
    if unknown:
        hint = nearest(unknown[0], _KEYS)
        raise UsageError(f"backend_config has the unknown key {unknown[0]!r}{hint}. It takes {', '.join(_KEYS)}")
    read = _Reader(config)
    delivery = _delivery(read)
    template = _template(read)
    if "workingDir" in (choose_container(template, "") if template else {}) and delivery.brings_folder:
        raise UsageError(
            "the Job's template sets workingDir in the run's container, which starts in the project's folder: remove it"
            " there, or give code-delivery: 'none'"
        )
    cluster = find_cluster(read.text("kube-context"), environ)
    namespace = read.text("namespace") or template.get("metadata", {}).get("namespace") or cluster.namespace
    if not NAME.fullmatch(namespace):
        raise UsageError(f"backend_config: {namespace!r} is not the name of a namespace")
    builder = read.text("builder") or "registry"
    if builder not in ("registry", "docker"):
        raise UsageError(f"backend_config: builder is {builder!r}: give 'registry' (needs no Docker) or 'docker'")
    platform = read.text("platform") or "linux/amd64"
    if not _PLATFORM.fullmatch(platform):
        raise UsageError(f"backend_config: platform is {platform!r}: give something like 'linux/amd64'")
    return KubernetesConfig(
        cluster=cluster,
        namespace=namespace,
        repository_uri=read.text("repository-uri"),
        image=read.text("image"),
        delivery=delivery,
        template=template,
        tracking_uri=read.text("tracking-uri") or environ.get("KUBE_MLFLOW_TRACKING_URI") or None,
        resources=_resources(read.mapping("resources")),
        service_account=read.text("service-account"),
        node_selector=_node_selector(read.mapping("node-selector")),
        tolerations=_CHECKED.read(read.sequence("tolerations"), "list[V1Toleration]", "tolerations"),
        image_pull_secrets=_CHECKED.read(read.sequence("image-pull-secrets"), "list[str]", "image-pull-secrets"),
        ttl=read.whole("ttl-seconds", _DAY),
        timeouts=_timeouts(config.get("start-timeout")),
        keep_jobs=read.boolean("keep-jobs", default=True),
        builder=builder,
        platform=platform,
        git_image=read.text("git-image") or GIT_IMAGE,
        git_secret=read.text("git-secret"),
    )


class _Reader:
    """Reads the values of a mapping, with errors that name the key."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def text(self, key: str) -> str | None:
        value = self._config.get(key)
        if value is None or value == "":
            return None
        if not isinstance(value, str | os.PathLike):
            raise self.wrong(key, "a text")
        return os.fspath(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self._config.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.wrong(key, "a mapping")
        return value

    def sequence(self, key: str) -> Sequence[Any]:
        value = self._config.get(key)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            raise self.wrong(key, "a list")
        return value

    def whole(self, key: str, default: int) -> int:
        value = self._config.get(key)
        if value is None:
            return default
        if type(value) is not int or value < 0:
            raise self.wrong(key, "a whole number of seconds that is not negative")
        return value

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self._config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def wrong(self, key: str, expected: str) -> UsageError:
        return UsageError(f"backend_config: {key} is {self._config[key]!r}: give {expected}")


def _node_selector(given: Mapping[str, Any]) -> Mapping[str, str]:
    """Return a node selector, in which numbers and true may stand without quotes."""
    plain = {
        key: str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value
        for key, value in given.items()
    }
    return cast("Mapping[str, str]", _CHECKED.read(plain, "dict(str, label)", "node-selector"))


def _delivery(read: _Reader) -> CodeDelivery:
    given = read.text("code-delivery") or CodeDelivery.IMAGE.value
    try:
        delivery = CodeDelivery(given)
    except ValueError:
        known = ", ".join(repr(each.value) for each in CodeDelivery)
        raise UsageError(f"backend_config: code-delivery is {given!r}: give one of {known}") from None
    repository = read.text("repository-uri")
    if delivery is CodeDelivery.IMAGE and repository is None:
        raise UsageError(
            "backend_config: repository-uri is missing: an image with the project is pushed there. Without a registry,"
            " give code-delivery: 'configmap' (small projects), 'git', or 'none' if the image holds the code already"
        )
    if repository is not None:
        try:
            parse_reference(repository)
        except UsageError as error:
            raise UsageError(f"backend_config: repository-uri: {error}") from error
    return delivery


def _template(read: _Reader) -> Mapping[str, Any]:
    path, inline = read.text("kube-job-template-path"), read.mapping("job-template")
    if path is not None and inline:
        raise UsageError("backend_config: both kube-job-template-path and job-template are given: give one of them")
    if path is not None:
        return check_template(read_yaml(Path(path)).plain(), path)
    return check_template(inline, "backend_config: job-template") if inline else {}


def _resources(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return resources as Kubernetes has them; ``{"cpu": 2, "nvidia.com/gpu": 1}`` becomes requests and limits."""
    if not given:
        return {}
    if set(given) <= {"requests", "limits", "claims"}:
        return cast("Mapping[str, Any]", _CHECKED.read(given, "V1ResourceRequirements", "resources"))
    if {"requests", "limits"} & set(given):
        raise UsageError("backend_config: resources has requests or limits, and other keys beside them")
    amounts = _CHECKED.read(given, "dict(str, quantity)", "resources")
    flat = {name: str(amount) for name, amount in amounts.items()}
    return {"requests": dict(flat), "limits": dict(flat)}


def _timeouts(given: Any) -> StartTimeouts:
    names = ("image", "config", "unschedulable")
    if given is None:
        return StartTimeouts()
    values = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
    for name, seconds in values.items():
        if name not in names:
            raise UsageError(f"backend_config: start-timeout has {name!r}: it takes {', '.join(names)}")
        if seconds is not None and (type(seconds) not in (int, float) or not 0 <= seconds < float("inf")):
            raise UsageError(f"backend_config: start-timeout is {given!r}: give seconds, or null for no limit")
    return StartTimeouts(**values)
