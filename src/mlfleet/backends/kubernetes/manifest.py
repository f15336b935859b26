"""The manifest of a run's Job: template, command, variables, resources. Pure; the template is copied, not changed."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mlfleet._hosts import is_loopback
from mlfleet._run_log import get_logger, warn_once
from mlfleet._text.masking import is_secret_name, mask_uri
from mlfleet.backends.base import DockerRequest, Job
from mlfleet.backends.kubernetes.config import KubernetesConfig
from mlfleet.backends.kubernetes.names import container_name, job_name, label_value
from mlfleet.backends.kubernetes.state import CONTAINER_ANNOTATION, MANAGED_BY, RUN_LABEL, SWEEP_LABEL
from mlfleet.backends.kubernetes.template import choose_container
from mlfleet.errors import UsageError

__all__ = [
    "OWNER",
    "PROJECT_FOLDER",
    "SUBMISSION",
    "Code",
    "check_copied",
    "check_names",
    "check_tracking",
    "escape",
    "grace_of",
    "has_secret",
    "host_volumes",
    "image_of",
    "job_manifest",
    "launch",
    "secret_manifest",
    "variables",
]

_log = get_logger("mlfleet.kubernetes")
SUBMISSION = "mlfleet.submission"
"""The annotation with the id of the attempt that created the Job."""
OWNER = "mlfleet.owner"
"""The annotation with the process that created the Job: ``host:pid``."""
PROJECT = "mlfleet.project"
PROJECT_FOLDER = "/mlflow/projects/code"
"""The folder of the project in the container, as in the reference."""
_TEMPLATE = "the Job's template"
_URI = "MLFLOW_TRACKING_URI"
_NAME = re.compile(r"[A-Za-z_.-][A-Za-z0-9_.-]*")
_SHORT_TTL = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """The parts of a manifest that bring the project's files into the container.

    Attributes:
        image: The image to run.
        init: The init containers.
        volumes: The volumes of the pod.
        mounts: The volume mounts of the run's container.
        folder: The folder of the project in the container; None: the image's working directory.
    """

    image: str
    init: Sequence[Mapping[str, Any]] = ()
    volumes: Sequence[Mapping[str, Any]] = ()
    mounts: Sequence[Mapping[str, Any]] = ()
    folder: str | None = None


def job_manifest(
    job: Job,
    config: KubernetesConfig,
    code: Code,
    plain: Mapping[str, str],
    *,
    secrets: Sequence[str],
    submission: str,
    owner: str | None = None,
) -> dict[str, Any]:
    """Return the manifest of the Job of a run.

    Args:
        job: The job of the run.
        config: The configuration of the backend.
        code: The parts that bring the project there.
        plain: The variables that are not secret.
        secrets: The names of further variables, which are in the run's Secret.
        submission: The id of this attempt.
        owner: The process that makes it; None for a manifest to look at.

    Raises:
        UsageError: The template sets something that the run must set.
    """
    manifest = _copy_template(config)
    template = manifest["spec"]["template"]
    pod, container = template["spec"], choose_container(manifest, _TEMPLATE)
    name = job_name(job.project_name, job.run_id)
    _identify(manifest, job, config, name)
    _metadata(manifest, "annotations")[SUBMISSION] = submission
    if owner is not None:
        _metadata(manifest, "annotations")[OWNER] = owner
    container["name"] = container_name(str(container.get("name", "")), job.project_name)
    _metadata(template, "annotations")[CONTAINER_ANNOTATION] = container["name"]
    container["image"] = code.image
    container["command"] = launch(job.command)
    container.pop("args", None)
    _set_environ(container, plain, secrets, name)
    _set_resources(container, job, config)
    _set_code(pod, container, code)
    volumes, mounts = host_volumes(job.docker.env.volumes if job.docker is not None else ())
    _add(pod, "volumes", [*code.volumes, *volumes], "name")
    _add(container, "volumeMounts", [*code.mounts, *mounts], "mountPath")
    _set_pod(pod, job, config)
    return manifest


def secret_manifest(
    job: Job, config: KubernetesConfig, values: Mapping[str, str], owner: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the manifest of the Secret of a run, which is deleted with its Job at the latest.

    Args:
        job: The job of the run.
        config: The configuration of the backend.
        values: The secret variables.
        owner: The Job as the API server has it; None: it does not exist yet.
    """
    name = job_name(job.project_name, job.run_id)
    metadata: dict[str, Any] = {"name": name, "namespace": config.namespace, "labels": _labels(job)}
    if owner is not None:
        meta = owner["metadata"]
        reference = {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"]}
        metadata["ownerReferences"] = [reference]
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata,
        "type": "Opaque",
        "stringData": dict(values),
    }


def _labels(job: Job) -> dict[str, str]:
    """Return the labels by which the objects of a run, or of a sweep, are found."""
    labels = {MANAGED_BY: "mlfleet", RUN_LABEL: label_value(job.run_id)}
    return labels if job.sweep_id is None else {**labels, SWEEP_LABEL: label_value(job.sweep_id)}


def image_of(docker: DockerRequest | None, config: KubernetesConfig) -> str:
    """Return the image to run or to build on: of the configuration, the project, or the template.

    Raises:
        UsageError: None of them names an image.
    """
    if config.image is not None:
        return config.image
    if docker is not None:
        return docker.env.image
    image = choose_container(config.template, _TEMPLATE).get("image", "") if config.template else ""
    if not image or image.startswith("{"):  # the reference's example has a text in braces there
        raise UsageError(
            "the project names no image: give one as image in backend_config, or as docker_env in its MLproject"
        )
    return image


def grace_of(manifest: Mapping[str, Any]) -> float:
    """Return the seconds between SIGTERM and SIGKILL for the pods of a Job."""
    seconds = manifest["spec"]["template"]["spec"].get("terminationGracePeriodSeconds")
    return 30.0 if seconds is None else float(seconds)


def has_secret(manifest: Mapping[str, Any]) -> bool:
    """Return True if a Job's pods read the Secret of the run, which has the name of the Job."""
    sources = (
        source.get("secretRef") or {}
        for container in manifest["spec"]["template"]["spec"]["containers"]
        for source in container.get("envFrom") or ()
    )
    return any(source.get("name") == manifest["metadata"]["name"] for source in sources)


def host_volumes(volumes: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return volumes and mounts for ``docker_env``'s volumes: folders of the node.

    Raises:
        UsageError: A volume is not an absolute path; only a template can say what it is in a cluster.
    """
    made, mounts = [], []
    for number, text in enumerate(volumes):
        source, _, rest = text.partition(":")
        target, _, options = rest.partition(":")
        if not source.startswith("/") or not target.startswith("/"):
            raise UsageError(
                f"docker_env: the volume {text!r} is not a folder of a node (/source:/target): put a volume of your"
                " cluster (persistentVolumeClaim, nfs, …) and its volumeMounts into the Job's template instead"
            )
        name = f"mlfleet-volume-{number}"
        made.append({"name": name, "hostPath": {"path": source}})
        mount: dict[str, Any] = {"name": name, "mountPath": target}
        if "ro" in options.split(","):
            mount["readOnly"] = True
        mounts.append(mount)
    return made, mounts


# ---- from the template ----------------------------------------------------------------------------------------------


def _copy_template(config: KubernetesConfig) -> dict[str, Any]:
    manifest = copy.deepcopy(dict(config.template)) or {"spec": {"template": {"spec": {"containers": [{}]}}}}
    # In the order that people know.
    manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {}, **manifest}
    manifest.update(apiVersion="batch/v1", kind="Job")
    manifest.pop("status", None)
    return manifest


def _identify(manifest: dict[str, Any], job: Job, config: KubernetesConfig, name: str) -> None:
    manifest["metadata"].update(name=name, namespace=config.namespace)
    manifest["metadata"].pop("generateName", None)
    for holder in (manifest, manifest["spec"]["template"]):
        _metadata(holder, "labels").update(_labels(job))
    _metadata(manifest, "annotations")[PROJECT] = job.project_name
    spec = manifest["spec"]
    spec.setdefault("backoffLimit", 0)
    ttl = spec.setdefault("ttlSecondsAfterFinished", config.ttl)
    if isinstance(ttl, int) and ttl < _SHORT_TTL:
        warn_once(
            _log,
            "the Job's ttlSecondsAfterFinished is %d s: if this process is away for longer, it cannot tell how the run"
            " ended; give 300 or more",
            ttl,
        )


def _metadata(holder: dict[str, Any], key: str) -> dict[str, Any]:
    found: dict[str, Any] = holder.setdefault("metadata", {}).setdefault(key, {})
    return found


def _set_environ(container: dict[str, Any], plain: Mapping[str, str], secrets: Sequence[str], secret: str) -> None:
    given = container.get("env", [])
    clash = sorted({each["name"] for each in given} & {*plain, *secrets})
    if clash:
        raise UsageError(
            f"the Job's template sets {', '.join(clash)}, which the run sets too: remove it from the env of the"
            f" container {container['name']!r} there"
        )
    container["env"] = given + [{"name": name, "value": escape(value)} for name, value in plain.items()]
    if secrets:
        container["envFrom"] = [*container.get("envFrom", ()), {"secretRef": {"name": secret}}]


def _set_code(pod: dict[str, Any], container: dict[str, Any], code: Code) -> None:
    if code.folder is not None:
        if "workingDir" in container:
            raise UsageError("the Job's template sets workingDir, which is the project's folder: remove it there")
        container["workingDir"] = code.folder
    if code.init:
        ours = [{**each, **_inherited(container)} for each in code.init]
        pod["initContainers"] = [*ours, *pod.get("initContainers", ())]


def _inherited(container: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a namespace may demand of every container: a security context, and limits of CPU and memory."""
    made: dict[str, Any] = {}
    if "securityContext" in container:
        made["securityContext"] = copy.deepcopy(container["securityContext"])
    given = container.get("resources", {})
    resources = {
        kind: {name: amount for name, amount in given.get(kind, {}).items() if name in ("cpu", "memory")}
        for kind in ("requests", "limits")
    }
    if any(resources.values()):
        made["resources"] = {kind: amounts for kind, amounts in resources.items() if amounts}
    return made


def _add(holder: dict[str, Any], key: str, more: Sequence[Mapping[str, Any]], by: str) -> None:
    if not more:
        return
    given = holder.get(key, [])
    clash = {each[by] for each in given} & {each[by] for each in more}
    if clash:
        raise UsageError(f"the Job's template has the {by} {sorted(clash)[0]!r} in {key}, which the run needs")
    holder[key] = given + [dict(each) for each in more]


def _set_resources(container: dict[str, Any], job: Job, config: KubernetesConfig) -> None:
    resources: dict[str, Any] = copy.deepcopy(dict(config.resources or container.get("resources", {})))
    if job.resources is not None:
        needed = {"cpu": f"{job.resources.cpus:g}"} if job.resources.cpus else {}
        if job.resources.memory_bytes is not None:
            needed["memory"] = str(job.resources.memory_bytes)
        if job.resources.gpus:
            needed["nvidia.com/gpu"] = str(job.resources.gpus)
        for kind in ("requests", "limits"):
            resources[kind] = {**resources.get(kind, {}), **needed}
    if resources:
        container["resources"] = resources


def _set_pod(pod: dict[str, Any], job: Job, config: KubernetesConfig) -> None:
    pod.setdefault("restartPolicy", "Never")
    # 0 would take the pod off the API server before its processes have ended.
    pod.setdefault("terminationGracePeriodSeconds", max(1, math.ceil(job.cancel_grace)))
    if config.service_account is not None:
        pod["serviceAccountName"] = config.service_account
    if config.node_selector:
        pod["nodeSelector"] = {**pod.get("nodeSelector", {}), **config.node_selector}
    if config.tolerations:
        pod["tolerations"] = [*pod.get("tolerations", ()), *(dict(each) for each in config.tolerations)]
    if config.image_pull_secrets:
        named = [{"name": name} for name in config.image_pull_secrets]
        pod["imagePullSecrets"] = [*pod.get("imagePullSecrets", ()), *named]


# ---- the command ---------------------------------------------------------------------------------------------------

# Process 1 of a container ignores every signal that it has no handler for, so that a Python program there would not
# end by SIGTERM. This shell is process 1 instead: it has a handler, and passes the signal to the command's group.
# stderr goes where stdout does: the runtime reads the two apart, and would lose their order. This shell's own
# messages ("Killed") are dropped. A shell that has reaped its child by itself reports the child's end only to the next
# `wait`; 127 also means that there is no such child.
_SUPERVISE = """\
exec 2>/dev/null
[ -n "$BASH_VERSION" ] && set -m
"$1" -c "$0" </dev/null 2>&1 &
p=$!
trap 'kill -TERM -$p || kill -TERM $p' TERM INT QUIT
while :; do wait $p; c=$?; kill -0 $p || break; done
wait $p; d=$?
[ $d = 127 ] || c=$d
exit $c
"""
# Not every image has bash. The command stays one argument from here to the shell that runs it.
_CHOOSE = 'if command -v bash >/dev/null 2>&1; then exec bash -c "$1" "$0" bash; fi; exec sh -c "$1" "$0" sh'


def launch(command: str) -> list[str]:
    """Return the ``command`` of a container for the project's command."""
    return ["sh", "-c", _ESCAPED[0], escape(command), _ESCAPED[1]]


def escape(text: str) -> str:
    """Escape `text` for Kubernetes, which replaces ``$(NAME)`` by a variable's value and ``$$`` by a dollar sign.

    https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables/
    """
    return text.replace("$", "$$")


_ESCAPED = escape(_CHOOSE), escape(_SUPERVISE)


# ---- variables -----------------------------------------------------------------------------------------------------


def check_copied(docker: DockerRequest | None) -> None:
    """Check that the variables which ``docker_env`` copies are set.

    Raises:
        UsageError: Some are not set.
    """
    if docker is None:
        return
    names = [name for name, value in docker.env.environment if value is None]
    there = {*docker.inherited(), *docker.caller_variables}
    missing = [name for name in names if name not in there]
    if missing:
        raise UsageError(docker.not_set(missing))


def variables(job: Job, tracking_uri: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Return the plain and the secret variables of a run.

    Args:
        job: The job of the run.
        tracking_uri: The address of the tracking server as pods reach it; None: the same as here.

    Raises:
        UsageError: Tracking is in a file of this machine.
        UsageError: The name of a variable is invalid in a container.
    """
    plain, secret = dict(job.environ), dict(job.secrets)
    if job.docker is not None:
        here = job.inherited()
        for name, value in job.docker.env.environment:
            if name in job.docker.caller_variables:
                continue
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
    check_names((*plain, *secret))
    return plain, secret


def check_names(names: Collection[str]) -> None:
    """Check the names of variables.

    Raises:
        UsageError: A container cannot have a variable of that name.
    """
    wrong = next((name for name in names if not _NAME.fullmatch(name)), None)
    if wrong is not None:
        raise UsageError(f"{wrong!r} is not a valid name for a variable of a container")


def check_tracking(uri: str) -> None:
    """Check that pods may reach a tracking server or store.

    Raises:
        UsageError: It is in a file of this machine.
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
