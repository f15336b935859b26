"""When a request is worth another try, and how long to wait for it."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import anyio

from mlfleet.errors import TrackingError

__all__ = ["BACKOFF", "RETRIED", "RETRY_FOR", "Patience", "RetryPolicy", "Transient", "retry_after"]

log = logging.getLogger("mlfleet.tracking")

RETRY_FOR = 120.0
"""Seconds for which a call keeps trying, unless said otherwise."""

BACKOFF = 0.5
"""Seconds before the second try, unless said otherwise."""

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses that may be gone the next time: those that mlflow's own client retries."""

_MAX_DELAY = 10.0
_FIRST_CONTACT_TRIES = 3
_FIRST_CONTACT_SECONDS = 5.0


class Transient(Exception):
    """A request failed in a way that may be gone the next time. Does not leave this package.

    Attributes:
        error: what to raise once patience is at its end.
        connected: whether a connection to the server was made at all.
        executed: whether the server may have done what it was asked.
        retry_after: seconds that the server asked us to wait.
        renew: logs in again where the login may have expired, and tells whether that is worth one more try.
    """

    def __init__(
        self,
        error: TrackingError,
        *,
        connected: bool = True,
        executed: bool = True,
        retry_after: float | None = None,
        renew: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.connected = connected
        self.executed = executed
        self.retry_after = retry_after
        self.renew = renew


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a call keeps trying.

    Attributes:
        seconds: for one call, from its beginning to its last try.
        backoff: seconds before the second try; doubled for each further one, up to 10 s, and shortened by chance.
        tries: no more than these; None: as many as fit into `seconds`.
    """

    seconds: float = RETRY_FOR
    backoff: float = BACKOFF
    tries: int | None = None


class Patience:
    """Counts the tries of one call.

    A server that has not answered once yet is given up after a few seconds, unless the caller asked for a certain time:
    its address is more likely wrong than its network.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        seconds: float | None = None,
        answered: Callable[[], bool] = lambda: True,
        begin: float | None = None,
    ) -> None:
        self._policy = policy
        self._seconds = policy.seconds if seconds is None else seconds
        self._insistent = seconds is not None
        self._answered = answered
        self._begin = time.monotonic() if begin is None else begin
        self._tries = 0
        self._renewed = False

    async def wait(self, failure: Transient) -> bool:
        """Wait before the next try; False if there should be none."""
        if failure.renew is not None:
            first, self._renewed = not self._renewed, True
            return first and await failure.renew()
        self._tries += 1
        delay = self._delay(failure)
        if delay is None:
            return False
        log.warning("%s; trying again in %.1f s", failure.error, delay)
        await anyio.sleep(delay)
        return True

    def verdict(self, failure: Transient) -> TrackingError:
        """The error to raise at the end of patience."""
        error = failure.error
        if self._tries > 1:
            error.args = (f"{error} (tried {self._tries} times in {time.monotonic() - self._begin:.0f} s)",)
        return error

    def _delay(self, failure: Transient) -> float | None:
        policy = self._policy
        budget, tries = self._seconds, policy.tries
        if not (failure.connected or self._answered() or self._insistent):
            budget, tries = (
                min(budget, _FIRST_CONTACT_SECONDS),
                min(tries or _FIRST_CONTACT_TRIES, _FIRST_CONTACT_TRIES),
            )
        remaining = budget - (time.monotonic() - self._begin)
        if remaining <= 0 or (tries is not None and self._tries >= tries):
            return None
        delay: float = min(policy.backoff * 2 ** min(self._tries - 1, 16), _MAX_DELAY) * random.uniform(0.5, 1.0)  # noqa: S311
        if failure.retry_after is None:
            return min(delay, remaining)
        # Everybody is told the same time; the share of backoff on top keeps them from coming back all at once.
        return failure.retry_after + delay if failure.retry_after < remaining else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of a ``Retry-After`` header, which holds seconds or a date (RFC 9110, 10.2.3)."""
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
