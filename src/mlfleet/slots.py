"""Slots on this machine: runs wait, first come first served, until what they need is free."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mlfleet.errors import UsageError
from mlfleet.resources import Machine, Resources

__all__ = ["MachineSlots"]

_MILLI = 1000  # CPUs are counted in thousandths: sums of 0.1 would drift


@dataclass(slots=True, eq=False)
class _Request:
    cpus: int
    memory: int
    gpus: int
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    devices: tuple[str, ...] = ()


class MachineSlots:
    """Shares a machine among runs.

    The first in the queue is served first, however small the others are: so a run that needs much is not starved by
    many that need little.

    Args:
        machine: what there is.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._cpus = round(machine.cpus * _MILLI)
        self._memory = machine.memory
        self._devices = list(machine.gpus)
        self._queue: deque[_Request] = deque()

    def check(self, needed: Resources) -> None:
        """See to it that a run could start at all.

        Raises:
            UsageError: the machine is too small for it.
        """
        lack = self.machine.lacks(needed)
        if lack is not None:
            raise UsageError(f"a run with Resources({needed}) can never start on this machine: {lack}")

    @asynccontextmanager
    async def share(self, needed: Resources) -> AsyncIterator[dict[str, str]]:
        """Wait until so much is free, and hold it for the time of the block; gives variables for the run."""
        request = _Request(round(needed.cpus * _MILLI), needed.memory_bytes or 0, needed.gpus)
        self._queue.append(request)
        self._admit()
        try:
            await request.granted.wait()
            # A run that asks for no GPU sees none, or it would take what another one was given.
            yield {"CUDA_VISIBLE_DEVICES": ",".join(request.devices)} if self.machine.gpus else {}
        finally:
            if request.granted.is_set():
                self._take(request, -1)
                self._devices = [*request.devices, *self._devices]
            else:
                self._queue.remove(request)
            self._admit()

    def _admit(self) -> None:
        while self._queue and self._has_room(self._queue[0]):
            request = self._queue.popleft()
            self._take(request, 1)
            request.devices = tuple(self._devices[: request.gpus])
            del self._devices[: request.gpus]
            request.granted.set()

    def _has_room(self, request: _Request) -> bool:
        enough_memory = self._memory is None or request.memory <= self._memory
        return request.cpus <= self._cpus and enough_memory and request.gpus <= len(self._devices)

    def _take(self, request: _Request, times: int) -> None:
        self._cpus -= times * request.cpus
        if self._memory is not None:
            self._memory -= times * request.memory
