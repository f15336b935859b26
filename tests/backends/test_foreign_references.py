"""References to runs in tags that somebody else has written: only the user's own runs are read, awaited and ended."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlfleet import Fleet
from mlfleet.backends.docker import DockerBackend
from mlfleet.backends.local.run_folder import this_process
from mlfleet.errors import BackendError, MlfleetError, RunLost, SpecError, UsageError
from mlfleet.runs import JobRef, RunStatus
from mlfleet.testing import FakeTracking

RUN_ID = "f" * 32


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
async def fleet(tracking: FakeTracking) -> AsyncIterator[Fleet]:
    async with Fleet(tracking=tracking) as fleet:
        yield fleet


async def foreign_run(tracking: FakeTracking, backend: str = "local", **data: Any) -> str:
    """Make a run whose reference says what its author likes, but for the machine and a driver that is gone."""
    here = {**await asyncio.to_thread(this_process), "driver_started": 1} if backend == "local" else {}
    run = await tracking.create_run("0", name=None, tags={})
    reference = JobRef(backend, run.run_id, {**here, **data})
    await tracking.log(run.run_id, tags={JobRef.TAG: reference.to_json()})
    return run.run_id


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A folder as that of a run whose shell lives; its process is not one of mlfleet's."""
    folder = tmp_path / "planted"
    folder.mkdir()
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        (folder / "process").write_bytes(Path(f"/proc/{process.pid}/stat").read_bytes())
        yield folder, process
        process.kill()


async def test_only_the_output_of_the_run_itself_is_printed(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("hush-hush\n")
    run_id = await foreign_run(tracking, folder=str(tmp_path), output=str(tmp_path / "secret"))
    with pytest.raises(UsageError, match="is not kept on this machine"):
        await anext((await fleet.get(run_id)).logs(follow=False))


async def test_a_process_that_a_planted_folder_names_is_not_ended(
    fleet: Fleet, tracking: FakeTracking, planted: tuple[Path, subprocess.Popen[bytes]]
) -> None:
    folder, process = planted
    run_id = await foreign_run(tracking, folder=str(folder), output=None)
    with pytest.raises(BackendError, match=r"has no folder in .*runs.*set MLFLEET_STATE_DIR"):
        await (await fleet.get(run_id)).cancel(grace=0)
    with pytest.raises(BackendError, match="has no folder in"):
        await fleet.attach(run_id)
    assert process.poll() is None
    assert tracking.runs[run_id].status is RunStatus.RUNNING


async def test_a_folder_of_a_run_that_leads_elsewhere_is_not_read(
    fleet: Fleet, tracking: FakeTracking, planted: tuple[Path, subprocess.Popen[bytes]]
) -> None:
    folder, process = planted
    run_id = await foreign_run(tracking, folder=str(folder), output=None)
    own = Path(os.environ["MLFLEET_STATE_DIR"], "runs", run_id)
    own.parent.mkdir(parents=True)
    own.symlink_to(folder)
    with pytest.raises(BackendError, match="is not a folder of this user"):
        await (await fleet.get(run_id)).cancel(grace=0)
    assert process.poll() is None


async def test_waiting_makes_no_folder_elsewhere(fleet: Fleet, tracking: FakeTracking, tmp_path: Path) -> None:
    run_id = await foreign_run(tracking, folder=str(tmp_path / "made"), output=None)
    with pytest.raises(BackendError, match="has no folder in"):
        await (await fleet.get(run_id)).wait()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["../../../../secrets", "a b", "?x"])
async def test_a_name_that_is_not_that_of_a_container_is_not_asked_for(name: str) -> None:
    with pytest.raises(RunLost, match="names no container"):
        await DockerBackend().attach(JobRef("docker", RUN_ID, {"container": name}))


@pytest.mark.parametrize(
    "data",
    [{"driver": "x", "driver_started": 1.0}, {"driver": [], "driver_started": {}}, {"folder": None, "grace": "x"}],
)
async def test_a_damaged_reference_is_a_short_error(fleet: Fleet, tracking: FakeTracking, data: dict[str, Any]) -> None:
    run_id = await foreign_run(tracking, **{"folder": "/", "output": None, **data})
    run = await fleet.get(run_id)
    for work in (run.cancel, run.wait):
        with pytest.raises(MlfleetError, match=f"run {run_id} (has no folder|is damaged)"):
            await work()


async def test_a_reference_of_endless_depth_is_a_short_error(fleet: Fleet, tracking: FakeTracking) -> None:
    run_id = await foreign_run(tracking)
    tracking.runs[run_id].tags[JobRef.TAG] = "[" * 100_000
    with pytest.raises(SpecError, match="not a reference to a run"):
        await fleet.attach(run_id)
