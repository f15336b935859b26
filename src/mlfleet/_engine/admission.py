"""The admission of runs: each waits until a slot and its share of the machine are free, first come, first served."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from types import TracebackType

import anyio

from mlfleet.errors import UsageError
from mlfleet.resources import Machine, Resources

__all__ = ["Admission", "Reservation"]

_MILLI = 1000  # CPUs are counted in thousandths, since sums of 0.1 would drift


class Admission:
    """Admits runs within a number of slots and the resources of this machine.

    The first reservation in the queue is served first, however small the others are, so that a run which needs much is
    not starved by many that need little.

    Args:
        machine: The resources of the machine.
        max_concurrent: The number of slots; None: any number.
    """

    def __init__(self, machine: Machine, max_concurrent: int | None = None) -> None:
        self.machine = machine
        self._max_concurrent = max_concurrent
        self._slots = anyio.Semaphore(sys.maxsize if max_concurrent is None else max_concurrent, fast_acquire=True)
        self._free_cpus = round(machine.cpus * _MILLI)
        self._free_memory = machine.memory
        self._free_gpus = list(machine.gpus)
        self._queue: deque[Reservation] = deque()

    def check(self, needed: Resources) -> None:
        """Check that a run could ever be admitted.

        Raises:
            UsageError: The machine is too small for it.
        """
        lack = self.machine.lacks(needed)
        if lack is not None:
            raise UsageError(f"a run with Resources({needed}) can never start on this machine: {lack}")

    def reserve(self, needed: Resources | None) -> Reservation:
        """Make a reservation, to be acquired and released.

        Args:
            needed: The resources of this machine that the run needs; None: it needs a slot only.
        """
        return Reservation(self, needed)

    def capacity(self, needed: Resources | None) -> int | None:
        """Return how many such runs can be admitted at the same time; None: any number.

        Args:
            needed: The resources of this machine that each run needs; None: a slot only.
        """
        limits = [] if self._max_concurrent is None else [self._max_concurrent]
        limits += [] if needed is None else [self.machine.fits(needed)]
        return min(limits, default=None)

    async def _acquire_slot(self) -> None:
        await self._slots.acquire()

    def _release_slot(self) -> None:
        self._slots.release()

    def _enqueue(self, reservation: Reservation) -> None:
        self._queue.append(reservation)
        self._admit()

    def _give_back(self, reservation: Reservation) -> None:
        if reservation.is_granted:
            self._count(reservation, 1)
            self._free_gpus = [*reservation.gpus, *self._free_gpus]
        else:
            self._queue.remove(reservation)
        self._admit()

    def _admit(self) -> None:
        while self._queue and self._fits_now(self._queue[0]):
            reservation = self._queue.popleft()
            self._count(reservation, -1)
            gpus = tuple(self._free_gpus[: reservation.gpu_count])
            del self._free_gpus[: reservation.gpu_count]
            reservation.grant(gpus)

    def _fits_now(self, reservation: Reservation) -> bool:
        enough_memory = self._free_memory is None or reservation.memory <= self._free_memory
        return reservation.cpus <= self._free_cpus and enough_memory and reservation.gpu_count <= len(self._free_gpus)

    def _count(self, reservation: Reservation, sign: int) -> None:
        self._free_cpus += sign * reservation.cpus
        if self._free_memory is not None:
            self._free_memory += sign * reservation.memory


class Reservation:
    """The admission of one run: a slot and, on this machine, the resources that it needs.

    Args:
        admission: The owner of slots and resources.
        needed: The resources; None: a slot only.

    Attributes:
        cpus: The CPUs, in thousandths.
        memory: The memory in bytes.
        gpu_count: The number of GPUs.
        gpus: The names of the GPUs that were granted.
    """

    __slots__ = ("_admission", "_granted", "cpus", "gpu_count", "gpus", "memory")

    def __init__(self, admission: Admission, needed: Resources | None) -> None:
        self._admission = admission
        self._granted = None if needed is None else anyio.Event()
        self.cpus = 0 if needed is None else round(needed.cpus * _MILLI)
        self.memory = 0 if needed is None else needed.memory_bytes or 0
        self.gpu_count = 0 if needed is None else needed.gpus
        self.gpus: tuple[str, ...] = ()

    @property
    def is_granted(self) -> bool:
        """True if the resources are reserved for this run."""
        return self._granted is not None and self._granted.is_set()

    def grant(self, gpus: tuple[str, ...]) -> None:
        """Admit the run. Called by the owner of the resources."""
        assert self._granted is not None  # noqa: S101 - only those that need resources wait in the queue
        self.gpus = gpus
        self._granted.set()

    async def acquire(self) -> Mapping[str, str]:
        """Wait for resources and slot, and hold them until `release`. A cancelled call holds nothing.

        Returns:
            The environment variables that tell the run which resources it may use.
        """
        if self._granted is None:
            await self._admission._acquire_slot()
            return {}
        self._admission._enqueue(self)
        try:
            await self._granted.wait()
            await self._admission._acquire_slot()
        except BaseException:
            self._admission._give_back(self)
            raise
        # A run that needs no GPU must see none, or it would use those of another one.
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self._admission.machine.gpus else {}

    def release(self) -> None:
        """Give slot and resources to other runs."""
        self._admission._release_slot()
        if self._granted is not None:
            self._admission._give_back(self)

    async def __aenter__(self) -> Mapping[str, str]:
        return await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
