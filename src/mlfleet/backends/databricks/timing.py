"""How often a workspace is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Timing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How often a workspace is asked; seconds, where nothing else is said.

    Attributes:
        young: the age up to which a run is polled often.
        fast: between polls of young runs.
        slow: between polls of old runs, at most.
        not_yet: for which a new run may not be known everywhere in Databricks.
        after_failure: between polls while they fail.
        paces: requests a second by kind. A workspace takes 35, 100 and 100:
            https://docs.databricks.com/aws/en/resources/limits
    """

    young: float = 60.0
    fast: float = 1.5
    slow: float = 30.0
    not_yet: float = 30.0
    after_failure: float = 10.0
    paces: Mapping[str, float] = field(
        default_factory=lambda: {"runs/submit": 30.0, "runs/get": 80.0, "runs/get-output": 80.0, "runs/list": 20.0}
    )
