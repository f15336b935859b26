"""The log records of runs have the id of their run."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from components.projects import write_project
from mlfleet import BackendError, Fleet, Timeouts, TrackingError
from mlfleet._run_log import about_run
from mlfleet.backends._remote.state_cache import StateCache
from mlfleet.testing import FakeTracking


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
async def fleet(tracking: FakeTracking) -> AsyncIterator[Fleet]:
    async with Fleet(
        tracking=tracking, max_concurrent=2, timeouts=Timeouts(cancel_grace=0.5), tracking_patience=0.1
    ) as fleet:
        yield fleet


def run_ids(caplog: pytest.LogCaptureFixture, words: str) -> list[str | None]:
    return [record.__dict__["run_id"] for record in caplog.records if words in record.getMessage()]


async def test_records_of_runs_at_the_same_time_each_have_the_id_of_their_own(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = write_project(tmp_path / "demo", "sleep 600 & echo begun; while [ ! -e ../go ]; do sleep 0.05; done")
    runs = [await fleet.submit(uri, env_manager="local") for _ in range(2)]
    for run in runs:
        assert await anext(run.logs()) == "begun"
    tracking.fail = lambda method: TrackingError("away") if method == "update_run" else None
    (tmp_path / "go").touch()
    for run in runs:
        await run.wait()
    expected = {run.run_id for run in runs}
    assert set(run_ids(caplog, "could not be written")) == expected
    left = [record for record in caplog.records if "ended and left" in record.getMessage()]
    assert {record.__dict__["run_id"] for record in left} == expected
    assert all(record.__dict__["run_id"] in record.getMessage() for record in left)


async def test_what_serves_many_runs_does_not_have_the_id_of_the_first(caplog: pytest.LogCaptureFixture) -> None:
    async def feed(cache: StateCache[str]) -> None:
        raise ValueError("the watch is broken")

    with about_run("a" * 32):
        async with StateCache(feed, name="the watch") as cache:
            cell = cache.track("key")
            with pytest.raises(BackendError):
                await cell.until(lambda state: True)
    assert run_ids(caplog, "the watch has failed") == [None]


async def test_a_format_with_the_id_serves_all_records_of_mlfleet(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("mlfleet.runs").warning("of no run")
    [record] = caplog.records
    assert logging.Formatter("%(run_id)s: %(message)s").format(record) == "None: of no run"
