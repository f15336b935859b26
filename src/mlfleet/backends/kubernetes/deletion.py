"""Deleting Jobs with all that belongs to them, and what the cluster said of them."""

from __future__ import annotations

from typing import Any

from mlfleet.backends.kubernetes.client import Api, ApiError
from mlfleet.backends.kubernetes.state import read_job

__all__ = ["delete_job", "job_path", "warnings_of"]

_QUOTED = 5


def job_path(namespace: str, name: str = "") -> str:
    """The path of a Job, or of all Jobs of a namespace."""
    return f"/apis/batch/v1/namespaces/{namespace}/jobs" + (f"/{name}" if name else "")


async def delete_job(api: Api, namespace: str, name: str, uid: str, *, patience: float = 90.0) -> bool:
    """Have a Job deleted, and its pods before it. It may take their grace time until they are gone.

    Args:
        api: of the cluster.
        namespace: of the Job.
        name: of the Job.
        uid: of the Job; another one of its name is left alone.
        patience: seconds for which to try again.

    Returns:
        Whether this cut it short: it was there, and had not ended before.

    Raises:
        ApiError: it cannot be deleted.
    """
    # In the body: without it batch/v1 leaves the pods running and only says so in a warning. With "Background" the Job
    # would be gone at once, and nobody could see when its pods are.
    body = {
        "kind": "DeleteOptions",
        "apiVersion": "v1",
        "propagationPolicy": "Foreground",
        "preconditions": {"uid": uid},
    }
    try:
        answer = await api.call("deleting a Job", "DELETE", job_path(namespace, name), body=body, patience=patience)
    except ApiError as error:
        if error.status in (404, 409):  # gone, or another one has its name
            return False
        raise
    if answer.get("kind") != "Job":
        return True
    return not read_job(answer).ended


async def warnings_of(api: Api, namespace: str, name: str) -> list[str]:
    """The last warnings that the cluster gave about a pod or a Job, newest last; empty if they cannot be had."""
    params = {"fieldSelector": f"involvedObject.name={name}"}
    path = f"/api/v1/namespaces/{namespace}/events"
    try:
        answer = await api.call("reading the events of a pod", "GET", path, params=params, patience=5)
    except ApiError:
        return []
    found = [each for each in answer.get("items") or () if each.get("type") != "Normal"]
    found.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
    return [_line(event) for event in found[-_QUOTED:]]


def _line(event: dict[str, Any]) -> str:
    message = " ".join(str(event.get("message") or "").split())
    return f"{event.get('reason')}: {message[:400]}"
