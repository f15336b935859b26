"""One build for all: many callers, several processes, failures, cancellations, and processes that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from anyio import to_thread

from components.packages import Package, make_package
from mlfleet._environments.manager import EnvironmentManager, EnvironmentPlan, PreparedEnvironment, create_manager
from mlfleet._environments.store import list_environments, prune
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet.errors import EnvironmentSetupError

pytestmark = pytest.mark.timeout(120)  # real builds on a busy machine

DRIVER = """
import asyncio, sys
from pathlib import Path
from mlfleet._environments.manager import create_manager
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind

async def main():
    project = Path(sys.argv[1])
    chosen = create_manager("virtualenv")
    plan = chosen.plan(project, EnvironmentFile(EnvironmentFileKind.PYTHON_ENV, project / "python_env.yaml"))
    prepared = await asyncio.gather(*(chosen.prepare(plan) for _ in range(5)))
    assert len(set(each.root for each in prepared)) == 1
    print(prepared[0].root)

asyncio.run(main())
"""


@pytest.fixture
def package(tmp_path: Path) -> Package:
    package = make_package(tmp_path / "project" / "package")
    (package.folder.parent / "python_env.yaml").write_text("dependencies: [./package]\n")
    return package


@pytest.fixture
def chosen() -> EnvironmentManager:
    return create_manager("virtualenv")


async def plan_of(chosen: EnvironmentManager, package: Package) -> EnvironmentPlan:
    project = package.folder.parent
    source = EnvironmentFile(EnvironmentFileKind.PYTHON_ENV, project / "python_env.yaml")
    return await to_thread.run_sync(chosen.plan, project, source)


def value_in(environment: PreparedEnvironment) -> str:
    argv = ["python", "-c", "import tinypkg; print(tinypkg.VALUE)"]
    completed = subprocess.run(argv, env=environment.apply(os.environ), check=True, capture_output=True, text=True)
    return completed.stdout.strip()


def start_driver(package: Package) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", DRIVER, str(package.folder.parent)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def leftovers(root: Path) -> list[str]:
    """Return the entries of the shared folder except lock files."""
    return [name for name in os.listdir(root) if name != ".locks"] if root.exists() else []


def root_folder() -> Path:
    return Path(os.environ["MLFLEET_CACHE_DIR"], "envs")


async def test_two_hundred_callers_share_one_build(chosen: EnvironmentManager, package: Package) -> None:
    plan = await plan_of(chosen, package)
    heard: list[list[str]] = [[] for _ in range(200)]
    prepared = await asyncio.gather(*(chosen.prepare(plan, on_progress=lines.append) for lines in heard))
    assert package.builds == 1
    assert len({each.root for each in prepared}) == 1
    assert value_in(prepared[0]) == "1"
    assert heard[0]
    assert all(lines == heard[0] for lines in heard)
    # Those who come later find it there.
    await asyncio.gather(*(chosen.prepare(plan) for _ in range(20)))
    assert package.builds == 1


async def test_several_processes_share_one_build(package: Package) -> None:
    drivers = [start_driver(package) for _ in range(4)]
    roots = {(await to_thread.run_sync(driver.communicate))[0] for driver in drivers}
    assert [driver.returncode for driver in drivers] == [0] * 4
    assert len(roots) == 1
    assert package.builds == 1


async def test_a_failed_build_leaves_nothing_and_is_tried_again(chosen: EnvironmentManager, package: Package) -> None:
    plan = await plan_of(chosen, package)
    package.break_build("the compiler is on holiday")
    results = await asyncio.gather(*(chosen.prepare(plan) for _ in range(10)), return_exceptions=True)
    assert all(isinstance(each, EnvironmentSetupError) for each in results)
    assert "the compiler is on holiday" in str(results[0])
    assert package.builds == 1
    assert leftovers(root_folder()) == []
    package.mend()
    assert value_in(await chosen.prepare(plan)) == "1"


async def test_a_cancelled_caller_leaves_the_build_to_the_others(chosen: EnvironmentManager, package: Package) -> None:
    plan = await plan_of(chosen, package)
    package.hold_builds()
    lines: list[str] = []
    first, second = (
        asyncio.create_task(chosen.prepare(plan, on_progress=lines.append)),
        asyncio.create_task(chosen.prepare(plan)),
    )
    gate = await package.reached()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    heard = len(lines)
    os.close(gate)
    assert value_in(await second) == "1"
    assert package.builds == 1
    assert len(lines) == heard


async def test_the_last_callers_cancellation_ends_the_build(chosen: EnvironmentManager, package: Package) -> None:
    plan = await plan_of(chosen, package)
    package.hold_builds()
    callers = [asyncio.create_task(chosen.prepare(plan)) for _ in range(3)]
    gate = await package.reached()
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    assert all(caller.cancelled() for caller in callers)
    with pytest.raises(BrokenPipeError):  # the process that waited at the gate is gone
        os.write(gate, b"x")
    os.close(gate)
    assert leftovers(root_folder()) == []
    package.let_builds_through()
    assert value_in(await chosen.prepare(plan)) == "1"


async def test_an_environment_of_a_killed_builder_is_built_again(chosen: EnvironmentManager, package: Package) -> None:
    package.hold_builds()
    with start_driver(package) as driver:
        gate = await package.reached()
        driver.kill()
        await to_thread.run_sync(driver.wait)
    assert driver.returncode == -signal.SIGKILL
    assert [each.complete for each in await to_thread.run_sync(list_environments)] == [False]
    # Its pip was not killed, and still waits in the middle of the build that nobody owns any more.
    os.write(gate, b"x")
    package.let_builds_through()
    environment = await chosen.prepare(await plan_of(chosen, package))
    assert package.builds == 2
    os.close(gate)
    assert value_in(environment) == "1"
    (stored,) = await to_thread.run_sync(list_environments)
    assert stored.complete


async def test_prune_during_runs_and_builds(chosen: EnvironmentManager, package: Package) -> None:
    plan = await plan_of(chosen, package)
    package.hold_builds()
    caller = asyncio.create_task(chosen.prepare(plan))
    gate = await package.reached()
    assert await to_thread.run_sync(prune) == []  # being built
    os.close(gate)
    environment = await caller
    assert await to_thread.run_sync(prune) == []  # in use
    assert value_in(environment) == "1"


async def test_a_failing_listener_does_not_affect_the_build(chosen: EnvironmentManager, package: Package) -> None:
    def fail(line: str) -> None:
        raise ZeroDivisionError(line)

    plan = await plan_of(chosen, package)
    with contextlib.suppress(ZeroDivisionError):
        assert value_in(await chosen.prepare(plan, on_progress=fail)) == "1"
    assert package.builds == 1
