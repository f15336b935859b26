"""The files of runs in the work folder, which this machine and the nodes share.

::

    projects/<content hash>/    one copy of each version of a project
    environments/               built environments
    downloads/                  files that ``path`` parameters were downloaded to
    arrays/<name>/<index>       links to the folders of the runs of an array
    runs/<run id>/
        project/                the run's own copy of the project
        command.sh  environ     the command, and its variables with the secrets
        owner  job              the process that looks after the run; the id of the job, once it is known
        earlier                 the id of the job with which the same MLflow run has run before, if it has
        grace                   seconds between SIGTERM and SIGKILL
        claim                   the job that runs it, and how often Slurm has started that again
        exit                    the exit code, and whether the command was asked to stop before
        output.log              stdout and stderr of the command
        slurm.log               Slurm's own messages about the job

Everything is for the user only (mode 0700 and 0600). The files decide how a run has ended: Slurm forgets jobs within
minutes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlfleet._concurrency.single_flight import Coalescing
from mlfleet._concurrency.threads import FILES
from mlfleet._project.blocking import stoppable
from mlfleet._project.content import pack
from mlfleet._project.working_copies import copy_tree
from mlfleet._store.content_store import remove_tree
from mlfleet.backends.base import Job
from mlfleet.backends.slurm.config import SlurmConfig
from mlfleet.backends.slurm.script import command_script, environment_file
from mlfleet.backends.slurm.states import ExitRecord
from mlfleet.errors import SubmitError

__all__ = ["RunFiles", "copy_project", "folders_of_runs", "link_array", "prune_shared", "run_of_job", "write_run"]

_WITHDRAWN = "withdrawn"
_UNUSED_AFTER = 24 * 3600.0  # seconds


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of one run. All methods are blocking.

    Attributes:
        work_dir: The work folder.
        run_id: The id of the MLflow run.
    """

    work_dir: Path
    run_id: str

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.work_dir / "runs" / self.run_id

    @property
    def project(self) -> Path:
        """The run's copy of the project."""
        return self.folder / "project"

    @property
    def output(self) -> Path:
        """The file with the command's stdout and stderr."""
        return self.folder / "output.log"

    @property
    def messages(self) -> Path:
        """The file with Slurm's own messages about the job."""
        return self.folder / "slurm.log"

    def is_own(self) -> bool:
        """Return True if the folder exists and nobody else can have written it."""
        try:
            return _is_own(self.folder)
        except OSError:
            return False

    def job(self) -> str | None:
        """Return the id of the job that runs the command, or else of the one that was submitted last; None: unknown."""
        return self.claimed_by() or self._read("job").strip() or None

    def write_job(self, job: str) -> None:
        """Record the id of the submitted job."""
        self._write("job", f"{job}\n".encode())

    def earlier(self) -> int:
        """Return the highest id that cannot be that of the run's job: an MLflow run may run again. 0: there is none."""
        number = self._read("earlier").partition("_")[0].strip()
        return int(number) if number.isdecimal() else 0

    def write_grace(self, grace: float) -> None:
        """Set the seconds between SIGTERM and SIGKILL for the next request to stop."""
        self._write("grace", f"{grace:.3f}\n".encode())

    def claimed_by(self, *, restarts: int = 0) -> str | None:
        """Return the id of the job that has begun to run the command; None: none has (yet).

        Args:
            restarts: How often Slurm has started the job again: an earlier start does not count.
        """
        job, count, *_ = [*self._read("claim").split(), "", ""]
        return job if job not in ("", _WITHDRAWN) and (int(count) if count.isdecimal() else 0) >= restarts else None

    def withdraw(self) -> bool:
        """Keep jobs from running the command. Return False if one has begun."""
        try:
            with open(self.folder / "claim", "xb", opener=_private) as file:
                file.write(f"{_WITHDRAWN} 0\n".encode())
        except FileExistsError:
            return self._read("claim").split()[:1] == [_WITHDRAWN]
        return True

    def exit_record(self) -> ExitRecord | None:
        """Return what the batch script has recorded of the command's end; None: nothing (yet)."""
        # Reading the folder makes NFS look for files that it did not find before.
        with suppress(OSError):
            os.listdir(self.folder)  # noqa: PTH208 - the names are not wanted
        line, end, _ = self._read("exit").partition("\n")
        code, _, asked = line.partition(" ")
        return ExitRecord(int(code), asked == "1") if end and code.isdecimal() else None

    def owner(self) -> Mapping[str, Any]:
        """Return the record of the process that looks after the run; empty: there is none."""
        try:
            found = json.loads(self._read("owner") or "{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def write_owner(self, owner: Mapping[str, Any]) -> None:
        """Record the process that looks after the run."""
        self._write("owner", json.dumps(dict(owner)).encode())

    def finish(self, output: Path | None, *, keep: bool) -> None:
        """Copy the output to its place on this machine, and remove what an ended run does not need any more.

        Args:
            output: The file for the run's output; None: it is left where it is.
            keep: True to leave the copy of the project.

        Raises:
            OSError: The output cannot be copied, or a file cannot be removed.
        """
        try:
            if output is not None and output != self.output:
                output.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with suppress(FileNotFoundError):
                    shutil.copyfile(self.output, output)
        finally:
            with suppress(FileNotFoundError):
                self.withdraw()  # a second job, of a repeated submit, may still wait
            for name in ("environ", "command.sh"):
                (self.folder / name).unlink(missing_ok=True)
            if not keep:
                remove_tree(self.project)

    def remove(self) -> None:
        """Remove all files of the run."""
        if os.path.lexists(self.folder):
            remove_tree(self.folder)

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(errors="replace")
        except OSError:
            return ""

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        new = path.with_name(f"{path.name}.new-{os.getpid()}-{threading.get_ident()}")
        with open(new, "wb", opener=_private) as file:
            file.write(content)
        new.rename(path)


async def write_run(
    job: Job,
    config: SlurmConfig,
    environ: Mapping[str, str],
    owner: Mapping[str, Any],
    copies: Coalescing[object, Path],
    *,
    grace: float,
) -> RunFiles:
    """Write the files of a run. A failed or cancelled call leaves none of them.

    Args:
        job: The job.
        config: Its configuration.
        environ: All variables of the command, the secret ones included.
        owner: The record of this process.
        copies: Shares the work between runs of the same project that are submitted at the same time.
        grace: Seconds between SIGTERM and SIGKILL when Slurm ends the job by itself.

    Raises:
        SubmitError: A file cannot be written.
        FetchError: The project cannot be read.
    """
    files = RunFiles(config.work_dir, job.run_id)

    def write(shared: Path, stop: threading.Event) -> None:
        earlier = files.job()
        files.remove()  # an MLflow run that runs again
        _make_own(files.folder.parent)
        files.folder.mkdir(mode=0o700)
        script = command_script(
            files.folder, files.project, job.command, environment=job.environment, setup=config.setup
        )
        files._write("command.sh", script.encode(errors="surrogateescape"))
        files._write("environ", environment_file(environ))
        files.write_owner(owner)
        if earlier is not None:
            files._write("earlier", f"{earlier}\n".encode())
        files.write_grace(grace)
        copy_tree(shared, files.project, stop)

    try:
        key = (job.project_dir, config.work_dir)
        shared = await copies(key, partial(copy_project, job.project_dir, config.work_dir))
        await stoppable(partial(write, shared))
    except BaseException as error:
        await FILES.finish(files.remove)
        if isinstance(error, OSError):
            text = f"the run's files cannot be written below {config.work_dir}: {error.strerror}"
            raise SubmitError(text, backend="slurm") from error
        raise
    return files


async def copy_project(folder: Path, work_dir: Path) -> Path:
    """Return the work folder's copy of a project, which is made once for each content.

    Raises:
        FetchError: The project cannot be read.
        OSError: The copy cannot be written.
    """
    packed = await pack(folder)
    try:
        target = work_dir / "projects" / packed.digest
        if not await FILES.run(target.is_dir):
            await stoppable(partial(_unpack, packed.file, target))
        await FILES.run(partial(os.utime, target))  # for `prune_shared`
        return target
    finally:
        packed.file.close()


def _unpack(file: Any, target: Path, stop: threading.Event) -> None:
    _make_own(target.parent)
    new = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        new.mkdir(mode=0o700)  # the tar of a project without files makes nothing
        with tarfile.open(fileobj=file) as archive:
            # Packed here: links and permissions are those of the project. Python 3.11.0 to 3.11.3 have no filters.
            archive.extraction_filter = getattr(tarfile, "tar_filter", None)
            archive.extractall(new)  # noqa: S202
        try:
            new.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    finally:
        if new.exists():
            remove_tree(new)


def link_array(folder: Path, runs: tuple[RunFiles, ...]) -> None:
    """Make the folder by which the tasks of an array find their runs. Blocking."""
    _make_own(folder.parent)
    folder.mkdir(mode=0o700)
    for index, files in enumerate(runs):
        (folder / str(index)).symlink_to(Path("..", "..", "runs", files.run_id))


def run_of_job(work_dir: Path, name: str, job: str) -> str | None:
    """Return the id of the MLflow run that a job is of; None if it is of none. Blocking.

    Args:
        work_dir: The work folder.
        name: The name of the job.
        job: The id of the job: ``48_7`` in an array.
    """
    _, _, index = job.partition("_")
    if not index:
        return name.removeprefix("mlfleet-") if name.startswith("mlfleet-") else None
    try:
        return Path(os.readlink(work_dir / "arrays" / name / index)).name  # noqa: PTH115
    except OSError:
        return None


def prune_shared(work_dir: Path) -> None:
    """Remove copies of projects that no run has used for a day, and the folders of arrays without runs. Blocking."""
    with suppress(OSError):
        for folder in (work_dir / "arrays").iterdir():
            if not any(link.exists() for link in folder.iterdir()):
                remove_tree(folder)
    with suppress(OSError):
        for folder in (work_dir / "projects").iterdir():
            if time.time() - folder.stat().st_mtime > _UNUSED_AFTER:
                remove_tree(folder)


def folders_of_runs(work_dir: Path) -> Iterator[RunFiles]:
    """Yield the files of all runs in a work folder. Blocking."""
    with suppress(OSError):
        for folder in sorted((work_dir / "runs").iterdir()):
            files = RunFiles(work_dir, folder.name)
            if files.is_own():
                yield files


def _make_own(folder: Path) -> None:
    """Make a folder that nobody else can write, since what it holds is run as this user.

    Raises:
        PermissionError: It exists and another user owns it, or can write it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    if not _is_own(folder):
        text = f"{folder} is another user's, or others can write it: give a work-dir of your own"
        raise PermissionError(errno.EACCES, text)


def _is_own(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
