"""What a sweep is asked to be, checked as far as that needs no project."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mlfleet._engine.request import RunOptions, RunRequest
from mlfleet.errors import UsageError
from mlfleet.runs import FailureKind

__all__ = ["GIVE_UP_AFTER", "OnFailure", "Resume", "Retry", "SweepOptions", "SweepSettings"]

OnFailure = Literal["continue", "stop"]
"""What a failed point means for the others."""

Resume = bool | Literal["changed"]
"""Whether to go on with an earlier sweep; ``"changed"``: also if the project is another one by now."""

GIVE_UP_AFTER = 10


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


class SweepOptions(RunOptions, total=False):
    """The arguments of `Fleet.sweep` after the first two, for those who pass them on."""

    entry_point: str
    version: str | None
    parameters: Mapping[str, Any] | None
    name: str | None
    resume: Resume
    retry_failed: bool
    max_concurrent: int | None
    on_failure: OnFailure
    max_failures: int | None
    give_up_after: int | None
    retry: Retry | None
    timeout: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """See `Fleet.sweep`.

    Attributes:
        request: what all runs have in common.
        name: of the sweep.
        resume: whether to go on with the sweep of that name.
        retry_failed: whether to run again what failed in it.
        max_concurrent: how many runs at once; None: as many as the Fleet lets run.
        max_failures: how many points may fail before the sweep stops; None: all.
        give_up_after: stop if the first so many runs all fail at once; None: never.
        retry: of failed points.
    """

    request: RunRequest
    name: str | None = None
    resume: Resume = False
    retry_failed: bool = True
    max_concurrent: int | None = None
    max_failures: int | None = None
    give_up_after: int | None = GIVE_UP_AFTER
    retry: Retry = field(default_factory=Retry)

    def request_for(self, point: Mapping[str, Any]) -> RunRequest:
        """The request of one point."""
        return replace(self.request, parameters={**self.request.parameters, **point})

    def __post_init__(self) -> None:
        if self.request.run_id is not None:
            raise UsageError("a sweep makes its own MLflow runs: run_id cannot be given")
        if self.name is None and self.resume:
            raise UsageError("resume needs the name of the sweep: give name= as well")
        if self.name is not None and (not self.name.strip() or any(c in "'\"`\\%" or c < " " for c in self.name)):
            raise UsageError(
                f"the sweep's name is {self.name!r}: give a text without quotes, percent signs and backslashes"
            )
        if self.resume not in (True, False, "changed"):
            raise UsageError(f"resume is {self.resume!r}: give True, False or 'changed'")
        for option in ("max_concurrent", "max_failures", "give_up_after"):
            count = getattr(self, option)
            if count is not None and (type(count) is not int or count < 1):
                raise UsageError(f"{option} is {count!r}: give 1 or more, or None")
