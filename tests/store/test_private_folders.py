"""Folders that others can write to are refused, as is what others have put into them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from anyio import to_thread

from components.projects import write_project
from mlfleet import Fleet, UsageError
from mlfleet._environments.manager import create_manager
from mlfleet._environments.store import list_environments, open_store
from mlfleet.testing import FakeTracking
from mlfleet.tracking import open_tracking

OTHER = 12345

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def open_mask() -> Iterator[None]:
    """Let new folders be as open as the code allows."""
    before = os.umask(0)
    yield
    os.umask(before)


def folder(path: Path, mode: int) -> Path:
    path.mkdir(parents=True)
    path.chmod(mode)
    return path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


async def run(project: Path, tracking: FakeTracking, env_manager: str = "local") -> None:
    async with Fleet(tracking=tracking) as fleet:
        await fleet.submit(str(project), env_manager=env_manager)


def zipped(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "project.zip", "w") as archive:
        archive.writestr("MLproject", "entry_points: {main: {command: 'true'}}\n")
    return tmp_path / "project.zip"


@pytest.mark.parametrize("variable", ["MLFLOW_ENV_ROOT", "MLFLEET_CACHE_DIR", "MLFLEET_STATE_DIR"])
@pytest.mark.parametrize("where", ["itself", "above", "behind a link", "sticky"])
async def test_a_folder_that_others_can_write_to_is_refused_before_there_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, where: str
) -> None:
    shared = folder(tmp_path / "shared", 0o1777 if where == "sticky" else 0o777)
    used = shared
    if where == "above":
        used = folder(shared / "mine", 0o700)
    elif where == "behind a link":
        used = tmp_path / "link"
        used.symlink_to(folder(shared / "mine", 0o700))
    monkeypatch.setenv(variable, str(used))
    project = zipped(tmp_path) if variable == "MLFLEET_CACHE_DIR" else Path(write_project(tmp_path / "demo", "true"))
    tracking = FakeTracking()
    with pytest.raises(UsageError) as caught:
        await run(project, tracking, "virtualenv" if variable == "MLFLOW_ENV_ROOT" else "local")
    text = str(caught.value)
    assert f"other users can write to {shared}; `chmod go-w {shared}`" in text
    assert variable in text
    assert f"list {used} in MLFLEET_TRUSTED_FOLDERS" in text
    assert not tracking.runs
    assert list(used.iterdir()) == []


async def test_a_shared_folder_is_used_when_the_user_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MLFLEET_CACHE_DIR", "MLFLEET_STATE_DIR", "MLFLOW_ENV_ROOT"):
        monkeypatch.setenv(variable, str(folder(tmp_path / "shared" / variable, 0o777)))
    monkeypatch.setenv("MLFLEET_TRUSTED_FOLDERS", f"/nowhere:{tmp_path}/shared")
    await run(zipped(tmp_path), FakeTracking())
    await to_thread.run_sync(create_manager("virtualenv").plan, tmp_path, None)
    monkeypatch.setenv("MLFLEET_TRUSTED_FOLDERS", "/nowhere")
    with pytest.raises(UsageError, match="MLFLEET_TRUSTED_FOLDERS"):
        await to_thread.run_sync(create_manager("virtualenv").plan, tmp_path, None)


async def test_new_folders_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sticky = folder(tmp_path / "like-tmp", 0o1777)
    for variable in ("MLFLEET_CACHE_DIR", "MLFLEET_STATE_DIR", "MLFLOW_ENV_ROOT"):
        monkeypatch.setenv(variable, str(sticky / "new" / variable))
    await run(zipped(tmp_path), FakeTracking())
    await to_thread.run_sync(create_manager("virtualenv").plan, tmp_path, None)
    assert mode(sticky / "new") == 0o755
    assert mode(sticky / "new" / "MLFLEET_CACHE_DIR") == mode(sticky / "new" / "MLFLEET_STATE_DIR") == 0o700
    assert mode(sticky / "new" / "MLFLOW_ENV_ROOT") == 0o755  # others may use what this user builds


async def test_the_folders_of_an_earlier_version_become_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("MLFLEET_CACHE_DIR", "MLFLEET_STATE_DIR"):
        monkeypatch.delenv(variable)
    for variable, name in (("XDG_CACHE_HOME", "cache"), ("XDG_STATE_HOME", "state")):
        monkeypatch.setenv(variable, str(tmp_path / name))
        folder(tmp_path / name / "mlfleet", 0o775)
    tmp_path.joinpath("cache").chmod(0o755)
    tmp_path.joinpath("state").chmod(0o755)
    await run(zipped(tmp_path), FakeTracking())
    assert mode(tmp_path / "cache" / "mlfleet") == mode(tmp_path / "state" / "mlfleet") == 0o700


@as_root
@pytest.mark.parametrize("what", ["folder", "above", "link"])
async def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    foreign = folder(tmp_path / "foreign", 0o755)
    used = folder(foreign / "envs", 0o755)
    if what == "link":
        used = tmp_path / "link"
        used.symlink_to(tmp_path / "foreign")
        os.lchown(used, OTHER, OTHER)
    else:
        os.chown(used if what == "folder" else foreign, OTHER, OTHER)
    monkeypatch.setenv("MLFLOW_ENV_ROOT", str(used))
    with pytest.raises(UsageError, match="belongs to the user 12345; choose another folder by MLFLOW_ENV_ROOT"):
        await run(Path(write_project(tmp_path / "demo", "true")), FakeTracking(), "virtualenv")


@as_root
async def test_a_home_folder_that_is_mounted_from_another_user_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = folder(tmp_path / "home", 0o755)
    os.chown(home, OTHER, OTHER)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("MLFLEET_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    await run(zipped(tmp_path), FakeTracking())
    assert mode(home / ".cache" / "mlfleet") == 0o700


@as_root
async def test_an_environment_that_another_user_planted_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENV_ROOT", str(tmp_path / "envs"))
    manager = create_manager("virtualenv")
    plan = await to_thread.run_sync(manager.plan, tmp_path, None)
    store, name = open_store(), f"virtualenv-{plan.key}"

    def plant() -> Path:
        planted = store.begin(name)
        (planted / "bin").mkdir(parents=True)
        (planted / "bin" / "python").write_text("#!/bin/sh\necho owned\n")
        store.publish(name, planted, {"must_exist": ["bin/python"]})
        return planted

    planted = await to_thread.run_sync(plant)
    assert (await manager.prepare(plan)).root == planted
    for path in (store.root / name, store.root / name / "environment.json", planted):
        os.chown(path, OTHER, OTHER)
        with pytest.raises(UsageError, match=r"belongs to the user 12345, and would be run.*TRUSTED_FOLDERS"):
            await create_manager("virtualenv").prepare(plan)
        os.chown(path, 0, 0)
    monkeypatch.setenv("MLFLEET_TRUSTED_FOLDERS", str(tmp_path / "envs"))
    os.chown(store.root / name, OTHER, OTHER)
    assert (await create_manager("virtualenv").prepare(plan)).root == planted
    assert len(await to_thread.run_sync(list_environments)) == 1


@as_root
async def test_a_fetched_project_that_another_user_planted_is_not_run(tmp_path: Path) -> None:
    archive = zipped(tmp_path)
    await run(archive, FakeTracking())
    cache = Path(os.environ["MLFLEET_CACHE_DIR"])
    for tree in cache.glob("projects/zip-*/trees/*"):
        os.chown(tree, OTHER, OTHER)
    tracking = FakeTracking()
    with pytest.raises(UsageError, match="in the folder of fetched projects belongs to the user 12345"):
        await run(archive, tracking)
    assert not tracking.runs


async def test_the_cache_is_private_when_only_its_locks_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLEET_CACHE_DIR", str(tmp_path / "cache"))
    async with open_tracking(f"sqlite:///{tmp_path}/mlflow.db"):
        assert mode(tmp_path / "cache") == 0o700
