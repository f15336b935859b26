"""What commands and builds inherit of the environment of this process, which may be a service with secrets."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

import pytest
from anyio import to_thread

from components import missing
from components.command_line import mlfleet as command_line
from components.projects import write_project
from components.slurm import QUICK, Slurm
from fakes.scripted_server import scripted
from fakes.small_mlflow import SmallMlflow
from mlfleet import Fleet, RunStatus, grid
from mlfleet._project.spec import read_project
from mlfleet.backends.base import DockerRequest, Job
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.slurm import SlurmBackend
from mlfleet.errors import UsageError
from mlfleet.testing import FakeTracking

SHOW = (
    'echo "${SERVICE_TOKEN-none} ${SERVICE_KEY-none} ${GIVEN-none} ${HOME:+home} ${LC_TIME-none}"; test $MLFLOW_RUN_ID'
)


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process have secrets of its own."""
    monkeypatch.setenv("SERVICE_TOKEN", "token")
    monkeypatch.setenv("SERVICE_KEY", "key")
    monkeypatch.setenv("LC_TIME", "C")


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.mark.parametrize(
    ("of_fleet", "of_run", "line"),
    [
        (True, None, "token key given home C"),
        (False, None, "none none given home C"),
        (False, True, "token key given home C"),
        (True, [], "none none given home C"),
        (["SERVICE_TOKEN"], None, "token none given home C"),
        (["SERVICE_TOKEN"], {"SERVICE_K*"}, "none key given home C"),
    ],
)
async def test_a_command_sees_of_this_process_what_the_caller_says(
    tracking: FakeTracking,
    tmp_path: Path,
    of_fleet: bool | Collection[str],
    of_run: bool | Collection[str] | None,
    line: str,
) -> None:
    uri = write_project(tmp_path / "demo", SHOW)
    async with Fleet(tracking=tracking, inherit_env=of_fleet) as fleet:
        run = await fleet.submit(uri, env={"GIVEN": "given"}, inherit_env=of_run, env_manager="local")
        assert [each async for each in run.logs()] == [line]
        assert await run.wait()


async def test_runs_of_sweeps_and_detached_runs_see_no_more(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", f"( {SHOW} ) >> ../got", parameters="n: {type: float, default: 0}")
    async with (
        scripted(SmallMlflow().script) as server,
        Fleet(tracking_uri=f"http://{server.place}", inherit_env=False) as fleet,
    ):
        async with fleet.sweep(uri, grid(n=[1]), name="lr", experiment_id="0", env_manager="local") as sweep:
            assert (await sweep.result()).status is RunStatus.FINISHED
        run = await fleet.submit(uri, experiment_id="0", detach=True, env_manager="local")
        assert await run.wait()
    assert (tmp_path / "got").read_text() == "none none none home C\n" * 2


@pytest.mark.parametrize(
    ("names", "line"), [("none", "none none given home C"), ("SERVICE_T*,OTHER", "token none given home C")]
)
async def test_the_command_line_says_it_by_names(tmp_path: Path, names: str, line: str) -> None:
    uri = write_project(tmp_path / "demo", SHOW)
    async with scripted(SmallMlflow().script) as server:
        options = ("--tracking-uri", f"http://{server.place}", "--experiment-id", "0", "--env-manager", "local")
        done = await to_thread.run_sync(
            partial(command_line, "run", uri, *options, "--env", "GIVEN=given", "--inherit-env", names)
        )
    assert (done.returncode, done.stdout) == (0, f"{line}\n"), done.stderr


async def test_a_command_on_a_node_sees_no_more(slurm: Slurm, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "train.py").touch()
    async with SlurmBackend(timing=QUICK) as backend:
        job = Job(
            run_id="a" * 32,
            experiment_id="0",
            project_name="demo",
            project_dir=project,
            command=f"export MLFLOW_RUN_ID=1; {SHOW}",
            output=tmp_path / "output.log",
            config=backend.configure({"latency": 5}),
            inherit_env=("SERVICE_K*",),
        )
        run = await backend.submit(job)
        assert [line async for line in run.logs()] == ["none key none home C"]


COPYING = """\
name: demo
docker_env: {image: none, environment: [SERVICE_TOKEN, HOME]}
entry_points: {main: {command: 'true'}}
"""
NOT_COPIED = "docker_env copies variables that are not set here, or not inherited: SERVICE_TOKEN"


async def test_a_project_may_copy_no_more_into_its_container(tracking: FakeTracking, tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text(COPYING)
    async with Fleet(tracking=tracking, inherit_env=False) as fleet:
        with pytest.raises(UsageError, match=NOT_COPIED):
            await fleet.submit(str(tmp_path))
    assert not tracking.runs


def test_a_project_may_copy_no_more_into_its_pod(tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text(COPYING)
    docker = read_project(tmp_path, tmp_path).docker
    assert docker is not None
    with pytest.raises(UsageError, match=NOT_COPIED):
        KubernetesBackend().check(DockerRequest(docker, inherit_env=False), tmp_path)
    KubernetesBackend().check(DockerRequest(docker, inherit_env=("SERVICE_*",)), tmp_path)


BACKEND = """\
import os, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    names = "SERVICE_TOKEN", "SERVICE_KEY", "PIP_INDEX_URL"
    with open(os.environ["HOME"] + "/seen", "w") as file:
        print(*(os.environ.get(name, "none") for name in names), file=file)
    with zipfile.ZipFile(os.path.join(folder, "pkg-1-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("pkg-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: pkg\\nVersion: 1\\n")
        wheel.writestr("pkg-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("pkg-1.dist-info/RECORD", "")
    return "pkg-1-py3-none-any.whl"
"""


async def test_the_code_of_a_project_sees_no_more_while_its_environment_is_built(
    tracking: FakeTracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        import uv  # noqa: F401
    except ImportError:
        missing("uv", "pip install uv")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    uri = write_project(tmp_path / "demo", "true", extra="python_env: env.yaml\n")
    package = tmp_path / "demo" / "pkg"
    package.mkdir()
    (tmp_path / "demo" / "env.yaml").write_text("dependencies: [./pkg]\n")
    (package / "build_it.py").write_text(BACKEND)
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "build_it"\nbackend-path = ["."]\n'
        '[project]\nname = "pkg"\nversion = "1"\n'
    )
    async with Fleet(tracking=tracking, inherit_env=["SERVICE_KEY"]) as fleet:
        run = await fleet.submit(uri, env_manager="uv")
        assert await run.wait(), await run.outcome()
    assert await to_thread.run_sync((tmp_path / "seen").read_text) == "none key https://index.example/simple\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("AWS_*", "inherit_env is str: give True, False or a list of names"),
        (7, "inherit_env is int"),
        (["A*B"], r"inherit_env has the name 'A\*B': give names of variables; only at its end"),
        (["A=B"], "the name 'A=B'"),
        ([""], "the name ''"),
        ([3], "the name '3'"),
    ],
)
async def test_what_is_neither_names_nor_a_choice_is_a_mistake(
    tracking: FakeTracking, tmp_path: Path, given: bool, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Fleet(tracking=tracking, inherit_env=given)
    async with Fleet(tracking=tracking) as fleet:
        with pytest.raises(UsageError, match=message):
            await fleet.submit(str(tmp_path), inherit_env=given)
