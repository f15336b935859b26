"""The settings of a sweep, checked as far as that needs no project."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mlfleet._engine.request import RunOptions, RunRequest
from mlfleet.errors import UsageError
from mlfleet.runs import FailureKind, check_seconds

_NO_NAME = re.compile(r"""['"`\\%\x00-\x1f\ud800-\udfff]""")

__all__ = ["GIVE_UP_AFTER", "OnFailure", "Resume", "Retry", "SweepOptions", "SweepSettings"]

OnFailure = Literal["continue", "stop"]
"""The effect of a failed point on the others."""

Resume = bool | Literal["changed"]
"""True continues an earlier sweep; ``"changed"`` does so even if the project has changed since."""

GIVE_UP_AFTER = 10
"""The default number of first runs that must all fail early before a sweep gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """The rule by which a failed point of a sweep is tried again, with the same parameters.

    Attributes:
        attempts: The largest number of attempts, including the first one. Default: 1, no retry.
        on: The kinds of failure that are tried again, as `FailureKind` or its text. Default: all. A point whose own
            parameters are wrong is never tried again.
        backoff: Seconds before the second attempt, doubled before each further one. Each wait is randomly half as long
            to one and a half times as long, so that points that failed together do not start together. Default: 1.
        max_backoff: The longest wait in seconds. Default: 60.
    """

    attempts: int = 1
    on: Collection[FailureKind | str] = frozenset(FailureKind)
    backoff: float = 1.0
    max_backoff: float = 60.0

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or self.attempts < 1:
            raise UsageError(f"Retry: attempts is {self.attempts!r}: give 1 (no retry) or more")
        for name in ("backoff", "max_backoff"):
            check_seconds(f"Retry: {name}", getattr(self, name))
        kinds = {self.on} if isinstance(self.on, str) else self.on
        try:
            object.__setattr__(self, "on", frozenset(FailureKind(kind) for kind in kinds))
        except ValueError as error:
            known = ", ".join(FailureKind)
            raise UsageError(f"Retry: {error}: the kinds of failure are {known}") from error

    def again(self, kind: FailureKind | None, tries: int) -> bool:
        """Return True if a point is tried again after a failure of that kind and that many tries."""
        return kind in self.on and tries < self.attempts

    def delay(self, tries: int) -> float:
        """Return the seconds to wait after that many tries."""
        spread = random.uniform(0.5, 1.5)  # noqa: S311 - not for secrets
        return float(min(self.backoff * 2 ** min(tries - 1, 60) * spread, self.max_backoff))


class SweepOptions(RunOptions, total=False):
    """The arguments of `Fleet.sweep` after the first two, for functions that pass them on."""

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
    group: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """The checked arguments of `Fleet.sweep`.

    Attributes:
        request: The request that all runs share.
        name: The name of the sweep; None if it has none and cannot be resumed.
        resume: Continue the sweep of that name, if it exists.
        retry_failed: Run failed points again when resuming.
        max_concurrent: The number of points that are active at the same time; None: as many as the Fleet admits.
        max_failures: The number of failed points that ends the sweep; None: any number may fail.
        give_up_after: The number of first runs that must all fail early before the sweep ends; None: it never does.
        retry: The rule by which failed points are tried again.
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
        """Return the request of one point."""
        return replace(self.request, parameters={**self.request.parameters, **point})

    def __post_init__(self) -> None:
        if self.request.run_id is not None:
            raise UsageError("a sweep makes its own MLflow runs: run_id cannot be given")
        if self.name is None and self.resume:
            raise UsageError("resume needs the name of the sweep: give name= as well")
        if self.name is not None and (not self.name.strip() or _NO_NAME.search(self.name)):
            raise UsageError(
                f"the sweep's name is {self.name!r}: give a text without quotes, percent signs and backslashes"
            )
        if self.resume not in (True, False, "changed"):
            raise UsageError(f"resume is {self.resume!r}: give True, False or 'changed'")
        for option in ("max_concurrent", "max_failures", "give_up_after"):
            count = getattr(self, option)
            if count is not None and (type(count) is not int or count < 1):
                raise UsageError(f"{option} is {count!r}: give 1 or more, or None")
