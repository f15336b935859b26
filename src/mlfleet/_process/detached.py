"""The start of a process that outlives this one, and the messages between the two.

Messages go over a pair of sockets, so that secrets appear neither in arguments nor in files. Both ends run the same
version of mlfleet as the same user: a message is a pickled tuple, and is believed.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from mlfleet._concurrency.threads import PROCESSES
from mlfleet._process.guardian import MARKER_VARIABLE, RUN_VARIABLE, find_python

__all__ = ["Connection"]

_SCRIPT = Path(__file__).with_name("detached_main.py")
_SIZE = 4  # bytes before each message that hold its length
_CLOSE_TIMEOUT = 5.0  # seconds
_FULL = 2**20  # bytes that wait to be sent from which on messages that can be missed are dropped


class Connection:
    """One end of the connection between a process and the one that supervises its detached run.

    Args:
        reader: Reads from the other process.
        writer: Writes to it.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._size: int | None = None
        self.is_open = True

    @classmethod
    async def start(cls) -> Self:
        """Start a process that outlives this one, and connect to it. A cancelled call leaves no process.

        Raises:
            OSError: It cannot be started.
        """

        async def close(end: socket.socket) -> None:
            end.close()

        return await cls.of(await PROCESSES.run(_spawn, undo=close))

    @classmethod
    async def of(cls, end: socket.socket) -> Self:
        """Take over one end of a connection."""
        try:
            return cls(*await asyncio.open_unix_connection(sock=end))
        except BaseException:
            end.close()
            raise

    def send(self, *message: object, droppable: bool = False) -> None:
        """Send a message, without waiting. Nothing happens if the other process is gone.

        Args:
            message: The word that says what it is, and its data.
            droppable: Drop the message if the other process does not read.

        Raises:
            Exception: The message cannot be pickled.
        """
        if not self.is_open or self._writer.is_closing():
            return
        if droppable and self._writer.transport.get_write_buffer_size() > _FULL:
            return
        self._writer.write(_framed(pickle.dumps(message)))

    async def receive(self) -> tuple[Any, ...] | None:
        """Wait for the next message. A cancelled call loses nothing.

        Returns:
            The message; None if the other process is gone.
        """
        try:
            if self._size is None:
                self._size = int.from_bytes(await self._reader.readexactly(_SIZE), "big")
            data = await self._reader.readexactly(self._size)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.is_open = False
            return None
        self._size = None
        message: tuple[Any, ...] = pickle.loads(data)  # noqa: S301 - see above
        return message

    async def close(self) -> None:
        """Send what is left, and close. What the other process does not read in some seconds is dropped."""
        self.is_open = False
        self._writer.close()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self._writer.wait_closed()
        except TimeoutError:
            self._writer.transport.abort()
        except ConnectionError:
            return


def _spawn() -> socket.socket:
    """Start the process, and return this end of the connection to it. Blocking."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            environ = os.environ.copy()
            # This process may be a run of another driver itself, at whose end the new process goes on.
            for name in (MARKER_VARIABLE, RUN_VARIABLE):
                environ.pop(name, None)
            starter = subprocess.Popen(
                [find_python(_SCRIPT), "-P", str(_SCRIPT)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environ,
                start_new_session=True,
            )
        starter.wait()  # until it has forked
        ours.sendall(_framed(json.dumps([str(folder) for folder in sys.path]).encode()))
    except BaseException:
        ours.close()
        raise
    return ours


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(_SIZE, "big") + data
