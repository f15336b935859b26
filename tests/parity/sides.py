"""The two sides of a comparison: mlflow of some version in an environment of its own, and mlfleet."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from components import missing
from parity.case import Case
from parity.observing import Observed, observe
from parity.places import Ground, Place

__all__ = ["REFERENCES", "Side", "bare_path", "install", "start"]

REFERENCES = {"3.x": "mlflow-skinny>=3,<4", "2.x": "mlflow-skinny>=2,<3"}
"""What is compared with. mlflow-skinny is mlflow without what serves models and pages; `mlflow.projects` is whole."""

_DRIVER = Path(__file__).with_name("driver.py")

# The first bash on PATH: tells what it was called with, and with which code what it was called for ended.
_SHIM = """\
#!{bash}
if [ -z "$PARITY_RECORD" ]; then exec {bash} "$@"; fi
here="$PARITY_RECORD/$EPOCHREALTIME.$$"
mkdir "$here"
cp /proc/$$/cmdline /proc/$$/environ "$here"
pwd -P > "$here/folder"
{bash} "$@"
code=$?
echo $code > "$here/code"
exit $code
"""


def install(reference: str, folder: Path) -> Path:
    """Make an environment with that mlflow in `folder`, and return its Python."""
    uv = _uv()
    python = folder / "bin" / "python"
    environ = {**os.environ, "UV_NO_PROGRESS": "1"}
    for argv in (
        [uv, "venv", "--quiet", "--no-project", "--python", sys.executable, str(folder)],
        # docker: what mlflow needs for projects with a docker_env, but does not ask for.
        [uv, "pip", "install", "--quiet", "--python", str(python), REFERENCES[reference], "docker"],
    ):
        done = subprocess.run(argv, env=environ, capture_output=True, text=True)
        if done.returncode != 0:
            missing(f"mlflow {reference}", f"a package index for `{' '.join(argv[1:])}`: {done.stderr[-500:]}")
    return python


def make_tools(folder: Path) -> None:
    """Make the programs that come first on the PATH of both sides."""
    folder.mkdir()
    shim = folder / "bash"
    shim.write_text(_SHIM.format(bash=shutil.which("bash")))
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    (folder / "uv").symlink_to(_uv())
    # uv makes environments from no interpreter that is in one itself.
    python = Path(sys.executable).resolve()
    (folder / f"python{sys.version_info[0]}.{sys.version_info[1]}").symlink_to(python)


def _uv() -> str:
    return shutil.which("uv", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))) or missing(
        "uv", "pip install uv"
    )


@dataclass
class Side:
    """One of those that run projects; takes its cases in the order in which they come.

    Attributes:
        name: ``mlfleet``, or the version of mlflow.
        ground: The services that all cases share.
        folder: The folder for everything that its cases write.
        environ: The variables of its process.
        version: The version of mlflow or mlfleet.
    """

    name: str
    ground: Ground
    folder: Path
    environ: Mapping[str, str]
    process: subprocess.Popen[str]
    version: str = ""
    _results: dict[str, Future[Observed]] = field(default_factory=dict)
    _queue: SimpleQueue[Case | None] = field(default_factory=SimpleQueue)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False
    _experiment_id: str = ""
    _known: set[str] = field(default_factory=set)

    def ask(self, case: Case) -> Future[Observed]:
        """Return the observation of a case, which runs once."""
        with self._lock:
            if case.name not in self._results:
                self._results[case.name] = Future()
                self._queue.put(case)
            return self._results[case.name]

    def work(self) -> None:
        """Run the requested cases until `stop` is called."""
        while (case := self._queue.get()) is not None and not self._stopped:
            try:
                self._results[case.name].set_result(self._run(case))
            except Exception as error:
                self._results[case.name].set_exception(error)

    def stop(self) -> None:
        """End `work` after its current case."""
        self._stopped = True
        self._queue.put(None)

    def _run(self, case: Case) -> Observed:
        if not self.version:
            self.version = str(self._read()["version"])
            self._experiment_id = self.ground.tracking.create_experiment(f"parity/{self.name}/{self.ground.unique}")
        place = Place.make(self.ground, self.folder / case.name, case, self._experiment_id)
        before = place.snapshot()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(place.call()) + "\n")
        self.process.stdin.flush()
        environment = os.path.dirname(os.path.dirname(self.python))
        return observe(place, before, self._read(), known=self._known, paths={environment: "@venv"})

    @property
    def python(self) -> str:
        return str(self.process.args[0])  # type: ignore[index]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended:\n{(self.folder / 'output.log').read_text()[-3000:]}")
        return dict(json.loads(line))


@contextmanager
def start(name: str, python: Path, ground: Ground, folder: Path) -> Iterator[Side]:
    """Run one side's process for the time of the block."""
    folder.mkdir()
    argv = [str(python), str(_DRIVER), "mlfleet" if name == "mlfleet" else "mlflow", str(folder / "output.log")]
    environ = _environ(python, ground, folder)
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ, cwd="/")
    side = Side(name, ground, folder, environ, process)
    thread = threading.Thread(target=side.work, name=name)
    thread.start()
    try:
        yield side
    finally:
        side.stop()
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        thread.join()
        assert process.stdout is not None
        process.stdout.close()
        process.wait()


def _environ(python: Path, ground: Ground, folder: Path) -> dict[str, str]:
    """Return the variables of a side's process, which differ in paths only."""
    mine = {
        "PATH": os.pathsep.join((str(ground.tools), str(python.parent), *_programs())),
        "PYTHONPATH": str(ground.plugins),
        "HOME": str(ground.home),
        "MLFLOW_TRACKING_URI": ground.tracking.url,
        "MLFLOW_ENV_ROOT": str(folder / "environments"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLEET_CACHE_DIR": str(folder / "cache"),
        "MLFLEET_STATE_DIR": str(folder / "state"),
        "SHELL": "/bin/sh",
        "NO_PROXY": "127.0.0.1",
    }
    passed = ("LANG", "LC_ALL", "UV_*", "PIP_*", "DOCKER_*", "HTTP_PROXY", "HTTPS_PROXY", "SSL_CERT_FILE")
    return mine | {name: value for name, value in os.environ.items() if any(_fits(name, each) for each in passed)}


def bare_path(tools: Path) -> str:
    """Return a PATH that leads to the environment of neither side, as that of a caller who has activated none."""
    return os.pathsep.join((str(tools), *_programs()))


def _programs() -> list[str]:
    return [path for path in os.environ["PATH"].split(os.pathsep) if not _is_of_this_machine(path)]


def _fits(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _is_of_this_machine(folder: str) -> bool:
    """Whether it has what builds environments, or this Python's own programs: no case may depend on them."""
    managers = ("pyenv", "conda", "mamba", "micromamba")
    return folder == os.path.dirname(sys.executable) or any(Path(folder, name).exists() for name in managers)
