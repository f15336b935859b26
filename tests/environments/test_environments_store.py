"""The shared folder: what counts as an environment, and what `prune` may remove."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from filelock import FileLock

from mlfleet._environments.store import list_environments, open_store, prune

NAME = "virtualenv-" + "0" * 32
OTHER = "uv-" + "1" * 32


@pytest.fixture(autouse=True)
def shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENV_ROOT", str(tmp_path))


def build(root: Path, name: str = NAME, *, days_ago: float = 0) -> Path:
    """An environment that no process uses, as if it was last used some days ago."""
    store = open_store(root)
    attempt = store.begin(name)
    (attempt / "bin").mkdir(parents=True)
    (attempt / "bin" / "python").write_text("x" * 5000)
    store.publish(name, attempt, {"python": "3.11.7", "source": "/p/python_env.yaml", "must_exist": ["bin/python"]})
    then = datetime.now(UTC).timestamp() - days_ago * 86400
    os.utime(root / name / "in-use", (then, then))
    return attempt


def test_only_a_published_folder_is_an_environment(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    attempt = store.begin(NAME)
    (attempt / "bin").mkdir(parents=True)
    assert store.acquire(NAME) is None
    assert [each.complete for each in list_environments()] == [False]
    finished = build(tmp_path)
    assert finished != attempt
    assert not attempt.exists()
    taken = store.acquire(NAME)
    assert taken is not None
    assert taken == finished


def test_an_environment_without_its_interpreter_is_not_found(tmp_path: Path) -> None:
    attempt = build(tmp_path)
    store = open_store(tmp_path)
    assert store.acquire(NAME) is not None
    (attempt / "bin" / "python").unlink()
    assert store.acquire(NAME) is None
    assert build(tmp_path) != attempt
    assert store.acquire(NAME) is not None
    assert not attempt.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"attempt": 3}', "\x00"])
def test_an_environment_with_a_damaged_description_is_not_found(tmp_path: Path, text: str) -> None:
    build(tmp_path)
    (tmp_path / NAME / "environment.json").write_text(text)
    assert open_store(tmp_path).acquire(NAME) is None
    assert [each.complete for each in list_environments()] == [False]


def test_an_environment_of_the_first_version_is_used(tmp_path: Path) -> None:
    content = tmp_path / NAME / "0a1b2c"
    (content / "bin").mkdir(parents=True)
    (content / "bin" / "python").touch()
    (tmp_path / NAME / "in-use").touch()
    (tmp_path / NAME / "environment.json").write_text(
        '{"attempt": "0a1b2c", "python": "3.11.7", "source": "/p/conda.yaml", "created": 1.5, "size": 77, '
        '"must_exist": ["bin/python"]}'
    )
    assert open_store(tmp_path).acquire(NAME) == content
    (listed,) = list_environments()
    assert (listed.version, listed.uri, listed.size, listed.complete) == ("3.11.7", "/p/conda.yaml", 77, True)


def test_the_list_shows_every_environment(tmp_path: Path) -> None:
    tmp_path.rmdir()
    assert list_environments() == []
    tmp_path.mkdir()
    (tmp_path / "mlflow-0123").mkdir()  # of the reference, which may share the folder
    build(tmp_path, OTHER, days_ago=3)
    build(tmp_path)
    used = open_store(tmp_path)
    used.acquire(NAME)
    one, two = list_environments()
    assert (one.path.name, one.kind, one.version, one.uri) == (NAME, "virtualenv", "3.11.7", "/p/python_env.yaml")
    assert one.complete
    assert one.in_use
    assert one.size >= 5000
    assert (two.path.name, two.kind, two.in_use) == (OTHER, "uv", False)
    assert timedelta(days=2.9) < datetime.now(UTC) - two.last_used < timedelta(days=3.1)


def test_prune_removes_environments_unused_for_long(tmp_path: Path) -> None:
    (tmp_path / "mlflow-0123").mkdir()
    build(tmp_path, NAME, days_ago=31)
    build(tmp_path, OTHER, days_ago=29)
    assert [each.path.name for each in prune(timedelta(days=30))] == [NAME]
    assert [each.path.name for each in list_environments()] == [OTHER]
    assert [each.path.name for each in prune()] == [OTHER]
    assert list_environments() == []
    assert (tmp_path / "mlflow-0123").exists()


def test_prune_keeps_environments_in_use(tmp_path: Path) -> None:
    build(tmp_path)
    user = open_store(tmp_path)
    assert user.acquire(NAME) is not None
    os.utime(tmp_path / NAME / "in-use", (0, 0))
    assert prune() == []
    del user
    assert [each.path.name for each in prune()] == [NAME]


def test_prune_keeps_environments_in_use_by_another_process(tmp_path: Path) -> None:
    build(tmp_path)
    code = (
        "import sys, pathlib; from mlfleet._environments.store import open_store;"
        "s = open_store(pathlib.Path(sys.argv[1]));"
        "s.acquire(sys.argv[2]); print('taken', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(tmp_path), NAME]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"taken\n"
        assert prune() == []
        user.communicate()
    assert [each.path.name for each in prune()] == [NAME]


def test_prune_keeps_active_builds_and_removes_abandoned_ones(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.begin(NAME).mkdir()
    store.lock_path(NAME).parent.mkdir()
    with FileLock(store.lock_path(NAME)):
        assert prune(timedelta(days=1)) == []
    assert [each.complete for each in prune(timedelta(days=1))] == [False]
    assert not (tmp_path / NAME).exists()


def test_an_environment_that_was_pruned_is_gone_for_its_earlier_users(tmp_path: Path) -> None:
    build(tmp_path)
    store = open_store(tmp_path)
    assert store.acquire(NAME) is not None
    subprocess.run(["rm", "-r", str(tmp_path / NAME)], check=True)
    assert store.acquire(NAME) is None
    build(tmp_path)
    assert store.acquire(NAME) is not None
