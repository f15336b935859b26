"""Workspaces of an MLflow server: experiments and runs apart from those of others (MLflow 3.10 and newer)."""

from __future__ import annotations

from mlfleet.errors import TrackingError
from mlfleet.tracking.transport import Transport

__all__ = ["check_workspace"]

# The second is the name that MLflow 3.10 had for it.
_ABOUT_THE_SERVER = ("/api/3.0/mlflow/server-info", "/api/3.0/mlflow/server-features")


async def check_workspace(transport: Transport) -> None:
    """See to it that the server knows workspaces, if one is asked for: others would put the runs among all others'.

    Raises:
        TrackingError: it does not, or cannot be reached.
    """
    if not transport.workspace:
        return
    for path in _ABOUT_THE_SERVER:
        try:
            about = await transport.call("GET", path)
        except TrackingError as error:
            if error.status != 404:
                raise
        else:
            if about.get("workspaces_enabled"):
                return
            break
    raise transport.failures.error(
        f"the workspace {transport.workspace!r} cannot be used: {transport.login.url} has no workspaces; unset "
        "MLFLOW_WORKSPACE, or start the server with --enable-workspaces (MLflow 3.10 or newer)"
    )
