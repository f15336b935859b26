"""The conda manager, with a real conda and with py-rattler, from a channel in a folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
from anyio import to_thread

from components import missing
from components.conda import Channel, make_stand_in
from components.packages import make_package
from mlfleet._environments.manager import PreparedEnvironment, create_manager
from mlfleet._environments.store import list_environments
from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind
from mlfleet.errors import EnvironmentSetupError

pytestmark = pytest.mark.timeout(240)  # the first test also makes a conda, from PyPI


@pytest.fixture
def without_conda(monkeypatch: pytest.MonkeyPatch) -> None:
    """No conda of this machine is found."""
    for name in ("CONDA_EXE", "MAMBA_EXE", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    programs = ("conda", "mamba", "micromamba")
    folders = [
        each for each in os.environ["PATH"].split(":") if not any(Path(each, name).exists() for name in programs)
    ]
    monkeypatch.setenv("PATH", ":".join(folders))


@pytest.fixture(params=["conda", "py-rattler"])
def tool(without_conda: None, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The program that builds: conda, or none, so that py-rattler does."""
    if request.param == "conda":
        # So that conda's package cache is not the user's own.
        monkeypatch.setenv("CONDA_PKGS_DIRS", str(tmp_path / "pkgs"))
        monkeypatch.setenv("CONDA_EXE", str(request.getfixturevalue("conda_program")))
    elif importlib.util.find_spec("rattler") is None:
        missing("py-rattler", "pip install 'mlfleet[conda]'")
    return str(request.param)


def write_env(project: Path, text: str) -> EnvironmentFile:
    project.mkdir(exist_ok=True)
    (project / "conda.yaml").write_text(text)
    return EnvironmentFile(EnvironmentFileKind.CONDA, project / "conda.yaml")


async def prepare(project: Path, text: str) -> PreparedEnvironment:
    conda = create_manager("conda")
    return await conda.prepare(await to_thread.run_sync(conda.plan, project, write_env(project, text)))


def run(environment: PreparedEnvironment, command: str, **more: str) -> str:
    environ = environment.apply({**os.environ, **more})
    return subprocess.run(["bash", "-c", command], env=environ, check=True, capture_output=True, text=True).stdout


async def test_the_command_gets_the_activated_environment(
    tool: str, conda_channel: Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELLO_FLAGS", "-g")
    monkeypatch.setenv("HELLO_REMOVED", "not yet")
    project = tmp_path / "project"
    make_package(project / "package", value="forty-two")
    environment = await prepare(
        project,
        f"name: ignored\nprefix: /no/such/folder\nchannels: [{conda_channel.url}, nodefaults]\n"
        f"dependencies:\n- hello-tool=1.0\n- python={conda_channel.python}\n"
        "- pip:\n  - --no-index\n  - ./package\nvariables:\n  THREADS: 4\n",
    )
    assert environment.root is not None
    assert run(environment, "hello-tool") == f"hello 1.0 {environment.root}\n"
    code = "import sys, tinypkg; print(sys.prefix, tinypkg.VALUE)"
    assert run(environment, f"python -c '{code}'") == f"{environment.root} forty-two\n"
    assert run(environment, "echo $HELLO_ACTIVATED $HELLO_FLAGS $THREADS $CONDA_SHLVL ${HELLO_REMOVED-removed}") == (
        "yes -O2 -g 4 1 removed\n"
    )
    assert run(environment, "echo $CONDA_PREFIX $CONDA_DEFAULT_ENV") == f"{environment.root} {environment.root}\n"
    assert run(environment, "echo $PATH", PATH="/usr/bin:/bin") == f"{environment.root}/bin:/usr/bin:/bin\n"
    (stored,) = await to_thread.run_sync(list_environments)
    assert (stored.kind, stored.version, stored.complete) == ("conda", conda_channel.python, True)
    # Nothing that may hold a channel's token is left beside it.
    assert sorted(path.name for path in stored.path.iterdir()) == sorted(
        [environment.root.name, "environment.json", "in-use"]
    )
    # conda and py-rattler make the same thing; who comes later does not build.
    again = create_manager("conda")
    source = EnvironmentFile(EnvironmentFileKind.CONDA, project / "conda.yaml")
    assert await again.prepare(await to_thread.run_sync(again.plan, project, source)) == environment


@pytest.mark.parametrize(
    "spec", ["hello-tool=1.0=0", "hello-tool 1.0", "hello-tool 1.0 0", "hello-tool=1.0.*", "hello-tool[version=1.0]"]
)
async def test_every_spelling_of_a_version_is_accepted(
    tool: str, conda_channel: Channel, tmp_path: Path, spec: str
) -> None:
    text = f"channels: [{conda_channel.url}]\ndependencies:\n- {spec!r}\n"
    environment = await prepare(tmp_path / "project", text)
    assert run(environment, "hello-tool") == f"hello 1.0 {environment.root}\n"


async def test_an_environment_without_python_is_built(tool: str, conda_channel: Channel, tmp_path: Path) -> None:
    environment = await prepare(tmp_path / "project", f"channels: [{conda_channel.url}]\ndependencies: [hello-tool]\n")
    assert run(environment, "hello-tool") == f"hello 2.0 {environment.root}\n"
    (stored,) = await to_thread.run_sync(list_environments)
    assert stored.version is None


async def test_a_package_that_the_channel_does_not_have(tool: str, conda_channel: Channel, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentSetupError) as caught:
        await prepare(tmp_path / "project", f"channels: [{conda_channel.url}]\ndependencies: [no-such-package]\n")
    text = str(caught.value)
    assert "conda.yaml cannot be built" in text
    assert "no-such-package" in "\n".join(caught.value.output)
    assert "(check the package's name and version" in text
    assert not await to_thread.run_sync(list_environments)


async def test_a_script_of_a_package_that_fails(tool: str, conda_channel: Channel, tmp_path: Path) -> None:
    text = f"channels: [{conda_channel.url}]\ndependencies: [hello-tool]\n"
    environment = await prepare(tmp_path / "project", text)
    assert environment.root is not None
    script = environment.root / "etc" / "conda" / "activate.d" / "zz.sh"
    script.write_text("echo the licence server is gone\nreturn 3\n")
    with pytest.raises(
        EnvironmentSetupError, match=r"activate.d failed with exit code 3\n  the licence server is gone"
    ):
        await prepare(tmp_path / "project", text)


@pytest.mark.parametrize(
    ("name", "how", "begins"),
    [
        ("mamba", "PATH", "env create --quiet --prefix "),
        ("mamba", "MLFLOW_CONDA_CREATE_ENV_CMD", "env create --quiet --prefix "),
        ("micromamba", "PATH", "create --yes --prefix "),
        ("micromamba", "MAMBA_EXE", "create --yes --prefix "),
    ],
)
async def test_mamba_and_micromamba_are_used_without_conda(
    name: str,
    how: str,
    begins: str,
    without_conda: None,
    conda_program: Path,
    conda_channel: Channel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONDA_PKGS_DIRS", str(tmp_path / "pkgs"))
    program = make_stand_in(name, tmp_path / "bin", conda_program)
    if how == "PATH":
        monkeypatch.setenv("PATH", f"{program.path.parent}:{os.environ['PATH']}")
    elif how == "MAMBA_EXE":
        monkeypatch.setenv("MAMBA_EXE", str(program.path))
    else:
        # Beside a conda that is not asked.
        monkeypatch.setenv("CONDA_EXE", str(make_stand_in("micromamba", tmp_path / "bin", conda_program).path))
        monkeypatch.setenv(how, name)
    text = f"channels: [{conda_channel.url}]\ndependencies: [hello-tool=1.0]\n"
    environment = await prepare(tmp_path / "project", text)
    assert run(environment, "hello-tool") == f"hello 1.0 {environment.root}\n"
    (line,) = program.log.read_text().splitlines()
    assert line.startswith(begins)
    with pytest.raises(EnvironmentSetupError) as caught:
        await prepare(tmp_path / "project", text.replace("hello-tool=1.0", "no-such-package"))
    assert f"{program.path} {begins.partition(' --')[0]}" in str(caught.value)
    assert "no-such-package" in "\n".join(caught.value.output)
