"""The configuration file from Python, where nothing reads it unasked."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import mlfleet
from components.projects import write_project
from mlfleet.testing import FakeTracking

pytestmark = pytest.mark.usefixtures("settings_file")


@pytest.fixture
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "mlfleet.toml"
    file.write_text(
        'backend = "slurm"\nenv-manager = "local"\njobs = 3\ntracking-uri = "store"\n'
        '[backends.slurm]\nwork-dir = "work"\npartition = "gpu"\n'
    )
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    return file


async def test_the_library_does_not_read_the_file_unasked(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", "true")
    async with mlfleet.Fleet(tracking=FakeTracking()) as fleet:
        run = await fleet.submit(project, env_manager="local")
        await run.wait()
    assert run.backend == "local"


def test_settings_become_arguments(settings_file: Path) -> None:
    settings = mlfleet.read_settings()
    assert settings.path == settings_file
    assert settings.jobs == 3
    assert settings.tracking_uri == (settings_file.parent / "store").as_uri()
    work = str(settings_file.parent / "work")
    slurm = {"work-dir": work, "partition": "gpu"}
    assert settings.run_options() == {"backend": "slurm", "backend_config": slurm, "env_manager": "local"}
    assert settings.run_options("docker") == {"backend": "docker", "env_manager": "local"}
    assert settings.find_place("backends", "slurm", "partition") == f"{settings_file}, line 7"


def test_settings_of_a_named_file_serve_a_run(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", "true")
    file = tmp_path / "pyproject.toml"
    file.write_text('[tool.mlfleet]\nenv-manager = "local"\n')
    settings = mlfleet.read_settings(file)

    async def main() -> mlfleet.RunStatus:
        async with mlfleet.Fleet(tracking=FakeTracking(), max_concurrent=settings.jobs) as fleet:
            run = await fleet.submit(project, **settings.run_options())
            await run.wait()
            return await run.get_status()

    assert asyncio.run(main()) is mlfleet.RunStatus.FINISHED


def test_a_named_file_must_be_there_and_may_be_empty(tmp_path: Path) -> None:
    with pytest.raises(mlfleet.SpecError, match="there is no such file"):
        mlfleet.read_settings(tmp_path / "nowhere.toml")
    empty = tmp_path / "pyproject.toml"
    empty.write_text("[project]\nname = 'x'\n")
    assert mlfleet.read_settings(empty).run_options() == {}


def test_a_file_that_cannot_be_read_is_not_passed_over(settings_file: Path) -> None:
    settings_file.unlink()
    settings_file.symlink_to("nowhere.toml")
    with pytest.raises(mlfleet.SpecError, match="there is no such file"):
        mlfleet.read_settings()
    settings_file.unlink()
    settings_file.mkdir()
    with pytest.raises(mlfleet.SpecError, match="this is a folder"):
        mlfleet.read_settings()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("backnd = 'local'", "FILE, line 1: the key 'backnd' is unknown, did you mean 'backend'? Known are backend, "),
        ("\n[backends.local]\n[backend]", "FILE, line 3: backend is {}: give the name of a backend"),
        ("jobs = [\n  3,\n]", "FILE, line 1: jobs is [3]: give a whole number, 1 or more"),
        ("jobs = 0", "FILE, line 1: jobs is 0: give a whole number"),
        ("jobs = true", "FILE, line 1: jobs is True: give a whole number"),
        ('""\n"env-manager" = "venv"', "FILE: not TOML: "),
        ('"env-manager" = "venv"', "FILE, line 1: env-manager is 'venv': give one of local, "),
        ("backends.slrum.time = 'env-manager'", "FILE, line 1: there is no backend 'slrum', did you mean 'slurm'?"),
        ("[backends]\nslurm = 'gpu'", "FILE, line 2: backends.slurm is 'gpu': give a table, as in [backends.slurm]"),
        ("jobs = 1\njobs = 2", "FILE: not TOML: "),
        (f"jobs = {'9' * 5000}", "FILE: not TOML: Exceeds the limit "),
        (
            "x = '''\njobs = 3'''",
            "FILE, line 1: the key 'x' is unknown. Known are backend, backends, env-manager, jobs, tracking-uri",
        ),
    ],
)
def test_a_mistake_in_the_file_is_an_error_with_its_place(settings_file: Path, text: str, error: str) -> None:
    settings_file.write_text(text)
    with pytest.raises(mlfleet.SpecError) as caught:
        mlfleet.read_settings()
    assert str(caught.value).startswith(error.replace("FILE", str(settings_file)))
