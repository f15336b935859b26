"""The secret variables of runs, in secret scopes of a workspace."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Mapping
from datetime import UTC, datetime

import anyio

from mlfleet._run_log import get_logger
from mlfleet.backends.base import ListedRun
from mlfleet.backends.databricks.client import Workspace, WorkspaceError
from mlfleet.errors import SubmitError

__all__ = ["find_old_secrets", "put_secret", "remove_secret", "secret_key"]

_log = get_logger("mlfleet.databricks")
_CLEANUP = 30.0  # seconds
_OLD = 7 * 86400.0  # seconds after which no process looks after a run that is not active
_KEY = re.compile(r"mlfleet-([0-9a-f]{32})")


def secret_key(run_id: str) -> str:
    """Return the key of a run's secret variables in their scope."""
    return f"mlfleet-{run_id}"


async def put_secret(workspace: Workspace, place: tuple[str, str], variables: Mapping[str, str]) -> None:
    """Put the secret variables of a run into a scope.

    Args:
        workspace: The client of the workspace.
        place: The scope and the key.
        variables: The variables.

    Raises:
        SubmitError: The scope does not exist, or does not take them.
    """
    scope, key = place
    body = {"scope": scope, "key": key, "string_value": json.dumps(dict(variables))}
    try:
        await workspace.call("POST", "/api/2.0/secrets/put", body=body)
    except WorkspaceError as error:
        names = ", ".join(sorted(variables))
        text = f"the secret variables {names} cannot be put into the secret scope {scope!r}: {error}"
        raise SubmitError(text, backend="databricks") from error


async def remove_secret(workspace: Workspace, scope: str, key: str) -> None:
    """Remove the secret variables of a run from a secret scope. A failure is only logged."""
    with anyio.move_on_after(_CLEANUP) as deadline:
        try:
            await workspace.call("POST", "/api/2.0/secrets/delete", body={"scope": scope, "key": key})
        except WorkspaceError as error:
            if not error.missing:
                _log.warning("the secret %s is left behind in the scope %s: %s", key, scope, error)
    if deadline.cancelled_caught:
        _log.warning("the secret %s may be left behind in the scope %s", key, scope)


async def find_old_secrets(workspace: Workspace, active: Collection[str]) -> list[ListedRun]:
    """Return the runs that are not active and whose secret variables have been in a scope for a week.

    Args:
        workspace: The client of the workspace.
        active: The ids of the MLflow runs that are active.

    Returns:
        The runs, with ``secret_scope`` in their details, and the time at which the variables were put there.

    Raises:
        WorkspaceError: The scopes cannot be listed.
    """
    found: list[ListedRun] = []
    scopes = await workspace.call("GET", "/api/2.0/secrets/scopes/list")
    for scope in (str(each["name"]) for each in scopes.get("scopes") or []):
        try:
            keys = await workspace.call("GET", "/api/2.0/secrets/list", params={"scope": scope})
        except WorkspaceError as error:
            _log.debug("the secret scope %s cannot be listed: %s", scope, error)
            continue
        for each in keys.get("secrets") or []:
            match, put_at = _KEY.fullmatch(str(each["key"])), int(each.get("last_updated_timestamp") or 0) / 1000
            if match is not None and match[1] not in active and put_at < time.time() - _OLD:
                found.append(
                    ListedRun(
                        run_id=match[1],
                        backend="databricks",
                        created=datetime.fromtimestamp(put_at, UTC),
                        state="ended",
                        supervised=False,
                        detail={"secret_scope": scope},
                    )
                )
    return found
