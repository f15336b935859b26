"""The process that supervises a run elsewhere, as the run's reference names it."""

from __future__ import annotations

import os
import re
from typing import Any

from mlfleet._process.reattach import Identity, identify, machine, pid_namespace

__all__ = ["describe_this_process", "owner_lives", "owner_text"]


def describe_this_process() -> dict[str, Any]:
    """Return the facts by which `owner_lives` knows this process, for a reference. Blocking."""
    me = identify(os.getpid())
    return {
        "host": machine(),
        "pid_namespace": pid_namespace(),
        "pid": os.getpid(),
        "started": None if me is None else me.started,
    }


def owner_text() -> str:
    """Return the text ``host:pid`` of this process, for where a backend keeps short texts only."""
    return f"{machine()}:{os.getpid()}"


def owner_lives(owner: object) -> bool | None:
    """Return True if the process that submitted a run lives, False if it has died. Blocking.

    Args:
        owner: The facts in the run's reference, which anybody who may write tags can have changed; or an `owner_text`,
            which cannot tell a process from a later one with its pid.

    Returns:
        None if the process cannot be seen from here, since it is or was on another machine, or in another container.
    """
    if isinstance(owner, str):
        host, _, number = owner.rpartition(":")
        if host != machine() or not re.fullmatch(r"[0-9]{1,9}", number):
            return None
        return identify(int(number)) is not None
    if not isinstance(owner, dict) or owner.get("host") != machine() or owner.get("pid_namespace") != pid_namespace():
        return None
    pid, started = owner.get("pid"), owner.get("started")
    if not isinstance(pid, int) or not isinstance(started, int | float):
        return None
    return Identity(pid, started).is_alive()
