"""The ``backend_config`` of the Slurm backend, checked before anything exists."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlfleet._text.documents import nearest
from mlfleet.errors import UsageError

__all__ = ["KEYS", "SlurmConfig", "default_work_dir", "parse_config"]

WORK_DIR_VARIABLE = "MLFLEET_SLURM_WORK_DIR"
_START_TIMEOUT = 60.0
_LATENCY = 30.0

# Keys that become options of sbatch of the same name, in the words of its manual page (Slurm 22.05).
_TEXTS = (
    "partition", "account", "qos", "time", "mem", "mem-per-cpu", "gres", "gpus-per-node", "constraint", "exclude",
    "nodelist", "reservation", "licenses", "dependency",
)  # fmt: skip
_NUMBERS = ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task")
_OWN = (
    "clusters", "exclusive", "requeue", "sbatch-args", "work-dir", "setup", "start-timeout", "latency", "array", "keep",
    "tracking-uri",
)  # fmt: skip
KEYS = (*_TEXTS, *_NUMBERS, *_OWN)

# Options of sbatch that this backend sets itself, with what to do instead.
_RESERVED = {
    option: reason
    for options, reason in (
        ("job-name J", "mlfleet finds the jobs of its runs by their names"),
        ("output o error e", "the output is in the run's folder; read it with `mlfleet logs`"),
        ("array a", "give the key array: true"),
        ("export export-file get-user-env", "give the variables to the run (env=, --env)"),
        ("wrap", "the command is the project's"),
        ("chdir D", "the command runs in the project's folder"),
        ("parsable", "mlfleet reads the answer of sbatch"),
        ("wait W", "mlfleet waits for the job"),
        ("clusters M", "give the key clusters"),
        ("requeue no-requeue", "give the key requeue"),
        ("open-mode", "the output is appended to"),
        ("test-only", "use --dry-run"),
        ("comment", "mlfleet finds the run's folder by it"),
    )
    for option in options.split()
}
_OPTION = re.compile(r"--([a-z][a-z-]*)(=.*)?|-([A-Za-z])(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmConfig:
    """The checked ``backend_config``.

    Attributes:
        options: The options of sbatch from keys of the same names, and their values.
        sbatch_args: Further arguments of sbatch, as they are.
        clusters: The cluster to submit to (``--clusters``); None: that of this machine.
        exclusive: True if jobs share their nodes with no other jobs.
        requeue: True if Slurm may start a job again after a preemption or a failure of its node.
        work_dir: The folder for runs, projects and environments, which the nodes must see at the same path.
        setup: Lines of bash that run before the command, such as ``module load``.
        start_timeout: Seconds for which a job may wait for a reason that does not pass by itself; None: no limit.
        latency: Seconds after which a file that was written on a node is visible on this machine.
        array: True if submits with equal options that follow each other become one array of jobs.
        keep: True if the run's copy of the project stays after the end of the run.
        tracking_uri: The address of the tracking server or store as the nodes reach it; None: the same as here.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    sbatch_args: tuple[str, ...] = ()
    clusters: str | None = None
    exclusive: bool = False
    requeue: bool = False
    work_dir: Path = field(default_factory=lambda: default_work_dir(os.environ))
    setup: tuple[str, ...] = ()
    start_timeout: float | None = _START_TIMEOUT
    latency: float = _LATENCY
    array: bool = False
    keep: bool = False
    tracking_uri: str | None = None


def default_work_dir(environ: Mapping[str, str]) -> Path:
    """Return the folder of ``MLFLEET_SLURM_WORK_DIR``, else ``~/.mlfleet/slurm``: clusters usually share the homes.

    Raises:
        UsageError: The path is relative, or sbatch would not take it as it is.
    """
    return _absolute(environ.get(WORK_DIR_VARIABLE) or "~/.mlfleet/slurm", WORK_DIR_VARIABLE)


def parse_config(config: Mapping[str, Any], environ: Mapping[str, str]) -> SlurmConfig:
    """Check ``backend_config``.

    Args:
        config: The caller's ``backend_config``; not changed.
        environ: The variables of this process, for the default work folder.

    Raises:
        UsageError: A key is unknown or a value is wrong; the text names the key.
    """
    for key in config:
        if key not in KEYS:
            name = str(key)
            hint = nearest(name.replace("_", "-"), KEYS)
            raise UsageError(
                f"backend_config has the unknown key {name!r}{hint}. It takes {', '.join(KEYS)}; other options of"
                " sbatch go into sbatch-args"
            )
    options = {key: _option(config, key) for key in (*_TEXTS, *_NUMBERS) if config.get(key) is not None}
    if "mem" in options and "mem-per-cpu" in options:
        raise UsageError("backend_config: both mem and mem-per-cpu are given, which sbatch refuses: give one of them")
    work_dir = _text(config, "work-dir")
    return SlurmConfig(
        options=options,
        sbatch_args=_sbatch_args(config),
        clusters=_clusters(config),
        exclusive=_flag(config, "exclusive"),
        requeue=_flag(config, "requeue"),
        work_dir=default_work_dir(environ) if work_dir is None else _absolute(work_dir, "backend_config: work-dir"),
        setup=_lines(config, "setup"),
        start_timeout=_seconds(config, "start-timeout", _START_TIMEOUT, none=True),
        latency=_seconds(config, "latency", _LATENCY) or 0.0,
        array=_flag(config, "array"),
        keep=_flag(config, "keep"),
        tracking_uri=_text(config, "tracking-uri"),
    )


def _option(config: Mapping[str, Any], key: str) -> str:
    value = config[key]
    if key in _NUMBERS and (type(value) is int or (isinstance(value, str) and re.fullmatch(r"\d+(-\d+)?", value))):
        return str(value)
    if key in _TEXTS and type(value) in (str, int) and str(value) and "\0" not in str(value):
        return str(value)
    expected = "a whole number" if key in _NUMBERS else f"a text as sbatch takes it (--{key})"
    hint = (
        ". YAML reads 1:30 as a number: write it in quotes" if key == "time" and isinstance(value, float | int) else ""
    )
    raise UsageError(f"backend_config: {key} is {value!r}: give {expected}{hint}")


def _sbatch_args(config: Mapping[str, Any]) -> tuple[str, ...]:
    arguments = _lines(config, "sbatch-args", expected="a list of arguments such as ['--mail-type=FAIL']")
    for argument in arguments:
        match = _OPTION.fullmatch(argument)
        if match is None:
            raise UsageError(
                f"backend_config: sbatch-args holds {argument!r}: give each option with its value as one text, such as"
                " '--mail-type=FAIL' or '-B2'"
            )
        name = match[1] or match[3]
        if name in _RESERVED:
            raise UsageError(f"backend_config: sbatch-args holds {argument!r}: {_RESERVED[name]}")
        if name in KEYS:
            raise UsageError(f"backend_config: sbatch-args holds {argument!r}: give the key {name}")
        # sbatch takes abbreviations, too.
        if full := next((each for each in _RESERVED if match[1] and each.startswith(name)), None):
            raise UsageError(f"backend_config: sbatch-args holds {argument!r}, short for --{full}: {_RESERVED[full]}")
    return arguments


def _clusters(config: Mapping[str, Any]) -> str | None:
    text = _text(config, "clusters")
    if text is not None and not re.fullmatch(r"[\w.-]+", text):
        raise UsageError(f"backend_config: clusters is {text!r}: give the name of one cluster")
    return text


def _absolute(text: str, source: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_absolute():
        raise UsageError(f"{source} is {text!r}: give an absolute path, which the nodes see as this machine does")
    # sbatch reads % in the path of the output as a pattern, and \ as a request not to.
    if re.search(r"[%\\\n]", str(path)):
        raise UsageError(f"{source} is {text!r}: give a path without %, \\ and line breaks")
    return path


def _text(config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise UsageError(f"backend_config: {key} is {value!r}: give a text, or leave it out")
    return os.fspath(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UsageError(f"backend_config: {key} is {value!r}: give true or false")
    return bool(value)


def _lines(config: Mapping[str, Any], key: str, expected: str = "a text or a list of lines") -> tuple[str, ...]:
    value = config.get(key)
    if value is None:
        return ()
    lines = [value] if isinstance(value, str) else value
    if not isinstance(lines, list | tuple) or not all(isinstance(line, str) and "\0" not in line for line in lines):
        raise UsageError(f"backend_config: {key} is {value!r}: give {expected}")
    return tuple(lines)


def _seconds(config: Mapping[str, Any], key: str, default: float, *, none: bool = False) -> float | None:
    if key not in config:
        return default
    value = config[key]
    if value is None and none:
        return None
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise UsageError(f"backend_config: {key} is {value!r}: give seconds{', or null for no limit' if none else ''}")
    return float(value)
