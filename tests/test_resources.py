"""Resources, what this machine has, and the queue for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfleet._engine.admission import Admission, Reservation
from mlfleet.errors import FleetFull, UsageError
from mlfleet.resources import Machine, Resources, this_machine


@pytest.mark.parametrize(
    ("memory", "count"),
    [
        (1000, 1000),
        ("512", 512),
        ("1k", 1000),
        ("4Gi", 4 * 2**30),
        ("1.5G", 1500000000),
        ("2MiB", 2**21),
        ("3GB", 3 * 10**9),
    ],
)
def test_memory_uses_the_notation_of_kubernetes(memory: int | str, count: int) -> None:
    assert Resources(memory=memory).memory_bytes == count


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resources(cpus=-1), "cpus is -1"),
        (lambda: Resources(cpus="2"), "cpus is '2'"),  # type: ignore[arg-type]
        (lambda: Resources(cpus=float("nan")), "cpus is nan"),
        (lambda: Resources(gpus=0.5), "gpus is 0.5: give a whole number"),  # type: ignore[arg-type]
        (lambda: Resources(memory="4 Gigs"), "memory is '4 Gigs'"),
        (lambda: Resources(memory=0), "memory is 0"),
        (lambda: Resources(memory="9" * 400), "memory is '999"),
        (lambda: Resources(memory=True), "memory is True"),
    ],
)
def test_wrong_resources_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_this_machine_has_what_the_process_may_use() -> None:
    machine = this_machine()
    assert 1 <= machine.cpus <= (os.cpu_count() or 1)
    assert machine.memory is None or machine.memory > 2**20


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [("0,1", ("0", "1")), ("", ()), ("-1", ()), ("3, 5", ("3", "5")), ("GPU-aa,-1,2", ("GPU-aa",))],
)
def test_gpus_are_those_that_cuda_would_show(
    monkeypatch: pytest.MonkeyPatch, visible: str, gpus: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert this_machine().gpus == gpus


def test_given_resources_replace_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert this_machine(Resources(cpus=8, gpus=2, memory="1Gi")) == Machine(cpus=8, gpus=("4", "5"), memory=2**30)
    with pytest.raises(UsageError, match="4 GPUs, and there are 3: 4, 5, 6"):
        this_machine(Resources(gpus=4))


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        (Resources(cpus=5), "5 CPUs are requested and the machine has 4"),
        (Resources(gpus=3), "3 GPUs are requested and the machine has 2"),
        (Resources(memory="9Gi"), r"9Gi of memory are requested and the machine has 8\.0Gi"),
    ],
)
def test_runs_that_can_never_fit_are_refused(needed: Resources, message: str) -> None:
    slots = Admission(Machine(cpus=4, gpus=("0", "1"), memory=8 * 2**30))
    with pytest.raises(UsageError, match=f"can never start on this machine: {message}"):
        slots.check(needed)


def test_a_machine_says_how_many_runs_fit() -> None:
    machine = Machine(cpus=4, gpus=("0", "1"), memory=8 * 2**30)
    assert machine.fits(Resources(cpus=0.1)) == 40
    assert machine.fits(Resources(gpus=1)) == 2
    assert machine.fits(Resources(cpus=1, memory="3Gi")) == 2


@contextlib.asynccontextmanager
async def reserved(slots: Admission, needed: Resources | None) -> AsyncIterator[Mapping[str, str]]:
    """Hold a slot, as a run does from its submission to its end; yields the variables that the run gets."""
    reservation = slots.reserve(needed)
    await reservation.enter(wait=True)
    try:
        yield await reservation.granted()
    finally:
        reservation.release()


async def test_no_two_runs_share_a_gpu_and_all_are_used() -> None:
    slots = Admission(Machine(cpus=100, gpus=("a", "b", "c")))
    held: set[str] = set()
    most = 0

    async def run(count: int) -> None:
        nonlocal most
        async with reserved(slots, Resources(cpus=1, gpus=count)) as environ:
            mine = set(filter(None, environ["CUDA_VISIBLE_DEVICES"].split(",")))
            assert len(mine) == count
            assert not mine & held
            held.update(mine)
            most = max(most, len(held))
            await anyio.lowlevel.checkpoint()
            held.difference_update(mine)

    await asyncio.gather(*(run(count) for count in [1, 2, 3, 0, 1, 1] * 5))
    assert most == 3


async def test_a_big_run_is_not_starved_by_small_ones() -> None:
    slots = Admission(Machine(cpus=4))
    order: list[str] = []
    gate = anyio.Event()

    async def run(name: str, cpus: float) -> None:
        async with reserved(slots, Resources(cpus=cpus)):
            order.append(name)
            await gate.wait()

    async with anyio.create_task_group() as group:
        for name, cpus in [("first", 1), ("big", 4), ("small", 1)]:
            group.start_soon(run, name, cpus)
            await anyio.wait_all_tasks_blocked()
        assert order == ["first"]  # three CPUs are free, and the small one still waits behind the big one
        gate.set()
    assert order == ["first", "big", "small"]


async def test_a_run_elsewhere_does_not_wait_for_this_machine() -> None:
    slots = Admission(Machine(cpus=1), 3)
    async with reserved(slots, Resources(cpus=1)):
        waiting = slots.reserve(Resources(cpus=1))
        await waiting.enter(wait=False)
        async with reserved(slots, None):
            assert waiting.is_queued
    assert await waiting.granted() == {}
    waiting.release()


async def test_a_cancelled_waiter_does_not_block_others() -> None:
    slots = Admission(Machine(cpus=2))
    async with reserved(slots, Resources(cpus=2)):
        with anyio.move_on_after(0.01) as scope:
            async with reserved(slots, Resources(cpus=2)):
                pass
        assert scope.cancelled_caught
    for _ in range(20):  # tenths add up
        async with reserved(slots, Resources(cpus=0.1)):
            pass
    async with reserved(slots, Resources(cpus=2)):
        pass


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_comes_and_goes_the_limits_hold_and_nobody_is_forgotten(data: st.DataObject) -> None:
    slots, most_queued, cpus = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3)), 4
    limits = {"red": 1, "blue": 2}
    admission = Admission(Machine(cpus=cpus), slots, group_limit=limits, max_queued=most_queued)
    inside: list[Reservation] = []
    groups = st.sampled_from([None, "red", "blue", "green"])

    def granted() -> list[Reservation]:
        return [each for each in inside if each.state.value == "granted"]

    def check() -> None:
        counts = Counter(each.lane[0] for each in granted())
        assert len(granted()) <= slots
        assert sum(each.cpus for each in granted()) <= cpus * 1000
        assert all(counts[group] <= limit for group, limit in limits.items())
        exempt = sum(each.is_queued and each.exempt for each in inside)
        assert sum(each.is_queued for each in inside) <= most_queued + exempt

    for _ in range(data.draw(st.integers(0, 40))):
        if data.draw(st.booleans()) and inside:
            leaving = inside.pop(data.draw(st.integers(0, len(inside) - 1)))
            leaving.release()
            leaving.release()
        else:
            needed = data.draw(st.sampled_from([None, Resources(cpus=1), Resources(cpus=4)]))
            new = admission.reserve(needed, group=data.draw(groups), exempt=data.draw(st.integers(0, 4)) == 0)
            with contextlib.suppress(FleetFull):
                admission._enqueue(new, wait=data.draw(st.booleans()))
                inside.append(new)
        check()
    while inside:
        ended = granted()[0]  # there is one: each could run alone
        inside.remove(ended)
        ended.release()
        check()
    assert admission.capacity(None) == slots
    for _ in range(slots):
        alone = admission.reserve(Resources(cpus=cpus / slots))
        admission._enqueue(alone, wait=False)
        assert alone.state.value == "granted", "all was given back"
