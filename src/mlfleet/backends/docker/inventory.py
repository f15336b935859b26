"""The containers of runs that an engine has, whichever process submitted them."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from mlfleet._concurrency.threads import FILES
from mlfleet.backends.base import ListedRun
from mlfleet.backends.docker.client import Engine
from mlfleet.backends.docker.output import Custody
from mlfleet.backends.docker.run import remove_container
from mlfleet.backends.docker.watch import DRIVER_LABEL, PROJECT_LABEL, RUN_LABEL

__all__ = ["list_containers", "prune_containers"]


async def list_containers(engine: Engine, run_id: str | None = None) -> list[ListedRun]:
    """Return the containers of runs, the newest first.

    Args:
        engine: The engine to ask.
        run_id: The only run to look for; None: all.

    Raises:
        BackendError: The engine cannot be asked.
    """
    return list((await _list(engine, run_id)).values())


async def prune_containers(
    engine: Engine, run_ids: Collection[str], *, running: bool, dry_run: bool
) -> list[ListedRun]:
    """Remove the containers that no process looks after; see `Backend.prune`."""
    chosen = {
        container: run
        for container, run in (await _list(engine)).items()
        if not run.supervised
        and (not run_ids or run.run_id in run_ids)
        and (running or run.state in ("created", "exited", "dead"))
    }
    if not dry_run:
        for container in chosen:
            await remove_container(engine, container)
    return list(chosen.values())


async def _list(engine: Engine, run_id: str | None = None) -> dict[str, ListedRun]:
    """Return the runs by the ids of their containers, the newest first."""
    label = RUN_LABEL if run_id is None else f"{RUN_LABEL}={run_id}"
    params = {"all": True, "filters": {"label": [label]}}
    found = await engine.call("asked for its containers", "GET", "containers/json", params=params)
    newest_first = sorted(found, key=lambda item: int(item["Created"]), reverse=True)
    return {str(item["Id"]): await _listed(item) for item in newest_first}


async def _listed(item: Mapping[str, Any]) -> ListedRun:
    labels = item["Labels"]
    return ListedRun(
        run_id=str(labels[RUN_LABEL]),
        backend="docker",
        created=datetime.fromtimestamp(int(item["Created"]), UTC),
        state=str(item["State"]),
        supervised=await FILES.run(partial(_is_supervised, str(labels.get(DRIVER_LABEL, "")))),
        detail={
            "project": str(labels.get(PROJECT_LABEL, "")),
            "image": str(item["Image"]),
            "container": str((item.get("Names") or ["/?"])[0]).removeprefix("/"),
        },
    )


def _is_supervised(label: str) -> bool:
    host, _, path = label.partition(":")
    # Processes of another machine cannot be seen from here: its containers count as supervised.
    return host != socket.gethostname() or Custody(Path(path)).is_taken()
