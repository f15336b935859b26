"""A part of MLflow's API on a scripted server, with a fault of the network or the server for chosen requests."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fakes.scripted_server import Peer, Request

__all__ = ["Fault", "SmallMlflow", "answering", "cut", "doubled", "lost", "reset", "response", "sending"]

Fault = Callable[[Peer, bytes], Awaitable[bool]]
"""Sends something in place of the right answer; returns True if the connection is still of use."""


class SmallMlflow:
    """Creates, finds and updates runs. `script` serves one connection.

    Args:
        faults: The name of a request (``create``) and the faults of its first answers, in order. Faults happen after
            the server has done what was asked.

    Attributes:
        runs: Run id → run, in MLflow's JSON.
        requests: The names of all requests, in order.
    """

    def __init__(self, faults: Mapping[str, list[Fault]] | None = None) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        # Processes of a run are found by its id: another test must not have the same.
        self._name = uuid.uuid4().hex
        self._faults = {name: list(some) for name, some in (faults or {}).items()}

    async def script(self, peer: Peer) -> None:
        """Serve a connection until the client closes it."""
        while True:
            request = await peer.request()
            name = urlsplit(request.first.split()[1]).path.rpartition("/")[2]
            self.requests.append(name)
            body = self._answer(name, request)
            answer = response(body, "404 Not Found" if "error_code" in body else "200 OK")
            faults = self._faults.get(name)
            if not faults:
                await peer.send(answer)
            elif not await faults.pop(0)(peer, answer):
                return

    def add_run(self, run_id: str = "r1") -> None:
        """Add a run that a client can read and update."""
        info = {"run_id": run_id, "experiment_id": "0", "status": "RUNNING", "lifecycle_stage": "active"}
        self.runs[run_id] = {"info": info, "data": {"tags": []}}

    @property
    def statuses(self) -> list[str]:
        """The statuses of all runs."""
        return [run["info"]["status"] for run in self.runs.values()]

    def _answer(self, name: str, request: Request) -> dict[str, Any]:
        body = json.loads(request.body or b"{}")
        if name == "create":
            run_id = f"run{len(self.runs) + 1}-{self._name}"
            self.add_run(run_id)
            self.runs[run_id]["data"]["tags"] = body["tags"]
            return {"run": self.runs[run_id]}
        if name == "search":
            wanted = body["filter"].split("'")[1]
            pattern = re.compile(re.escape(wanted).replace("%", ".*"))
            found = [run for run in self.runs.values() if any(map(pattern.fullmatch, _values(run)))]
            return {"runs": found}
        if name == "get":
            run_id = parse_qs(urlsplit(request.first.split()[1]).query)["run_id"][0]
            if run_id not in self.runs:
                return {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"Run with id={run_id} not found"}
            return {"run": self.runs[run_id]}
        if name == "update":
            info = self.runs[body["run_id"]]["info"]
            info |= {key: value for key, value in body.items() if key != "run_id"}
            return {"run_info": info}
        if name == "log-batch":
            run = self.runs[body["run_id"]]["data"]
            new = {tag["key"]: tag for tag in [*run["tags"], *body.get("tags", [])]}
            run["tags"] = list(new.values())
        if name == "delete":
            del self.runs[body["run_id"]]
        return {}


def _values(run: Mapping[str, Any]) -> list[str]:
    """Return the values of a run's tags."""
    return [tag["value"] for tag in run["data"]["tags"]]


def response(body: object, status: str = "200 OK", **headers: str) -> bytes:
    """Return an answer; a body that is not bytes is sent as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


async def lost(peer: Peer, answer: bytes) -> bool:
    """Close the connection without an answer."""
    return False


async def reset(peer: Peer, answer: bytes) -> bool:
    """Reset the connection in the middle of the answer."""
    await peer.send(answer[: len(answer) // 2])
    with socket.socket(fileno=os.dup(peer.writer.get_extra_info("socket").fileno())) as connection:
        peer.writer.transport.abort()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


async def doubled(peer: Peer, answer: bytes) -> bool:
    """Send the answer twice at once."""
    await peer.send(answer + answer)
    return True


def cut(rest: int) -> Fault:
    """Leave out the last bytes of the answer, then close."""

    async def fault(peer: Peer, answer: bytes) -> bool:
        await peer.send(answer[:-rest])
        return False

    return fault


def answering(answer: bytes) -> Fault:
    """Send another answer in place of the right one."""

    async def fault(peer: Peer, right: bytes) -> bool:
        await peer.send(answer)
        return True

    return fault


def sending(*pieces: bytes) -> Fault:
    """Send something else, then close."""

    async def fault(peer: Peer, answer: bytes) -> bool:
        await peer.send(*pieces)
        return False

    return fault
