"""The process that supervises a detached run, from its start to the import of mlfleet.

Started by `mlfleet._process.detached` as a script of its own, with its connection to that process as standard input. It
forks once, and its parent ends at once: it is not a child of that process, and leaves no zombie in a service that
submits thousands of runs. The first message holds the folders in which the other process finds its modules: mlfleet,
and the plugins that are its backends, are the same here.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import socket
import sys
import traceback


def main() -> None:
    """Leave the process that started this one, then supervise the run that it asks for."""
    if os.fork():
        os._exit(0)
    connection = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    size = int.from_bytes(_receive(connection, 4), "big")
    sys.path[:] = json.loads(_receive(connection, size))
    try:
        supervise = importlib.import_module("mlfleet._detached").supervise
    except BaseException:
        text = pickle.dumps(("failed", traceback.format_exc()))
        connection.sendall(len(text).to_bytes(4, "big") + text)
        raise
    supervise(connection)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:  # the other process is gone, and no run was made
            os._exit(0)
        data += more
    return data


if __name__ == "__main__":
    main()
