"""Plugins as real packages: built, installed into a folder of their own, and found there by fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.packages import make_package

__all__ = ["install_plugin", "on_path", "plugin_folder"]

NATIVE_PLUGIN = '''
"""A native backend: local processes that print a greeting first, and say so."""

from dataclasses import dataclass, replace

from mlfleet.backends.local.backend import LocalBackend
from mlfleet.errors import UsageError


@dataclass(frozen=True)
class Config:
    greeting: str = "hello"


class Echo(LocalBackend):
    name = "echo"

    def configure(self, config):
        if unknown := config.keys() - {"greeting"}:
            raise UsageError(f"echo does not know {sorted(unknown)}, but greeting")
        return Config(**config)

    async def submit(self, job):
        job.on_progress(f"looking for a place to say {job.config.greeting}")
        return await super().submit(replace(job, command=f"echo {job.config.greeting}; {job.command}"))
'''

BLOCKING_PLUGIN = '''
"""A typical plugin backend for `mlflow run`: blocking, with processes of this machine."""

import json
import os
import signal
import subprocess
from pathlib import Path

import mlflow
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import SubmittedRun
from mlflow.projects.utils import (
    fetch_and_validate_project, get_entry_point_command, get_or_create_run, get_run_env_vars, load_project,
)


class Spooled(SubmittedRun):
    def __init__(self, run_id, process, mode):
        self._run_id, self._process, self._mode = run_id, process, mode

    @property
    def run_id(self):
        return self._run_id

    def wait(self):
        return self._process.wait() == 0

    def get_status(self):
        code = self._process.poll()
        return "RUNNING" if code is None else "FINISHED" if code == 0 else "FAILED"

    def cancel(self):
        if self._mode == "cannot cancel":
            raise RuntimeError("the spool is locked")
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Spool(AbstractBackend):
    def run(self, project_uri, entry_point, params, version, backend_config, tracking_uri, experiment_id):
        mode = backend_config.get("mode", "ours")
        if "record" in backend_config:
            seen = [project_uri, entry_point, params, version, backend_config, tracking_uri, experiment_id]
            Path(backend_config["record"]).write_text(json.dumps(seen))
        if mode == "refuse":
            raise RuntimeError(f"no spool for {backend_config['docker_auth']}")
        if mode == "nothing":
            return None
        work_dir = fetch_and_validate_project(project_uri, version, entry_point, params)
        run_id = backend_config["_mlflow_local_backend_run_id"] if mode != "own run" else None
        run = get_or_create_run(run_id, project_uri, experiment_id, work_dir, version, entry_point, params)
        (command,) = get_entry_point_command(load_project(work_dir), entry_point, params, backend_config["STORAGE_DIR"])
        hold = backend_config.get("hold")
        backend_config.clear()
        environ = {**os.environ, **get_run_env_vars(run.info.run_id, experiment_id)}
        process = subprocess.Popen(["bash", "-c", command], cwd=work_dir, env=environ, start_new_session=True)
        if hold:
            Path(hold).read_text()
        return Spooled(run.info.run_id, process, mode)
'''


def install_plugin(folder: Path, module: str, code: str, *, group: str, entry: str) -> None:
    """Build a package with one module that announces one backend, and install it into ``folder/installed``.

    Args:
        folder: The folder to build and install in.
        module: The name of the module.
        code: The code of the module.
        group: The group of entry points.
        entry: The entry points, one ``name = module:object`` a line.
    """
    package = make_package(folder / module, module)
    (package.folder / f"{module}.py").write_text(code)
    (package.folder / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", folder / "installed", package.folder],
        capture_output=True, text=True, env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def plugin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the plugin ``spool`` of mlflow and the native plugin ``echo`` of mlfleet."""
    folder = tmp_path_factory.mktemp("plugins")
    install_plugin(
        folder, "mlflow_spool", BLOCKING_PLUGIN, group="mlflow.project_backend", entry="spool = mlflow_spool:Spool"
    )
    install_plugin(folder, "mlfleet_echo", NATIVE_PLUGIN, group="mlfleet.backends", entry="echo = mlfleet_echo:Echo")
    return folder / "installed"


def on_path(folder: Path, **variables: str) -> dict[str, str]:
    """Return variables with which a new interpreter finds the packages installed in `folder`."""
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **variables}
