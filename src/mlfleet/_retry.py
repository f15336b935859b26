"""Retries: one loop (tenacity's), and one policy for each kind of service."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tenacity import RetryCallState

__all__ = ["RETRIED", "RetryPolicy", "parse_retry_after"]

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
"""The HTTP statuses after which the same request may succeed later: those that mlflow's own client retries."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """A policy for repeating a failed request: its time limit and the pauses between two attempts.

    The pauses grow exponentially and are shortened at random, so that clients which failed together do not come back
    together. An error with an attribute ``retry_after`` (seconds, the server's ``Retry-After``, RFC 9110, 10.2.3)
    lengthens the pause; if it points beyond the deadline, there is no further attempt.

    Attributes:
        seconds: The time from the first attempt to the last one, in seconds.
        first_pause: The pause before the second attempt, in seconds.
        longest_pause: The longest pause between two attempts, in seconds.
        attempts: The largest number of attempts; None: as many as fit into `seconds`.
    """

    seconds: float
    first_pause: float = 0.5
    longest_pause: float = 10.0
    attempts: int | None = None

    async def call(
        self,
        work: Callable[[], Awaitable[T]],
        *,
        retry_if: Callable[[BaseException], bool],
        before_pause: Callable[[BaseException, float], None] | None = None,
        policy_for: Callable[[BaseException], RetryPolicy] | None = None,
        on_exhausted: Callable[[BaseException, int, float], None] | None = None,
    ) -> T:
        """Call `work` until it succeeds, fails for good, or the policy is exhausted.

        Args:
            work: A function that makes one attempt.
            retry_if: A function that returns True for an error that may be gone at the next attempt.
            before_pause: A function to call with the error and the seconds of the pause, for a line in the log.
            policy_for: A function that returns the policy for an error; None: this policy for every error. A server
                that never answered, for example, is given up earlier than one that is overloaded.
            on_exhausted: A function to call with the last error, the number of attempts and the seconds since the first
                one, when there is no further attempt. It may add them to the error's text.

        Raises:
            BaseException: The error of the last attempt.
        """
        began = time.monotonic()
        # tenacity's bookkeeping costs a tenth of a request, so it begins with the first failure.
        try:
            return await work()
        except Exception as error:
            if not retry_if(error):
                raise
            failure: Exception | None = error
        import tenacity  # late: `import mlfleet` does not need it

        def policy(state: RetryCallState) -> RetryPolicy:
            return self if policy_for is None else policy_for(_error(state))

        def pause(state: RetryCallState) -> float:
            return policy(state)._pause(state, time.monotonic() - began)

        def is_exhausted(state: RetryCallState) -> bool:
            elapsed = time.monotonic() - began
            exhausted = policy(state)._is_exhausted(state, elapsed)
            if exhausted and on_exhausted is not None:
                on_exhausted(_error(state), state.attempt_number, elapsed)
            return exhausted

        def log(state: RetryCallState) -> None:
            if before_pause is not None and state.next_action is not None:
                before_pause(_error(state), state.next_action.sleep)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(retry_if),
            wait=pause,
            stop=is_exhausted,
            before_sleep=log,
            reraise=True,
        )

        async def attempt() -> T:
            nonlocal failure
            if failure is not None:  # of the first attempt
                error, failure = failure, None
                raise error
            return await work()

        return await retrying(attempt)

    def _pause(self, state: RetryCallState, elapsed: float) -> float:
        # tenacity counts attempts from 1. The exponent is bounded, since floats overflow at 2**1024.
        longest = min(self.first_pause * 2.0 ** min(state.attempt_number - 1, 32), self.longest_pause)
        shortened = longest * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        retry_after = _retry_after(state)
        if retry_after is None:
            return min(shortened, max(0.0, self.seconds - elapsed))
        # The server tells all clients the same time; the random share keeps them from coming back together.
        return retry_after + shortened

    def _is_exhausted(self, state: RetryCallState, elapsed: float) -> bool:
        if self.attempts is not None and state.attempt_number >= self.attempts:
            return True
        return elapsed + (_retry_after(state) or 0.0) >= self.seconds


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a ``Retry-After`` header, which holds seconds or a date (RFC 9110, 10.2.3).

    Args:
        headers: The headers of the answer, with names in lower case or in any case if the mapping ignores it.

    Returns:
        The seconds, not negative; None if there is no such header or it cannot be read.
    """
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return float(value[:9])
    from email.utils import parsedate_to_datetime

    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _error(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome else None
    assert error is not None  # noqa: S101 - tenacity asks about failures only
    return error


def _retry_after(state: RetryCallState) -> float | None:
    seconds = getattr(_error(state), "retry_after", None)
    return None if seconds is None else float(seconds)
