"""The admission of runs: each waits in the queue until a slot and its share of the machine are free."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter, OrderedDict
from collections.abc import Mapping
from enum import Enum

from mlfleet.errors import FleetFull, UsageError
from mlfleet.resources import Machine, Resources

__all__ = ["Admission", "Reservation"]

_MILLI = 1000  # CPUs are counted in thousandths, since sums of 0.1 would drift


class Admission:
    """Admits runs within a number of slots, the limits of their groups and the resources of this machine.

    Each group of runs has a lane in the queue, and one more for its runs that need resources of this machine. Within a
    lane the first reservation is served first; the lanes take turns, so that no group starves another.

    1. A lane whose group is at its limit is passed over.
    2. A reservation whose resources are not free is waited for: no other one that needs resources passes it, so that a
       run which needs much is not starved by many that need little.

    The queue is bounded. A group gets a place in it as long as it has fewer than are free, so that no group can fill it
    and lock out others. (This is the dynamic threshold of shared buffers in network switches: Choudhury and Hahne,
    IEEE/ACM Transactions on Networking 6(2), 1998.)

    The lanes also hold the reservations of submits that wait for room in the queue. They may be granted right there,
    and enter the queue in their order.

    Args:
        machine: The resources of the machine.
        max_concurrent: The number of slots; None: any number.
        group_limit: The number of slots that the runs of one group may hold, for all groups or by name; None: any
            number.
        max_queued: The number of runs that may wait in the queue; None: any number.
    """

    def __init__(
        self,
        machine: Machine,
        max_concurrent: int | None = None,
        *,
        group_limit: int | Mapping[str, int] | None = None,
        max_queued: int | None = None,
    ) -> None:
        self.machine = machine
        self._max_concurrent = max_concurrent
        self._group_limit = group_limit
        self._max_queued = sys.maxsize if max_queued is None else max_queued
        self._free_slots = sys.maxsize if max_concurrent is None else max_concurrent
        self._free_cpus = round(machine.cpus * _MILLI)
        self._free_memory = machine.memory
        self._free_gpus = list(machine.gpus)
        self._active: Counter[str] = Counter()
        self._lanes: OrderedDict[tuple[str | None, bool], OrderedDict[Reservation, None]] = OrderedDict()
        self._outside: OrderedDict[str | None, OrderedDict[Reservation, None]] = OrderedDict()
        """The reservations in the lanes that wait for room in the queue, by group."""
        self._queued: Counter[str | None] = Counter()

    def check(self, needed: Resources) -> None:
        """Check that a run could ever be admitted.

        Raises:
            UsageError: The machine is too small for it.
        """
        lack = self.machine.lacks(needed)
        if lack is not None:
            raise UsageError(f"a run with Resources({needed}) can never start on this machine: {lack}")

    def check_room(self, group: str | None) -> None:
        """Check that a run may be admitted now, as far as that is known without its resources.

        Raises:
            FleetFull: The queue is full, and no slot is free for the group.
        """
        if not self._has_room(group) and (not self._free_slots or self._is_at_limit(group)):
            raise self._full(group)

    def reserve(self, needed: Resources | None, *, group: str | None = None, exempt: bool = False) -> Reservation:
        """Make a reservation, to be entered and released.

        Args:
            needed: The resources of this machine that the run needs; None: it needs a slot only.
            group: The group of the run; None: it belongs to none.
            exempt: True for a run that enters the queue even if that is full.
        """
        return Reservation(self, needed, group, exempt)

    def capacity(self, needed: Resources | None, group: str | None = None) -> int | None:
        """Return how many such runs can be admitted at the same time; None: any number.

        Args:
            needed: The resources of this machine that each run needs; None: a slot only.
            group: The group of the runs.
        """
        limits = [self._max_concurrent, self._limit(group), None if needed is None else self.machine.fits(needed)]
        return min((limit for limit in limits if limit is not None), default=None)

    def turn_away(self) -> None:
        """Turn away all reservations that wait for room in the queue."""
        for reservation in [each for waiting in self._outside.values() for each in waiting]:
            self._remove(reservation)

    def _full(self, group: str | None) -> FleetFull:
        queued, limit = self._queued.total(), self._max_queued
        text = f"the queue of the Fleet has {queued} of at most {limit} runs"
        if queued < limit:
            text += f", {self._queued[group]} of them of the group {group!r}, which must leave room to others"
        return FleetFull(f"{text}: submit the run later, or with wait=True", queued=queued, limit=limit)

    def _has_room(self, group: str | None) -> bool:
        free = self._max_queued - self._queued.total()
        return free > 0 and (group is None or self._queued[group] < free)

    def _enqueue(self, reservation: Reservation, *, wait: bool) -> None:
        lane = self._lanes.setdefault(reservation.lane, OrderedDict())
        lane[reservation] = None
        self._outside.setdefault(reservation.lane[0], OrderedDict())[reservation] = None
        reservation.move(_State.OUTSIDE)
        if reservation.exempt:
            self._let_in(reservation)
        if len(lane) == 1:
            self._admit()
        else:
            self._fill_queue()
        if reservation.state is _State.OUTSIDE and not wait:
            self._remove(reservation)
            raise self._full(reservation.lane[0])

    def _remove(self, reservation: Reservation) -> None:
        """Take a reservation out of the queue, or take back what it was granted."""
        if reservation.state is _State.GRANTED:
            self._count(reservation, 1)
            self._free_gpus = [*reservation.gpus, *self._free_gpus]
        else:
            self._take_out(reservation)
        reservation.move(_State.OVER)
        self._admit()

    def _take_out(self, reservation: Reservation) -> None:
        lane = self._lanes[reservation.lane]
        del lane[reservation]
        if not lane:
            del self._lanes[reservation.lane]
        if reservation.state is _State.QUEUED:
            self._queued[reservation.lane[0]] -= 1
            if not self._queued[reservation.lane[0]]:
                del self._queued[reservation.lane[0]]
        else:
            self._stop_waiting(reservation)

    def _stop_waiting(self, reservation: Reservation) -> None:
        group = reservation.lane[0]
        del self._outside[group][reservation]
        if not self._outside[group]:
            del self._outside[group]

    def _admit(self) -> None:
        while (reservation := self._find_next()) is not None:
            self._lanes.move_to_end(reservation.lane)
            self._take_out(reservation)
            self._count(reservation, -1)
            reservation.gpus = tuple(self._free_gpus[: reservation.gpu_count])
            del self._free_gpus[: reservation.gpu_count]
            reservation.move(_State.GRANTED)
        self._fill_queue()

    def _find_next(self) -> Reservation | None:
        if not self._free_slots:
            return None
        machine_is_awaited = False
        for (group, is_here), lane in self._lanes.items():
            if (is_here and machine_is_awaited) or self._is_at_limit(group):
                continue
            first = next(iter(lane))
            if self._fits_now(first):
                return first
            machine_is_awaited = True
        return None

    def _fill_queue(self) -> None:
        for group, waiting in tuple(self._outside.items()):
            while waiting and self._has_room(group):
                self._let_in(next(iter(waiting)))

    def _let_in(self, reservation: Reservation) -> None:
        self._stop_waiting(reservation)
        self._queued[reservation.lane[0]] += 1
        reservation.move(_State.QUEUED)

    def _limit(self, group: str | None) -> int | None:
        if group is None or self._group_limit is None:
            return None
        return self._group_limit if isinstance(self._group_limit, int) else self._group_limit.get(group)

    def _is_at_limit(self, group: str | None) -> bool:
        limit = self._limit(group)
        return limit is not None and group is not None and self._active[group] >= limit

    def _fits_now(self, reservation: Reservation) -> bool:
        enough_memory = self._free_memory is None or reservation.memory <= self._free_memory
        return reservation.cpus <= self._free_cpus and enough_memory and reservation.gpu_count <= len(self._free_gpus)

    def _count(self, reservation: Reservation, sign: int) -> None:
        self._free_slots += sign
        self._free_cpus += sign * reservation.cpus
        if self._free_memory is not None:
            self._free_memory += sign * reservation.memory
        if (group := reservation.lane[0]) is not None:
            self._active[group] -= sign
            if not self._active[group]:
                del self._active[group]  # a service may have any number of groups over time


class _State(Enum):
    """The states of a reservation."""

    NEW = "new"
    OUTSIDE = "outside"
    QUEUED = "queued"
    GRANTED = "granted"
    OVER = "over"


class Reservation:
    """The admission of one run: a slot and, on this machine, the resources that it needs.

    Args:
        admission: The owner of slots and resources.
        needed: The resources; None: a slot only.
        group: The group of the run; None: it belongs to none.
        exempt: True for a run that enters the queue even if that is full.

    Attributes:
        lane: The key of its lane: its group, and True if it needs resources of the machine.
        exempt: True for a run that enters the queue even if that is full.
        state: The state. `OUTSIDE` waits for room in the queue.
        cpus: The CPUs, in thousandths.
        memory: The memory in bytes.
        gpu_count: The number of GPUs.
        gpus: The names of the GPUs that were granted.
    """

    __slots__ = ("_admission", "_moved", "cpus", "exempt", "gpu_count", "gpus", "lane", "memory", "state")

    def __init__(self, admission: Admission, needed: Resources | None, group: str | None, exempt: bool) -> None:
        self._admission = admission
        self._moved: asyncio.Future[None] | None = None
        self.lane = (group, needed is not None)
        self.exempt = exempt
        self.state = _State.NEW
        self.cpus = 0 if needed is None else round(needed.cpus * _MILLI)
        self.memory = 0 if needed is None else needed.memory_bytes or 0
        self.gpu_count = 0 if needed is None else needed.gpus
        self.gpus: tuple[str, ...] = ()

    @property
    def is_queued(self) -> bool:
        """True while the run waits in the queue."""
        return self.state is _State.QUEUED

    def move(self, state: _State) -> None:
        """Change the state, and wake the waiter. Called by the owner of slots and resources."""
        self.state = state
        if self._moved is not None and not self._moved.done():
            self._moved.set_result(None)

    async def enter(self, *, wait: bool) -> None:
        """Enter the queue. A cancelled call leaves nothing in it.

        Args:
            wait: True to wait for room if the queue is full.

        Raises:
            FleetFull: The queue is full, and the run cannot start at once.
            UsageError: The Fleet was closed meanwhile.
        """
        self._admission._enqueue(self, wait=wait)
        try:
            while self.state is _State.OUTSIDE:
                await self._wait()
        except BaseException:
            self.release()
            raise
        if self.state is _State.OVER:
            raise UsageError("the Fleet was closed before there was room in its queue")

    async def granted(self) -> Mapping[str, str]:
        """Wait for slot and resources. A cancelled call keeps the place in the queue.

        Returns:
            The environment variables that tell the run which resources it may use.
        """
        while self.state is _State.QUEUED:
            await self._wait()
        if not self.lane[1] or not self._admission.machine.gpus:
            return {}
        # A run that needs no GPU must see none, or it would use those of another one.
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}

    async def _wait(self) -> None:
        self._moved = asyncio.get_running_loop().create_future()
        await self._moved

    def release(self) -> None:
        """Give place, slot and resources to other runs. Further calls do nothing."""
        if self.state not in (_State.NEW, _State.OVER):
            self._admission._remove(self)
