"""Environment variables that the caller gives a run: they reach the command, and their values nothing else."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.projects import write_project
from mlfleet import Fleet, RunOptions, RunStatus, Timeouts, grid
from mlfleet._engine.request import RunRequest
from mlfleet.errors import UsageError
from mlfleet.runs import RunEvent
from mlfleet.testing import FakeTracking

VALUE = "correct-horse battery"


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
async def fleet(tracking: FakeTracking) -> AsyncIterator[Fleet]:
    async with Fleet(tracking=tracking, max_concurrent=4, timeouts=Timeouts(cancel_grace=0.5)) as fleet:
        yield fleet


def files_with(text: str, folder: Path) -> list[Path]:
    """The files below a folder that hold a text."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize("value", ["", "a=b", " two words ", "first\nsecond\n", "größer \N{SNOWMAN}", "x" * 131_000])
async def test_a_variable_of_any_text_reaches_the_command(fleet: Fleet, tmp_path: Path, value: str) -> None:
    uri = write_project(tmp_path / "demo", 'printf %s "$GIVEN" > ../got')
    run = await fleet.submit(uri, env={"GIVEN": value}, env_manager="local")
    assert await run.wait(), await run.outcome()
    assert (tmp_path / "got").read_text() == value


async def test_a_given_variable_counts_more_than_the_callers(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOTH", "of the caller")
    monkeypatch.setenv("ONE", "of the caller")
    uri = write_project(tmp_path / "demo", 'echo "$BOTH, $ONE"')
    run = await fleet.submit(uri, env={"BOTH": "given"}, env_manager="local")
    assert [line async for line in run.logs()] == ["given, of the caller"]


async def test_a_durable_run_gets_variables_of_any_name(fleet: Fleet, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo {n} $record $code > ../got", parameters="n: string")
    env = {"record": "of the caller", "code": "as well"}
    async with fleet.sweep(uri, grid(n=[1]), name="lr", env=env, env_manager="local") as sweep:
        assert (await sweep.result()).status is RunStatus.FINISHED
    assert (tmp_path / "got").read_text() == "1 of the caller as well\n"


async def test_more_variables_than_the_system_takes_are_the_reason_of_the_failure(fleet: Fleet, tmp_path: Path) -> None:
    env = {f"LARGE_{n}": "x" * 130_000 for n in range(60)}
    run = await fleet.submit(write_project(tmp_path / "demo", "true"), env=env, env_manager="local")
    reason = (await run.outcome()).reason or ""
    assert reason.endswith("the command with its environment variables is longer than the system allows")
    assert "Install" not in reason


async def test_the_value_of_a_variable_shows_nowhere(
    tracking: FakeTracking, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLEET_STATE_DIR", "MLFLEET_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    caplog.set_level(logging.DEBUG)
    events: list[RunEvent] = []
    # The shell of a durable run is the parent of its command's.
    uri = write_project(
        tmp_path / "demo",
        "tr '\\0' ' ' < /proc/$PPID/cmdline; tr '\\0' ' ' < /proc/$$/cmdline; test ${#GIVEN} = 21; exit $(({n} + $?))",
        parameters="n: string",
    )
    async with Fleet(tracking=tracking, on_event=events.append) as fleet:
        space = grid(n=[0, 3])
        async with fleet.sweep(uri, space, name="lr", env={"GIVEN": VALUE}, env_manager="local") as sweep:
            result = await sweep.result()
    assert [each.exit_code for each in result.results] == [0, 3]
    assert VALUE not in caplog.text
    assert VALUE not in repr(events)
    assert VALUE not in repr(result)
    assert VALUE not in repr(tracking.runs)
    assert await anyio.to_thread.run_sync(files_with, VALUE, tmp_path) == []
    assert VALUE not in repr(RunRequest.of(uri, env={"GIVEN": VALUE}))


async def test_a_resumed_sweep_asks_for_the_variables_of_its_runs(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path
) -> None:
    uri = write_project(tmp_path / "demo", "test -e ../go && echo $TOKEN $LEVEL >> ../got", parameters="n: string")
    async with fleet.sweep(
        uri, grid(n=[1]), env={"TOKEN": VALUE, "LEVEL": "7"}, name="lr", env_manager="local"
    ) as sweep:
        assert (await sweep.result()).status is RunStatus.FAILED
    assert tracking.runs[sweep.run_id].tags["mlfleet.sweep.env"] == "LEVEL TOKEN"
    (tmp_path / "go").touch()
    with pytest.raises(UsageError) as caught:
        async with fleet.sweep(uri, grid(n=[1]), name="lr", resume=True, env={"LEVEL": "7"}, env_manager="local"):
            pass
    assert "'lr' have the environment variables TOKEN, whose values are not kept" in str(caught.value)
    assert "env={'TOKEN': …} (--env TOKEN copies" in str(caught.value)
    assert tracking.runs[sweep.run_id].status is RunStatus.FAILED
    env = {"TOKEN": "new", "LEVEL": "8", "MORE": "1"}
    async with fleet.sweep(uri, grid(n=[1]), name="lr", resume=True, env=env, env_manager="local") as again:
        assert (await again.result()).status is RunStatus.FINISHED
    assert (tmp_path / "got").read_text() == "new 8\n"
    assert tracking.runs[sweep.run_id].tags["mlfleet.sweep.env"] == "LEVEL MORE TOKEN"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"MLFLOW_RUN_ID": VALUE}, r"MLFLOW_RUN_ID is set by mlfleet for each run: give run_id \(--run-id\)"),
        ({"MLFLOW_TRACKING_URI": VALUE}, r"give tracking_uri \(--tracking-uri\)"),
        ({"MLFLEET_DRIVER": VALUE}, "MLFLEET_DRIVER is set by mlfleet"),
        ({"__mlfleet_1": VALUE}, "__mlfleet_1 is set by mlfleet"),
        ({"": VALUE}, "env has the name '': names consist of"),
        ({"1ST": VALUE}, "the name '1ST'"),
        ({"A=B": VALUE}, "the name 'A=B'"),
        ({"NAÏVE": VALUE}, "the name 'NAÏVE'"),
        ({"A\n": VALUE}, r"the name 'A\\n'"),
        ({3: VALUE}, "the name '3'"),
        ({"N": 3}, "the value of N is int: give a text"),
        ({"N": None}, "the value of N is NoneType"),
        ({"N": f"{VALUE}\0"}, "the value of N has a NUL character"),
        ({"N": f"{VALUE}\udcff"}, "the value of N is not Unicode text"),
        ({"N": "ä" * 100_000}, r"N has 200,002 bytes, and systems take at most 131,071 .* write the value to a file"),
        ([("N", VALUE)], "env is list: give a mapping"),
        (VALUE, "env is str: give a mapping"),
    ],
)
async def test_variables_that_cannot_be_are_refused_before_anything_exists(
    fleet: Fleet, tracking: FakeTracking, tmp_path: Path, env: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        await fleet.submit(write_project(tmp_path / "demo", "true"), env=env, env_manager="local")
    assert VALUE not in str(caught.value)
    assert not tracking.runs


@given(st.dictionaries(st.text(max_size=8), st.text(alphabet=st.characters(), min_size=8), min_size=1))
def test_any_mapping_of_texts_is_taken_as_it_is_or_refused_without_its_values(env: dict[str, str]) -> None:
    refusal = ""
    taken: object = None
    try:
        taken = RunRequest.of("x", env=env).env
    except UsageError as error:
        refusal = str(error)
    if refusal:
        assert not any(value in refusal for value in env.values() if len(set(value)) > 2)
    else:
        assert taken == env
        subprocess.run(["true"], env=env, check=True)


async def test_a_variable_by_which_the_run_finds_tracking_is_refused(tmp_path: Path) -> None:
    tracking = FakeTracking()
    tracking.environment = {"TEAM_LOGIN": "x"}
    async with Fleet(tracking=tracking) as fleet:
        with pytest.raises(UsageError, match="TEAM_LOGIN is set by mlfleet for each run: leave it out"):
            await fleet.submit(write_project(tmp_path / "demo", "true"), env={"TEAM_LOGIN": "y"}, env_manager="local")
    databricks = FakeTracking(uri="databricks")
    async with Fleet(tracking=databricks) as fleet:
        with pytest.raises(UsageError, match="DATABRICKS_TOKEN is set by mlfleet"):
            await fleet.submit(
                write_project(tmp_path / "demo", "true"), env={"DATABRICKS_TOKEN": "y"}, env_manager="local"
            )
    assert not tracking.runs
    assert not databricks.runs


async def test_the_callers_mapping_may_change_afterwards(fleet: Fleet, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "read line < gate; echo $GIVEN")
    os.mkfifo(tmp_path / "demo" / "gate")
    env = {"GIVEN": "first"}
    options: RunOptions = {"env": env, "env_manager": "local"}
    run = await fleet.submit(uri, **options)
    env["GIVEN"] = "second"
    await anyio.to_thread.run_sync((tmp_path / "demo" / "gate").write_text, "go\n")
    assert [line async for line in run.logs()] == ["first"]


async def test_the_reason_of_a_failure_does_not_show_the_value_of_a_variable(
    tracking: FakeTracking, tmp_path: Path
) -> None:
    async with Fleet(tracking=tracking) as fleet:
        uri = write_project(tmp_path / "demo", "true")
        run = await fleet.submit(
            uri, env={"PATH": f"/nowhere/{VALUE}:/nor/here", "HIDDEN": "/nor/here"}, env_manager="local"
        )
        outcome = await run.outcome()
    assert outcome.status is RunStatus.FAILED
    assert VALUE not in json.dumps([outcome.reason, tracking.runs[run.run_id].tags])
