"""Which failures are tried again, and when."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from mlfleet.errors import UsageError
from mlfleet.runs import FailureKind

__all__ = ["Retry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often a point of a sweep is tried. Its parameters never change.

    Attributes:
        attempts: how often at most, the first time included.
        on: the kinds of failure that are tried again, as `FailureKind` or its text; all by default. A point whose own
            parameters are wrong is never tried again.
        backoff: seconds before the second attempt, about: it is spread by half, so that many that failed together do
            not come back together. Doubled before each further attempt.
        max_backoff: seconds that no wait exceeds.
    """

    attempts: int = 1
    on: Collection[FailureKind | str] = frozenset(FailureKind)
    backoff: float = 1.0
    max_backoff: float = 60.0

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or self.attempts < 1:
            raise UsageError(f"Retry: attempts is {self.attempts!r}: give 1 (no retry) or more")
        for name in ("backoff", "max_backoff"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"Retry: {name} is {getattr(self, name)!r}: give seconds that are not negative")
        kinds = {self.on} if isinstance(self.on, str) else self.on
        try:
            object.__setattr__(self, "on", frozenset(FailureKind(kind) for kind in kinds))
        except ValueError as error:
            known = ", ".join(FailureKind)
            raise UsageError(f"Retry: {error}: the kinds of failure are {known}") from error

    def again(self, kind: FailureKind | None, tries: int) -> bool:
        """Whether a point that failed so is tried again, after as many tries."""
        return kind in self.on and tries < self.attempts

    def delay(self, tries: int) -> float:
        """Seconds to wait after as many tries."""
        spread = random.uniform(0.5, 1.5)  # noqa: S311 - nothing secret depends on it
        return float(min(self.backoff * 2 ** min(tries - 1, 60) * spread, self.max_backoff))
