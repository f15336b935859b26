from __future__ import annotations

import asyncio

import anyio
import pytest

from mlfleet._concurrency.single_flight import Coalescing, SingleFlight
from mlfleet._concurrency.throttle import Throttle


class Work:
    """Work that ends when it is told to, and counts what happened to it."""

    def __init__(self, result: str = "done") -> None:
        self.result = result
        self.begun = 0
        self.cancelled = 0
        self.may_end = asyncio.Event()
        self.has_begun = asyncio.Event()

    async def __call__(self) -> str:
        self.begun += 1
        self.has_begun.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)  # tidying up
            self.cancelled += 1
            raise
        return self.result


async def test_one_work_for_all_callers() -> None:
    once: SingleFlight[str, str] = SingleFlight()
    work = Work()
    callers = [asyncio.create_task(once("key", work)) for _ in range(100)]
    await work.has_begun.wait()
    work.may_end.set()
    assert set(await asyncio.gather(*callers)) == {"done"}
    assert work.begun == 1


async def test_keys_do_not_wait_for_each_other() -> None:
    once: SingleFlight[str, str] = SingleFlight()
    slow, fast = Work("slow"), Work("fast")
    fast.may_end.set()
    waiting = asyncio.create_task(once("slow", slow))
    assert await once("fast", fast) == "fast"
    slow.may_end.set()
    assert await waiting == "slow"


async def test_the_result_is_forgotten_or_kept() -> None:
    for keep, begun in ((False, 2), (True, 1)):
        once: SingleFlight[str, str] = SingleFlight(keep=keep)
        work = Work()
        work.may_end.set()
        assert [await once("key", work), await once("key", work)] == ["done", "done"]
        assert work.begun == begun


async def test_error_goes_to_all_and_the_next_caller_starts_anew() -> None:
    once: SingleFlight[str, str] = SingleFlight(keep=True)
    begun = 0

    async def fail() -> str:
        nonlocal begun
        begun += 1
        await asyncio.sleep(0)
        raise LookupError("no luck")

    results = await asyncio.gather(*(once("key", fail) for _ in range(5)), return_exceptions=True)
    assert [str(result) for result in results] == ["no luck"] * 5
    assert begun == 1
    with pytest.raises(LookupError):
        await once("key", fail)
    assert begun == 2


async def test_cancelled_caller_leaves_the_work_to_the_others() -> None:
    once: SingleFlight[str, str] = SingleFlight()
    work = Work()
    first, second = (asyncio.create_task(once("key", work)) for _ in range(2))
    await work.has_begun.wait()
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    work.may_end.set()
    assert await second == "done"
    assert (work.begun, work.cancelled) == (1, 0)


async def test_last_cancelled_caller_ends_the_work_and_waits_for_its_end() -> None:
    once: SingleFlight[str, str] = SingleFlight()
    work = Work()
    callers = [asyncio.create_task(once("key", work)) for _ in range(3)]
    await work.has_begun.wait()
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    assert work.cancelled == 1
    assert all(caller.cancelled() for caller in callers)


async def test_caller_that_comes_while_the_work_is_being_cancelled_gets_work_of_its_own() -> None:
    once: SingleFlight[str, str] = SingleFlight()
    old, new = Work("old"), Work("new")
    new.may_end.set()
    caller = asyncio.create_task(once("key", old))
    await old.has_begun.wait()
    caller.cancel()
    await asyncio.sleep(0)
    assert await once("key", new) == "new"
    await asyncio.wait([caller])


async def test_scope_of_a_caller_does_not_reach_into_the_work() -> None:
    once: SingleFlight[str, str] = SingleFlight()
    work = Work()
    async with anyio.create_task_group() as group:

        async def patient() -> None:
            assert await once("key", work) == "done"

        with anyio.CancelScope() as scope:
            group.start_soon(patient)

            async def leave() -> None:
                await work.has_begun.wait()
                scope.cancel()

            group.start_soon(leave)
            await once("key", work)
        assert scope.cancelled_caught
        work.may_end.set()
    assert (work.begun, work.cancelled) == (1, 0)


async def test_work_cancelled_from_outside_raises_an_error_not_a_cancellation() -> None:
    once: SingleFlight[str, str] = SingleFlight()

    async def give_up() -> str:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="cancelled from outside"):
        await once("key", give_up)


async def test_a_coalesced_result_never_predates_its_caller() -> None:
    rounds: Coalescing[str, int] = Coalescing()
    now = 0
    begun: list[int] = []
    has_begun, may_end = asyncio.Event(), asyncio.Event()

    async def look() -> int:
        begun.append(now)
        has_begun.set()
        seen = now
        await may_end.wait()
        return seen

    first = [asyncio.create_task(rounds("key", look)) for _ in range(3)]
    await has_begun.wait()
    now = 1
    second = [asyncio.create_task(rounds("key", look)) for _ in range(3)]
    await asyncio.sleep(0)
    may_end.set()
    assert await asyncio.gather(*first, *second) == [0, 0, 0, 1, 1, 1]
    assert begun == [0, 1]


async def test_an_abandoned_call_does_not_delay_the_next() -> None:
    rounds: Coalescing[str, str] = Coalescing()
    old, new = Work("old"), Work("new")
    new.may_end.set()
    caller = asyncio.create_task(rounds("key", old))
    await old.has_begun.wait()
    waiting = asyncio.create_task(rounds("key", new))
    caller.cancel()
    assert await waiting == "new"
    await asyncio.wait([caller])
    assert caller.cancelled()
    assert old.cancelled == 1


async def test_the_throttle_yields_to_the_loop_and_keeps_the_order() -> None:
    turns = Throttle()
    seen: list[object] = []

    async def one(n: int) -> None:
        await turns.wait()
        seen.append(n)

    async def other() -> None:
        while len(seen) < 120:
            seen.append("other")
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(one(n)) for n in range(100)]
    watching = asyncio.create_task(other())
    tasks[7].cancel()
    await asyncio.wait(tasks)
    watching.cancel()
    taken = [each for each in seen if each != "other"]
    assert taken == [n for n in range(100) if n != 7]
    assert seen.count("other") > 20
