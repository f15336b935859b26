"""The containers of runs that an engine has, whoever submitted them."""

from __future__ import annotations

import socket
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from mlfleet._concurrency.threads import FILES
from mlfleet.backends.docker.client import Engine
from mlfleet.backends.docker.output import Custody
from mlfleet.backends.docker.run import remove_container
from mlfleet.backends.docker.watch import DRIVER_LABEL, PROJECT_LABEL, RUN_LABEL

__all__ = ["ContainerEntry", "list_containers", "prune_containers"]


@dataclass(frozen=True, slots=True)
class ContainerEntry:
    """The container of a run.

    Attributes:
        run_id: of the MLflow run.
        name: of the container.
        id: the engine's.
        project: its name.
        image: what it runs.
        state: ``created``, ``running``, ``paused``, ``exited``, …
        created: when.
        supervised: whether a process looks after it; of one that another machine submitted, that is assumed.
    """

    run_id: str
    name: str
    id: str
    project: str
    image: str
    state: str
    created: datetime
    supervised: bool


async def list_containers() -> list[ContainerEntry]:
    """All of them, the newest first.

    Raises:
        BackendError: the engine cannot be asked.
    """
    async with Engine() as engine:
        return await _list(engine)


async def prune_containers(run_ids: Collection[str] = (), *, running: bool = False) -> list[ContainerEntry]:
    """Remove the containers that no process looks after.

    Args:
        run_ids: only those of these runs; empty: all.
        running: also those that still run, which kills them. Without it they are left for `mlfleet.attach`.

    Returns:
        What was removed.

    Raises:
        BackendError: the engine cannot be asked.
    """
    async with Engine() as engine:
        wanted = [entry for entry in await _list(engine) if not run_ids or entry.run_id in run_ids]
        orphans = [entry for entry in wanted if not entry.supervised]
        chosen = [entry for entry in orphans if running or entry.state in ("created", "exited", "dead")]
        for entry in chosen:
            await remove_container(engine, entry.id)
        return chosen


async def _list(engine: Engine) -> list[ContainerEntry]:
    params = {"all": True, "filters": {"label": [RUN_LABEL]}}
    found = await engine.call("asked for its containers", "GET", "containers/json", params=params)
    entries = []
    for item in found:
        run_id = str(item["Labels"][RUN_LABEL])
        entry = ContainerEntry(
            run_id=run_id,
            name=str((item.get("Names") or ["/?"])[0]).removeprefix("/"),
            id=str(item["Id"]),
            project=str(item["Labels"].get(PROJECT_LABEL, "")),
            image=str(item["Image"]),
            state=str(item["State"]),
            created=datetime.fromtimestamp(int(item["Created"]), UTC),
            supervised=await FILES.run(partial(_is_supervised, str(item["Labels"].get(DRIVER_LABEL, "")))),
        )
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry.created, reverse=True)


def _is_supervised(label: str) -> bool:
    host, _, path = label.partition(":")
    # What goes on on another machine cannot be seen from here; nothing of it is removed.
    return host != socket.gethostname() or Custody(Path(path)).is_taken()
