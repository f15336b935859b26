"""For people who test code that uses mlfleet, and for authors of backends.

`FakeTracking` is a tracking server in memory. `BackendContract` is the suite that every backend passes; it needs
``pip install 'mlfleet[testing]'``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mlfleet.testing.tracking import FakeTracking, RecordedRun

if TYPE_CHECKING:
    from mlfleet.testing.contract import BackendContract, Bench, Harness

__all__ = ["BackendContract", "Bench", "FakeTracking", "Harness", "RecordedRun"]


def __getattr__(name: str) -> object:
    # What needs pytest is imported only by those who ask for it.
    if name not in ("BackendContract", "Bench", "Harness"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    pytest = importlib.import_module("pytest")
    # So that its asserts tell the values.
    pytest.register_assert_rewrite("mlfleet.testing.contract")
    return getattr(importlib.import_module("mlfleet.testing.contract"), name)
