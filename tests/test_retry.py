"""The policy of retries that every service shares."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from mlfleet._retry import RetryPolicy, parse_retry_after


class Busy(Exception):
    def __init__(self, retry_after: float | None = None) -> None:
        super().__init__("busy")
        self.retry_after = retry_after


class Service:
    """Fails a number of times, then succeeds."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.calls = 0
        self._failures = failures
        self._error = error or Busy()

    async def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self._failures:
            raise self._error
        return "done"


def is_busy(error: BaseException) -> bool:
    return isinstance(error, Busy)


async def test_a_call_is_repeated_until_it_succeeds() -> None:
    service, pauses = Service(3), list[float]()
    policy = RetryPolicy(seconds=60, first_pause=0.001)
    result = await policy.call(service, retry_if=is_busy, before_pause=lambda _, pause: pauses.append(pause))
    assert (result, service.calls, len(pauses)) == ("done", 4, 3)
    assert all(0.0005 * 2**n <= pause <= 0.001 * 2**n for n, pause in enumerate(pauses))


async def test_other_errors_are_raised_at_once() -> None:
    service = Service(9, KeyError("x"))
    with pytest.raises(KeyError):
        await RetryPolicy(seconds=60).call(service, retry_if=is_busy)
    assert service.calls == 1


@pytest.mark.parametrize(
    ("policy", "calls"),
    [(RetryPolicy(seconds=0), 1), (RetryPolicy(seconds=60, first_pause=0, attempts=3), 3)],
)
async def test_retries_end_by_time_or_attempts(policy: RetryPolicy, calls: int) -> None:
    service, told = Service(9), list[int]()
    with pytest.raises(Busy):
        await policy.call(service, retry_if=is_busy, on_exhausted=lambda error, count, _: told.append(count))
    assert (service.calls, told) == (calls, [calls])


async def test_the_last_pause_ends_at_the_deadline() -> None:
    pauses: list[float] = []
    with pytest.raises(Busy):
        await RetryPolicy(seconds=0.05, first_pause=60, longest_pause=60).call(
            Service(99), retry_if=is_busy, before_pause=lambda _, pause: pauses.append(pause)
        )
    assert pauses
    assert max(pauses) <= 0.05


async def test_retry_after_lengthens_the_pause_and_is_not_awaited_in_vain() -> None:
    pauses: list[float] = []
    await RetryPolicy(seconds=60, first_pause=0).call(
        Service(1, Busy(0.01)), retry_if=is_busy, before_pause=lambda _, pause: pauses.append(pause)
    )
    assert pauses == [0.01]
    service = Service(1, Busy(1000))
    with pytest.raises(Busy):
        await RetryPolicy(seconds=60).call(service, retry_if=is_busy)
    assert service.calls == 1


async def test_any_function_that_returns_an_awaitable_is_called() -> None:
    service = Service(1)
    assert await RetryPolicy(seconds=60, first_pause=0).call(lambda: service(), retry_if=is_busy) == "done"


async def test_an_error_may_carry_its_own_policy() -> None:
    service = Service(9)
    strict = RetryPolicy(seconds=60, first_pause=0, attempts=2)
    with pytest.raises(Busy):
        await RetryPolicy(seconds=60).call(service, retry_if=is_busy, policy_for=lambda _: strict)
    assert service.calls == 2


def test_retry_after_is_seconds_or_a_date() -> None:
    assert parse_retry_after({"retry-after": "7"}) == 7.0
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    waiting = parse_retry_after({"retry-after": later})
    assert waiting is not None
    assert 90 < waiting <= 100
    assert parse_retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    for nonsense in ("", "soon", "-3", "٣"):
        assert parse_retry_after({"retry-after": nonsense}) is None
