"""The files that a project may name: those of its own repository, and nothing of others in errors and output."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from anyio import to_thread

from components.git_repository import make_repository
from components.projects import write_project
from mlfleet import Fleet, MlfleetError, SpecError
from mlfleet._environments.manager import create_manager
from mlfleet._project.fetch import ProjectFetcher
from mlfleet._project.spec import read_project
from mlfleet.testing import FakeTracking

SECRET = "hunter2"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the user that is no file of any project."""
    path = tmp_path / "home" / "netrc"
    path.parent.mkdir()
    path.write_text(f"machine example.com login me password {SECRET}\nroot:{SECRET}/x:19000:\n")
    return path


def linked(folder: Path, name: str, target: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(target)


def plan(folder: Path, manager: str = "virtualenv") -> object:
    """Read a project and what it needs, as far as ``--dry-run`` goes."""
    spec = read_project(folder)
    return create_manager(manager).plan(spec.folder, spec.environment)


def refusal(folder: Path, manager: str = "virtualenv") -> str:
    with pytest.raises(SpecError) as caught:
        plan(folder, manager)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value.__cause__)
    return str(caught.value)


@pytest.mark.parametrize("key", ["python_env", "conda_env"])
@pytest.mark.parametrize("name", ["{secret}", "../home/netrc", "link", "folder/netrc", "../home/gone"])
def test_an_environment_file_outside_of_the_repository_is_refused(
    tmp_path: Path, secret: Path, key: str, name: str
) -> None:
    folder = tmp_path / "project"
    linked(folder, "link", secret)
    linked(folder, "folder", secret.parent)
    write_project(folder, "true", extra=f"{key}: {name.format(secret=secret)}\n")
    assert "is outside of the project's repository" in refusal(folder)


def test_the_bound_is_the_repository_not_the_folder_of_the_project(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path / "repo")], check=True)
    folder = tmp_path / "repo" / "projects" / "one"
    write_project(folder, "true", extra="python_env: ../../shared/env.yaml\n")
    shared = tmp_path / "repo" / "shared"
    shared.mkdir()
    (shared / "env.yaml").write_text("dependencies: [-r ../../shared/requirements.txt]\n")
    (shared / "requirements.txt").write_text("six\n-c limits.txt\n")
    (shared / "limits.txt").write_text("six<2\n")
    spec = read_project(folder)
    assert spec.environment is not None
    assert spec.environment.path == shared / "env.yaml"
    plan(folder)
    (tmp_path / "limits.txt").write_text(SECRET)
    (shared / "requirements.txt").write_text("six\n-c ../../limits.txt\n")
    assert "line 2: the requirements file '../../limits.txt' is outside" in refusal(folder)


async def test_a_subfolder_may_use_the_files_of_the_folder_that_the_uri_names(tmp_path: Path) -> None:
    write_project(tmp_path / "all" / "one", "true", extra="python_env: ../env.yaml\n")
    (tmp_path / "all" / "env.yaml").write_text("dependencies: []\n")
    project = await ProjectFetcher().fetch(f"{tmp_path}/all#one")
    spec = await to_thread.run_sync(read_project, project.folder, project.root)
    assert spec.environment is not None


def test_a_link_to_a_project_is_followed_as_the_system_follows_it(tmp_path: Path, secret: Path) -> None:
    real = tmp_path / "repo" / "project"
    write_project(real, "true", extra="python_env: ../env.yaml\n")
    (tmp_path / "repo" / ".git").mkdir()
    (tmp_path / "repo" / "env.yaml").write_text("python: '3.11'\n")
    linked(secret.parent, "link", real)
    secret.rename(secret.with_name("env.yaml"))
    spec = read_project(secret.parent / "link")
    assert spec.environment is not None
    assert spec.environment.path == tmp_path / "repo" / "env.yaml"
    plan(secret.parent / "link", "uv")


@pytest.mark.parametrize(
    "name", ["MLproject", "python_env.yaml", "conda.yaml", "requirements.txt", "pyproject.toml", "uv.lock"]
)
def test_links_out_of_the_repository_are_refused(tmp_path: Path, secret: Path, name: str) -> None:
    folder = tmp_path / "project"
    linked(folder, name, secret)
    if name == "uv.lock":
        (folder / "pyproject.toml").write_text("")
    assert "is a symbolic link that leads out of the project's repository" in refusal(folder, "uv")


@pytest.mark.parametrize("name", ["uv.toml", "pyproject.toml", ".python-version"])
def test_settings_of_uv_that_are_links_are_refused(tmp_path: Path, secret: Path, name: str) -> None:
    folder = tmp_path / "repo" / "project"
    write_project(folder, "true", extra="python_env: env.yaml\n")
    (folder / "env.yaml").write_text("dependencies: []\n")
    (tmp_path / "repo" / ".git").mkdir()
    linked(tmp_path / "repo", name, secret)
    assert f"{name}: it is a symbolic link that leads out" in refusal(folder, "uv")


@pytest.mark.parametrize("name", ["setup.cfg", "pyproject.toml", "setup.py"])
def test_a_package_with_a_link_in_place_of_its_settings_is_refused(tmp_path: Path, secret: Path, name: str) -> None:
    folder = tmp_path / "project"
    write_project(folder, "true")
    linked(folder / "package", name, secret)
    (folder / "requirements.txt").write_text("-e ./package\n")
    assert f"line 1: {name} of the package at './package' is outside" in refusal(folder)


@pytest.mark.parametrize("file", ["{secret}", "../home/netrc", "link"])
def test_a_spark_job_runs_no_file_outside_of_the_repository(tmp_path: Path, secret: Path, file: str) -> None:
    folder = tmp_path / "project"
    linked(folder, "link", secret)
    (folder / "MLproject").write_text(f"databricks_spark_job: {{python_file: {file.format(secret=secret)}}}\n")
    assert "is outside of the project's repository" in refusal(folder)


@pytest.mark.parametrize(
    "line",
    [
        "-r {secret}",
        "-r{secret}",
        "--requirement={secret}",
        "-c ../home/netrc",
        "-r link",
        "-r file://{secret}",
        "-c file://localhost{secret}",
        "-r file:{secret}",
        "--pre -r {secret}",
        "--pre --const {secret}",
        "--req {secret}",
        "-i https://example.com -c{secret}",
        "-e ../home",
        "../home",
        "-r fine.txt -c {secret}",
    ],
)
@pytest.mark.parametrize("where", ["list", "file"])
def test_a_line_for_pip_that_opens_a_file_outside_of_the_repository_is_refused(
    tmp_path: Path, secret: Path, line: str, where: str
) -> None:
    folder = tmp_path / "project"
    linked(folder, "link", secret)
    line = line.format(secret=secret)
    write_project(folder, "true")
    (folder / "fine.txt").write_text("")
    (folder / "python_env.yaml").write_text(
        f"dependencies: {json.dumps([line] if where == 'list' else ['-r lines.txt'])}\n"
    )
    (folder / "lines.txt").write_text(f"{line}\n")
    text = refusal(folder)
    assert "is outside of the project's repository" in text or "must stand on lines of their own" in text


@pytest.mark.parametrize("items", [["six\u2028-r {secret}"], ["-\\", "r file://{secret}"], ["six\x85-r {secret}"]])
def test_an_item_that_pip_would_read_as_other_lines_is_refused(tmp_path: Path, secret: Path, items: list[str]) -> None:
    folder = tmp_path / "project"
    write_project(folder, "true")
    lines = json.dumps([item.format(secret=secret) for item in items])
    (folder / "python_env.yaml").write_text(f"dependencies: {lines}\n")
    assert "a requirement is one line" in refusal(folder)


@pytest.mark.parametrize(
    "encode", [lambda text: text.encode("utf-16"), lambda text: b"# coding: utf-7\n" + text.encode()]
)
def test_a_requirements_file_that_pip_would_decode_differently_is_refused(
    tmp_path: Path, encode: Callable[[str], bytes]
) -> None:
    folder = tmp_path / "project"
    write_project(folder, "true")
    (folder / "python_env.yaml").write_text("dependencies: [-r lines.txt]\n")
    (folder / "lines.txt").write_bytes(encode("six\n"))
    assert "save it as UTF-8" in refusal(folder)


@pytest.mark.parametrize(
    "text", [f"API_KEY={SECRET}\n", f"me {SECRET} x\n", f"{SECRET}/abc+=\n", f"a: {SECRET}\n", SECRET]
)
@pytest.mark.parametrize("key", ["python_env", "conda_env"])
def test_an_error_quotes_nothing_of_a_file_of_another_kind(
    tmp_path: Path, text: str, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "project"
    write_project(folder, "true", extra=f"{key}: .env\n")
    (folder / ".env").write_text(text)
    with caplog.at_level(logging.DEBUG):
        assert "expected a mapping with" in refusal(folder)
    (folder / ".env").write_text(
        "dependencies: [-r lines.txt]\n" if key == "python_env" else "dependencies: [pip: [-r lines.txt]]\n"
    )
    (folder / "lines.txt").write_text(text)
    if text != SECRET:  # the name of a package, for all that anybody can know
        refusal(folder)
    assert SECRET not in caplog.text


def test_a_list_of_patterns_that_is_a_link_is_not_quoted(tmp_path: Path, secret: Path) -> None:
    from mlfleet._project.content import read_ignore

    secret.write_text(f"[z-a]{SECRET}\n")
    linked(tmp_path / "project", ".dockerignore", secret)
    with pytest.raises(SpecError, match="line 1: this line is not a pattern") as caught:
        read_ignore(tmp_path / "project")
    assert SECRET not in repr(caught.value)


async def test_a_fetched_repository_is_the_bound_of_its_project(tmp_path: Path, secret: Path) -> None:
    repository = make_repository(tmp_path / "git")
    linked(repository.work / "linked", "MLproject", secret)
    write_project(repository.work / "deep" / "project", "true", extra="python_env: ../../shared.yaml\n")
    (repository.work / "shared.yaml").write_text("dependencies: []\n")
    repository.commit()
    uri = f"file://{repository.bare}"
    async with Fleet(tracking=FakeTracking()) as fleet:
        with pytest.raises(SpecError, match="leads out of the project's repository") as caught:
            await fleet.submit(f"{uri}#linked")
        assert SECRET not in str(caught.value)
        run = await fleet.submit(f"{uri}#deep/project", env_manager="local")
        assert await run.wait()


async def test_a_link_that_leads_nowhere_is_an_error_of_the_project(tmp_path: Path) -> None:
    for name, target in (("loop", "MLproject"), ("gone", "elsewhere")):
        folder = tmp_path / name
        folder.mkdir()
        os.symlink(target, folder / "MLproject")
        archive = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            member = zipfile.ZipInfo("MLproject")
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(member, target)
        async with Fleet(tracking=FakeTracking()) as fleet:
            with pytest.raises(MlfleetError, match="MLproject: "):
                await fleet.submit(str(archive))
        with pytest.raises(MlfleetError, match="MLproject: "):
            async with Fleet(tracking=FakeTracking()) as fleet:
                await fleet.submit(str(folder))
