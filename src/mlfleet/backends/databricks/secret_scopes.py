"""The secret variables of runs, in secret scopes of a workspace."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import anyio

from mlfleet._run_log import get_logger
from mlfleet.backends.databricks.client import Workspace, WorkspaceError
from mlfleet.errors import SubmitError

__all__ = ["OldSecret", "find_old_secrets", "put_secret", "remove_secret", "secret_key"]

_log = get_logger("mlfleet.databricks")
_CLEANUP = 30.0  # seconds
_OLD = 7 * 86400.0  # seconds after which no process looks after a run that is not active
_KEY = re.compile(r"mlfleet-([0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class OldSecret:
    """The secret variables of a run that ended long ago.

    Attributes:
        scope: The secret scope.
        run_id: The id of the MLflow run.
        created: The time at which they were put there.
    """

    scope: str
    run_id: str
    created: datetime


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


async def find_old_secrets(workspace: Workspace, active: Collection[str]) -> list[OldSecret]:
    """Return the secret variables that have been in a scope for a week, of runs that are not active.

    Args:
        workspace: The client of the workspace.
        active: The ids of the MLflow runs that are active.

    Raises:
        WorkspaceError: The scopes cannot be listed.
    """
    found: list[OldSecret] = []
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
                found.append(OldSecret(scope, match[1], datetime.fromtimestamp(put_at, UTC)))
    return found
