"""Retries: one loop (tenacity's), and one policy for each kind of service."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tenacity import RetryCallState

__all__ = ["RetryPolicy"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a failed request is repeated, and how long the pauses between two attempts are.

    The pauses grow exponentially and are shortened at random, so that clients which failed together do not come back
    together. An error with an attribute ``retry_after`` (seconds, the server's ``Retry-After``, RFC 9110, 10.2.3)
    lengthens the pause; if it points beyond the deadline, there is no further attempt.

    Attributes:
        seconds: From the first attempt to the last one.
        first_pause: Seconds before the second attempt.
        longest_pause: Seconds at most between two attempts.
        attempts: At most so many; None: as many as fit into `seconds`.
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
    ) -> T:
        """Call `work` until it succeeds, fails for good, or the policy is exhausted.

        Args:
            work: One attempt.
            retry_if: Returns True for an error that may be gone at the next attempt.
            before_pause: Called with the error and the seconds of the pause, for a line in the log.

        Raises:
            BaseException: The error of the last attempt.
        """
        import tenacity  # late: most programs never need a second attempt

        def pause(state: RetryCallState) -> float:
            # tenacity counts attempts from 1. The exponent is bounded, since floats overflow at 2**1024.
            longest = min(self.first_pause * 2.0 ** min(state.attempt_number - 1, 32), self.longest_pause)
            shortened = longest * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
            return shortened + (_retry_after(state) or 0.0)

        def is_exhausted(state: RetryCallState) -> bool:
            elapsed = state.seconds_since_start or 0.0
            if self.attempts is not None and state.attempt_number >= self.attempts:
                return True
            return elapsed + (_retry_after(state) or 0.0) >= self.seconds

        def tell(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if before_pause is not None and error is not None and state.next_action is not None:
                before_pause(error, state.next_action.sleep)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(retry_if),
            wait=pause,
            stop=is_exhausted,
            before_sleep=tell,
            reraise=True,
        )
        return await retrying(work)


def _retry_after(state: RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome else None
    seconds = getattr(error, "retry_after", None)
    return None if seconds is None else float(seconds)
