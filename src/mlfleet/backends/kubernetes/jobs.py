"""Requests about the Job of one run: to create it, to find it again, to delete it, and to read what was said of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlfleet._run_log import get_logger, warn_once
from mlfleet.backends.kubernetes.client import RETRIES, ApiError, KubernetesClient
from mlfleet.backends.kubernetes.diagnosis import decided_outcome, straggling_pod
from mlfleet.backends.kubernetes.manifest import SUBMISSION
from mlfleet.backends.kubernetes.names import label_value
from mlfleet.backends.kubernetes.state import RUN_LABEL, PodState, Snapshot, job_of_pod, read_job, read_pod
from mlfleet.errors import RunLost, SubmitError

__all__ = [
    "create_job",
    "create_secret",
    "delete_job",
    "delete_pod",
    "delete_secret",
    "find_job",
    "has_ended",
    "job_path",
    "list_pods",
    "warnings_of",
]

_log = get_logger("mlfleet.kubernetes")
_QUOTED = 5  # events
_CLEANING = 20.0  # seconds in which the deletion of a Secret may be repeated


def job_path(namespace: str, name: str = "") -> str:
    """Return the path of a Job, or of all Jobs of a namespace."""
    return f"/apis/batch/v1/namespaces/{namespace}/jobs" + (f"/{name}" if name else "")


async def create_job(
    client: KubernetesClient, namespace: str, manifest: Mapping[str, Any], run_id: str
) -> dict[str, Any]:
    """Create the Job of a run, or adopt the one that an earlier attempt has created.

    A request without an answer is repeated; the name tells whether the first one had succeeded.

    Args:
        client: The client of the cluster.
        namespace: The namespace of the Job.
        manifest: The manifest of the Job.
        run_id: The id of the MLflow run.

    Returns:
        The Job as the API server has it.

    Raises:
        SubmitError: The server refused it; the text says why.
    """
    name = manifest["metadata"]["name"]
    while True:
        try:
            return await client.call("creating a Job", "POST", job_path(namespace), body=manifest)
        except ApiError as error:
            if error.status != 409:
                raise _refusal(error, namespace) from error
        try:
            found = await client.call("looking for a Job", "GET", job_path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                continue  # deleted between the two requests
            raise
        return _adopt(found, manifest, run_id)


def _adopt(found: dict[str, Any], manifest: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    meta = found["metadata"]
    name = meta["name"]
    if (meta.get("labels") or {}).get(RUN_LABEL) != label_value(run_id):
        raise SubmitError(f"a Job {name} exists already and does not belong to this run", backend="kubernetes")
    if "deletionTimestamp" in meta:
        raise SubmitError(
            f"the Job {name} of an earlier attempt at this run is being deleted: try again when it is gone",
            backend="kubernetes",
        )
    mine = manifest["metadata"]["annotations"][SUBMISSION]
    if (meta.get("annotations") or {}).get(SUBMISSION) != mine:
        ended = (
            "has ended: its result is taken. To run it again, delete the Job" if read_job(found).ended else "is there"
        )
        _log.warning("the Job %s of this run, that an earlier process created, %s", name, ended)
    return found


async def create_secret(client: KubernetesClient, namespace: str, manifest: Mapping[str, Any]) -> None:
    """Create the Secret of a run, unless the Job that was adopted has one.

    Raises:
        SubmitError: The server refused it.
    """
    try:
        await client.call("creating a Secret", "POST", f"/api/v1/namespaces/{namespace}/secrets", body=manifest)
    except ApiError as error:
        if error.status == 409:
            return
        raise _refusal(error, namespace) from error


async def find_job(client: KubernetesClient, namespace: str, name: str, run_id: str) -> dict[str, Any]:
    """Return the Job that an earlier process created.

    Raises:
        RunLost: It does not exist any more.
    """
    try:
        found = await client.call("looking for a Job", "GET", job_path(namespace, name))
    except ApiError as error:
        if error.status != 404:
            raise
        where = f"the namespace {namespace} of {client.cluster.context}"
        text = f"the Job {name} of the run {run_id} is not in {where} any more"
        raise RunLost(text, backend="kubernetes") from error
    if (found["metadata"].get("labels") or {}).get(RUN_LABEL) != label_value(run_id):
        raise RunLost(f"the Job {name} does not belong to the run {run_id}", backend="kubernetes")
    return found


async def has_ended(client: KubernetesClient, found: Mapping[str, Any]) -> bool:
    """Return True if a Job has ended, or its command has and only other containers go on.

    Args:
        client: The client of the cluster.
        found: The Job as the API server has it.

    Raises:
        ApiError: Its pods cannot be listed.
    """
    job = read_job(found)
    if job.ended:
        return True
    pods = await list_pods(client, found["metadata"]["namespace"], job.name, job.uid)
    snapshot = Snapshot(job, pods)
    return straggling_pod(snapshot) is not None and decided_outcome(snapshot) is not None


async def list_pods(client: KubernetesClient, namespace: str, name: str, uid: str) -> tuple[PodState, ...]:
    """Return the pods of a Job in the order of their creation.

    Args:
        client: The client of the cluster.
        namespace: The namespace of the Job.
        name: The name of the Job.
        uid: The uid of the Job.

    Raises:
        ApiError: They cannot be listed.
    """
    answer = await client.call(
        "looking for the pods of a Job",
        "GET",
        f"/api/v1/namespaces/{namespace}/pods",
        # The label without a prefix is that of all versions; the other one is new in 1.27.
        params={"labelSelector": f"job-name={name}"},
        seconds=10,
    )
    pods = [read_pod(raw) for raw in answer.get("items") or () if job_of_pod(raw) == uid]
    return tuple(sorted(pods, key=lambda pod: (pod.created, pod.name)))


async def delete_job(
    client: KubernetesClient, namespace: str, name: str, uid: str, *, seconds: float = RETRIES.seconds
) -> bool:
    """Ask for the deletion of a Job, after that of its pods. It may take their grace time until they are gone.

    Args:
        client: The client of the cluster.
        namespace: The namespace of the Job.
        name: The name of the Job.
        uid: The uid of the Job; another one with the same name is left alone.
        seconds: The time in which the request may be repeated.

    Returns:
        True if this cut the Job short: it existed and had not ended before.

    Raises:
        ApiError: It cannot be deleted.
    """
    # In the body: without it batch/v1 leaves the pods running and only says so in a warning. With "Background" the Job
    # would be gone at once, and the end of its pods could not be seen.
    body = {
        "kind": "DeleteOptions",
        "apiVersion": "v1",
        "propagationPolicy": "Foreground",
        "preconditions": {"uid": uid},
    }
    try:
        answer = await client.call("deleting a Job", "DELETE", job_path(namespace, name), body=body, seconds=seconds)
    except ApiError as error:
        if error.status in (404, 409):  # gone, or another Job has its name
            return False
        raise
    if answer.get("kind") != "Job":
        return True
    return not read_job(answer).ended


async def delete_pod(
    client: KubernetesClient, namespace: str, name: str, uid: str, *, grace: float | None = None
) -> None:
    """Ask for the deletion of a pod, unless it is gone.

    Args:
        client: The client of the cluster.
        namespace: The namespace of the pod.
        name: The name of the pod.
        uid: The uid of the pod; another one with the same name is left alone.
        grace: Seconds between SIGTERM and SIGKILL; None: as the pod has it.

    Raises:
        ApiError: It cannot be deleted.
    """
    body: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": uid}}
    if grace is not None:
        body["gracePeriodSeconds"] = max(1, round(grace))
    try:
        await client.call("ending a pod", "DELETE", f"/api/v1/namespaces/{namespace}/pods/{name}", body=body)
    except ApiError as error:
        if error.status not in (404, 409):
            raise


async def delete_secret(client: KubernetesClient, namespace: str, name: str) -> None:
    """Delete the Secret of a run that has ended. If that fails it stays as long as the Job, and a warning says so."""
    path = f"/api/v1/namespaces/{namespace}/secrets/{name}"
    try:
        await client.call("deleting a Secret", "DELETE", path, seconds=_CLEANING)
    except ApiError as error:
        if error.status == 403:
            warn_once(
                _log,
                "the Secrets of runs in the namespace %s stay as long as their Jobs: mlfleet may not delete them. Give"
                " it the verb 'delete' for secrets, as in the Role of docs/backends/kubernetes.md",
                namespace,
            )
        elif error.status != 404:
            _log.warning("the Secret %s stays as long as its Job: %s", name, error)


async def warnings_of(client: KubernetesClient, namespace: str, name: str) -> list[str]:
    """Return the last warnings that the cluster gave about a pod or a Job, newest last; none if they cannot be read."""
    params = {"fieldSelector": f"involvedObject.name={name}"}
    path = f"/api/v1/namespaces/{namespace}/events"
    try:
        answer = await client.call("reading the events of a pod", "GET", path, params=params, seconds=5)
    except ApiError:
        return []
    found = [each for each in answer.get("items") or () if each.get("type") != "Normal"]
    found.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
    return [_line(event) for event in found[-_QUOTED:]]


def _line(event: dict[str, Any]) -> str:
    message = " ".join(str(event.get("message") or "").split())
    return f"{event.get('reason')}: {message[:400]}"


def _refusal(error: ApiError, namespace: str) -> SubmitError:
    if error.status == 404:
        text = f"there is no namespace {namespace}: {error.detail}. Create it, or give another in backend_config"
        return SubmitError(text, backend="kubernetes")
    return SubmitError(str(error), backend="kubernetes")
