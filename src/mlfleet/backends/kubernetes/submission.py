"""Creating the Job of a run, or finding the one that is there already."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mlfleet.backends.kubernetes.client import Api, ApiError
from mlfleet.backends.kubernetes.deletion import job_path
from mlfleet.backends.kubernetes.manifest import SUBMISSION
from mlfleet.backends.kubernetes.names import label_value
from mlfleet.backends.kubernetes.state import RUN_LABEL, read_job
from mlfleet.errors import RunLost, SubmitError

__all__ = ["create_job", "create_secret", "find_job"]

_log = logging.getLogger("mlfleet.kubernetes")


async def create_job(api: Api, namespace: str, manifest: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    """Create a Job, unless that of the same run is there: then that one is the run's.

    An answer that did not come is asked for again; the name tells whether the first request had succeeded.

    Args:
        api: of the cluster.
        namespace: of the Job.
        manifest: of the Job.
        run_id: of the MLflow run.

    Returns:
        The Job as the API server has it.

    Raises:
        SubmitError: it was refused; the text says why.
    """
    name = manifest["metadata"]["name"]
    while True:
        try:
            return await api.call("creating a Job", "POST", job_path(namespace), body=manifest)
        except ApiError as error:
            if error.status != 409:
                raise _refusal(error, namespace) from error
        try:
            found = await api.call("looking for a Job", "GET", job_path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                continue  # deleted between the two requests
            raise
        return _adopt(found, manifest, run_id)


def _adopt(found: dict[str, Any], manifest: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    meta = found["metadata"]
    name = meta["name"]
    if (meta.get("labels") or {}).get(RUN_LABEL) != label_value(run_id):
        raise SubmitError(f"there is a Job {name} already that is not of this run", backend="kubernetes")
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


async def create_secret(api: Api, namespace: str, manifest: Mapping[str, Any]) -> None:
    """Create the Secret of a run.

    Raises:
        SubmitError: it was refused.
    """
    try:
        await api.call("creating a Secret", "POST", f"/api/v1/namespaces/{namespace}/secrets", body=manifest)
    except ApiError as error:
        if error.status == 409:  # of the Job that was found
            return
        raise _refusal(error, namespace) from error


async def find_job(api: Api, namespace: str, name: str, run_id: str) -> dict[str, Any]:
    """The Job that an earlier process created.

    Raises:
        RunLost: it is not there.
    """
    try:
        found = await api.call("looking for a Job", "GET", job_path(namespace, name))
    except ApiError as error:
        if error.status != 404:
            raise
        where = f"the namespace {namespace} of {api.cluster.context}"
        text = f"the Job {name} of the run {run_id} is not in {where} any more"
        raise RunLost(text, backend="kubernetes") from error
    if (found["metadata"].get("labels") or {}).get(RUN_LABEL) != label_value(run_id):
        raise RunLost(f"the Job {name} is not that of the run {run_id}", backend="kubernetes")
    return found


def _refusal(error: ApiError, namespace: str) -> SubmitError:
    if error.status == 404:
        text = f"there is no namespace {namespace}: {error.detail}. Create it, or give another in backend_config"
        return SubmitError(text, backend="kubernetes")
    return SubmitError(str(error), backend="kubernetes")
