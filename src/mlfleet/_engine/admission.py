"""Slots on this machine: runs wait, first come first served, until what they need is free."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from types import TracebackType

from mlfleet.errors import UsageError
from mlfleet.resources import Machine, Resources

__all__ = ["MachineSlots", "Share", "Slot"]

_MILLI = 1000  # CPUs are counted in thousandths: sums of 0.1 would drift


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
        self._queue: deque[Share] = deque()

    def check(self, needed: Resources) -> None:
        """See to it that a run could start at all.

        Raises:
            UsageError: the machine is too small for it.
        """
        lack = self.machine.lacks(needed)
        if lack is not None:
            raise UsageError(f"a run with Resources({needed}) can never start on this machine: {lack}")

    def share(self, needed: Resources) -> Share:
        """What a run is to get of the machine: ``async with`` it, or `Share.take` it and give it back."""
        return Share(self, needed)

    def queue(self, share: Share) -> None:
        """Let it wait behind the others."""
        self._queue.append(share)
        self._admit()

    def end(self, share: Share) -> None:
        """Take it back, or let it wait no longer."""
        if share.granted.is_set():
            self._take(share, -1)
            self._devices = [*share.devices, *self._devices]
        else:
            self._queue.remove(share)
        self._admit()

    def _admit(self) -> None:
        while self._queue and self._has_room(self._queue[0]):
            share = self._queue.popleft()
            self._take(share, 1)
            share.devices = tuple(self._devices[: share.gpus])
            del self._devices[: share.gpus]
            share.granted.set()

    def _has_room(self, share: Share) -> bool:
        enough_memory = self._memory is None or share.memory <= self._memory
        return share.cpus <= self._cpus and enough_memory and share.gpus <= len(self._devices)

    def _take(self, share: Share, times: int) -> None:
        self._cpus -= times * share.cpus
        if self._memory is not None:
            self._memory -= times * share.memory


class Share:
    """A part of a machine, for one run.

    Args:
        slots: of the machine.
        needed: how much.

    Attributes:
        cpus: in thousandths.
        memory: in bytes.
        gpus: how many.
        granted: is set once it is ours.
        devices: the GPUs that it got.
    """

    def __init__(self, slots: MachineSlots, needed: Resources) -> None:
        self._slots = slots
        self.cpus = round(needed.cpus * _MILLI)
        self.memory = needed.memory_bytes or 0
        self.gpus = needed.gpus
        self.granted = asyncio.Event()
        self.devices: tuple[str, ...] = ()

    async def take(self) -> dict[str, str]:
        """Wait until so much is free, and hold it until `release`; gives variables for the run."""
        self._slots.queue(self)
        try:
            await self.granted.wait()
        except BaseException:
            self.release()
            raise
        # A run that asks for no GPU sees none, or it would take what another one was given.
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices)} if self._slots.machine.gpus else {}

    def release(self) -> None:
        """Give it back."""
        self._slots.end(self)

    async def __aenter__(self) -> dict[str, str]:
        return await self.take()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Slot:
    """The place of one run: one of so many, and its share of the machine if it runs there.

    Args:
        count: how many runs may have one.
        share: of the machine; None: it is not counted.
    """

    # Not a context manager made by contextlib: hundreds wait, each with all that this one would consist of.

    __slots__ = ("_count", "_share")

    def __init__(self, count: asyncio.Semaphore, share: Share | None) -> None:
        self._count = count
        self._share = share

    async def take(self) -> Mapping[str, str]:
        """Wait until the run may go on, and hold its place until `release`; gives variables for it."""
        if self._share is None:
            await self._count.acquire()
            return {}
        variables = await self._share.take()
        try:
            await self._count.acquire()
        except BaseException:
            self._share.release()
            raise
        return variables

    def release(self) -> None:
        """Give the place to another run."""
        self._count.release()
        if self._share is not None:
            self._share.release()
