"""The bootstrap script, which runs in Databricks: it unpacks the project, runs its command and keeps its output.

mlfleet uploads this file unchanged. It needs only Python 3.8 and its standard library. Its one argument is JSON, see
`mlfleet.backends.databricks.request`. Databricks runs it in one of its own processes, which may end at any moment, by
an exception or by force.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import IO, Any, Dict, Mapping

PART = 900 * 1024  # bytes; a read of DBFS returns at most 1 MB
KEPT = 64 * 2**20  # bytes of output that are kept in files; the run's page gets all of it
FIRST_PAUSE, LAST_PAUSE = 0.2, 5.0  # seconds between parts of the output
STALE = 7 * 86400  # seconds for which the output of runs is kept

# The parent of the command. It ends the command's session when its stdin is closed, also by the death of the process at
# the other end.
GUARD = """
import os, signal, subprocess, sys, threading, time
command = subprocess.Popen(["bash", "-c", sys.argv[2]], stdin=subprocess.DEVNULL, start_new_session=True)
def kill(number):
    try:
        os.killpg(command.pid, number)
    except OSError:
        pass
def end_when_asked():
    sys.stdin.buffer.read()
    kill(signal.SIGTERM)
    time.sleep(float(sys.argv[1]))
    kill(signal.SIGKILL)
threading.Thread(target=end_when_asked, daemon=True).start()
code = command.wait()
kill(signal.SIGKILL)
os._exit(code if code >= 0 else 128 - code)
"""

# Downloads the URIs of `path` parameters as mlflow does, and links each to the path that the command gets.
DOWNLOAD = """
import json, os, sys, urllib.request
for target, uri in json.load(sys.stdin).items():
    folder = target + ".files"
    os.makedirs(folder)
    try:
        if uri.lower().startswith(("http://", "https://")):
            found = urllib.request.urlretrieve(uri, os.path.join(folder, "file"))[0]
        else:
            from mlflow.artifacts import download_artifacts
            found = download_artifacts(artifact_uri=uri, dst_path=folder)
    except Exception as error:
        sys.exit("%s cannot be downloaded: %s: %s" % (uri.split("?")[0], type(error).__name__, error))
    os.symlink(os.path.abspath(found), target)
"""


def main() -> None:
    """Run the project that the argument describes."""
    spec = json.loads(sys.argv[1])
    if "spec" in spec:
        with open(spec["spec"], encoding="utf-8") as file:
            spec = json.load(file)
    signal_as_exception()
    keep_only_recent(spec["output"])
    forget_end(spec["output"])
    folder = new_folder()
    try:
        project = unpack(spec, folder)
        variables = {**spec["environ"], **secrets(spec), **identity(spec)}
        spec["command"] = spec["command"].replace(spec["root"], folder)
        download(spec, folder, variables)
        code = (run_here if spec["mode"] == "python" else run_command)(spec, project, variables)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if code:
        raise SystemExit(code)


def signal_as_exception() -> None:
    """Raise SystemExit on SIGTERM, so that the cleanup runs."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        signal.signal(signal.SIGTERM, stop)
    except ValueError:  # outside the main thread, where Python takes no signals
        pass


def new_folder() -> str:
    """Create a folder on the local disk whose path has no characters special to a shell, and return it."""
    folder = tempfile.mkdtemp(prefix="mlfleet-")
    if re.search(r"[^A-Za-z0-9_@%+=:,./-]", folder):
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="mlfleet-", dir="/tmp")
    return folder


def unpack(spec: Mapping[str, Any], folder: str) -> str:
    """Check the hash of the archive, unpack it, and return the folder of the project."""
    with open(spec["archive"], "rb") as file:
        digest = hashlib.sha256()
        for piece in iter(lambda: file.read(2**20), b""):
            digest.update(piece)
        if digest.hexdigest() != spec["sha256"]:
            raise SystemExit("mlfleet: %s is not what was uploaded for this run" % spec["archive"])
        file.seek(0)
        project = os.path.join(folder, spec["name"])
        os.mkdir(project)
        with tarfile.open(fileobj=file, mode="r:gz") as archive:
            if hasattr(tarfile, "fully_trusted_filter"):
                archive.extractall(project, filter="fully_trusted")
            else:
                archive.extractall(project)
    return project


def secrets(spec: Mapping[str, Any]) -> Dict[str, str]:
    """Return the secret variables, from the cluster's environment or from the secret scope."""
    place = spec.get("secrets")
    if not place:
        return {}
    text = os.environ.pop("MLFLEET_SECRETS", None)
    if text is None:
        from databricks.sdk.runtime import dbutils

        text = dbutils.secrets.get(place["scope"], place["key"])
    return dict(json.loads(text))


def identity(spec: Mapping[str, Any]) -> Dict[str, str]:
    """Return variables with the run's own login, which processes that it starts do not find by themselves."""
    if not spec.get("identity") or "DATABRICKS_TOKEN" in os.environ or "DATABRICKS_RUNTIME_VERSION" not in os.environ:
        return {}
    try:
        from databricks.sdk.core import Config

        config = Config()
        token = config.authenticate()["Authorization"].split(" ", 1)[1]
        return {"DATABRICKS_HOST": config.host, "DATABRICKS_TOKEN": token}
    except Exception as error:
        print("mlfleet: the command gets no Databricks login: %s" % error, file=sys.stderr)
        return {}


def environment(variables: Mapping[str, str]) -> Dict[str, str]:
    """Return this process' variables and those of the run, with this Python first on PATH."""
    environ = dict(os.environ)
    environ.update(variables)
    environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environ.get("PATH", os.defpath)])
    if "DATABRICKS_RUNTIME_VERSION" in environ:
        # The libraries of a cluster are only on sys.path of this process.
        own = [path for path in sys.path if "-packages" in path and not path.startswith(sys.prefix)]
        environ["PYTHONPATH"] = os.pathsep.join([*own, *filter(None, [environ.get("PYTHONPATH")])])
    return environ


def download(spec: Mapping[str, Any], folder: str, variables: Mapping[str, str]) -> None:
    """Download the URIs of `path` parameters in a process with the command's environment."""
    wanted = {os.path.join(folder, name): uri for name, uri in spec.get("downloads", {}).items()}
    if not wanted:
        return
    for target in wanted:
        os.makedirs(os.path.dirname(target), exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOAD],
        env=environment(variables),
        input=json.dumps(wanted).encode(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["the download printed no error"]
        raise SystemExit("mlfleet: a path parameter: %s" % lines[-1])


def run_command(spec: Mapping[str, Any], project: str, variables: Mapping[str, str]) -> int:
    """Run the command in a session of its own, and return its exit code."""
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, str(spec["grace"]), spec["command"]],
        cwd=project,
        env=environment(variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert guard.stdin is not None
    assert guard.stdout is not None
    output = Output(spec["output"])
    stopped = True
    try:
        output.copy(guard.stdout)
        stopped = False
    finally:
        if stopped:
            guard.stdin.close()
            output.copy(guard.stdout)
        code = guard.wait()
        for pipe in (guard.stdin, guard.stdout):
            pipe.close()
        output.end(code, stopped)
    return code


def run_here(spec: Mapping[str, Any], project: str, variables: Mapping[str, str]) -> int:
    """Run a Python file in this process, which has the Spark session, and return its exit code."""
    _, name, *arguments = shlex.split(spec["command"])
    os.environ.update(variables)
    os.chdir(project)
    path = os.path.join(project, name)
    sys.path.insert(0, os.path.dirname(path))
    sys.argv = [path, *arguments]
    code = 1
    stopped = False
    try:
        runpy.run_path(path, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code:
            raise
    except KeyboardInterrupt:
        stopped = True
        raise
    finally:
        Output(spec["output"]).end(code, stopped, elsewhere=True)
    return 0


def keep_only_recent(output: str) -> None:
    """Remove the output of old runs, which is beside that of this run."""
    try:
        with os.scandir(os.path.dirname(output)) as entries:
            for entry in entries:
                if entry.path != output and entry.stat().st_mtime < time.time() - STALE:
                    shutil.rmtree(entry.path, ignore_errors=True)
    except OSError:
        pass


def forget_end(output: str) -> None:
    """Remove the record of the end of an earlier attempt: Databricks may repeat a task."""
    try:
        os.unlink(os.path.join(output, "end"))
    except OSError:
        pass


class Output:
    """The output of the command: it goes to this run's page, and in parts to files, which mlfleet can follow.

    The parts of a repeated task follow those of its earlier attempts, which mlfleet may have read already.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.waiting = bytearray()
        self.parts = 0
        while os.path.exists(os.path.join(folder, "%06d" % self.parts)):
            self.parts += 1
        self.kept = 0
        self.pause = FIRST_PAUSE
        self.due = 0.0
        self.writable = True

    def copy(self, pipe: IO[bytes]) -> None:
        """Copy the output until the other end of the pipe is closed."""
        while True:
            left = self.due - time.monotonic() if self.waiting else None
            if left is None or left > 0:
                readable, _, _ = select.select([pipe], [], [], left)
                if readable:
                    data = os.read(pipe.fileno(), 65536)
                    if not data:
                        self.flush()
                        return
                    self.add(data)
            if self.waiting and (len(self.waiting) >= PART or time.monotonic() >= self.due):
                self.flush()

    def add(self, data: bytes) -> None:
        """Print some output, and keep it for the next part."""
        stream = getattr(sys.stdout, "buffer", None)
        if stream is not None:
            stream.write(data)
        else:
            sys.stdout.write(data.decode("utf-8", "replace"))
        sys.stdout.flush()
        if not self.waiting:
            self.due = time.monotonic() + self.pause
        room = KEPT - self.kept
        if room <= 0:
            return
        if len(data) > room:
            data = data[:room] + b"\n(mlfleet keeps no more; the page of the run in Databricks may)\n"
        self.kept += len(data)
        self.waiting += data

    def flush(self) -> None:
        """Write the waiting output as further parts. If that fails, the output is only on the run's page."""
        while self.waiting:
            piece = bytes(self.waiting[:PART])
            del self.waiting[:PART]
            if self.write("%06d" % self.parts, piece):
                self.parts += 1
        self.pause = min(self.pause * 1.5, LAST_PAUSE)

    def end(self, code: int, stopped: bool, elsewhere: bool = False) -> None:
        """Record the end of the command; `elsewhere`: the output is only on the run's page."""
        record = {"exit_code": code, "parts": None if elsewhere else self.parts, "stopped": stopped}
        self.write("end", json.dumps(record).encode())

    def write(self, name: str, data: bytes) -> bool:
        """Write a file that begins with its length, so that readers see if it is complete. Return False on failure."""
        if not self.writable:
            return False
        try:
            os.makedirs(self.folder, exist_ok=True)
            with open(os.path.join(self.folder, name), "wb") as file:
                file.write(b"%d\n" % len(data) + data)
        except OSError as error:
            self.writable = False
            print("mlfleet: the output cannot be kept in %s: %s" % (self.folder, error), file=sys.stderr)
            return False
        return True


if __name__ == "__main__":
    main()
