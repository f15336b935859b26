"""The options of a run: the list from which the command line and the tables of the documentation are made.

`RunOptions` and the signatures of the public functions have to be written out for type checkers and editors. A test
compares them with `OPTIONS`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from mlfleet.resources import Resources
from mlfleet.runs import DEFAULT_CANCEL_GRACE, Timeouts

__all__ = ["OPTIONS", "Goal", "Output", "RunOption", "RunOptions"]

Output = Literal["capture", "inherit"]
"""The destination of a run's stdout and stderr: a file of its own, or the stdout and stderr of this process."""

Goal = Literal["min", "max"]
"""The direction in which the values of a metric are better."""


class RunOptions(TypedDict, total=False):
    """The arguments of a run after the first four, for functions that pass them on."""

    docker_args: Mapping[str, Any] | None
    experiment_name: str | None
    experiment_id: str | None
    backend: str
    backend_config: Mapping[str, Any] | str | os.PathLike[str] | None
    storage_dir: str | os.PathLike[str] | None
    run_id: str | None
    run_name: str | None
    env_manager: str | None
    build_image: bool
    docker_auth: Mapping[str, Any] | None
    parent_run_id: str | None
    tags: Mapping[str, str] | None
    timeouts: Timeouts | None
    output: Output
    log_output: bool
    resources: Resources | None
    env: Mapping[str, str] | None
    inherit_env: bool | Collection[str] | None
    detach: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOption:
    """One option of a run.

    Attributes:
        name: The argument's name in Python. ``timeouts.run`` is a field of an argument, which is an option of its own
            on the command line.
        text: The description, for ``--help`` and for the documentation.
        in_python: The description of the Python argument, where it takes several values at once; empty for `text`.
        default: The default value, as people read it; empty if there is none, or if `text` says it.
        flags: The names on the command line; empty if the option exists in Python only.
        metavar: The placeholder of its value; empty for a flag.
        form: How the command line reads the value. ``pairs`` are NAME=VALUE, ``switches`` are NAME or NAME=VALUE, and
            so are ``variables``, whose values are secret; all three may be given several times. ``names`` are
            separated by commas, or ``all`` or ``none``.
        commands: The commands that have the option.
        variable: The environment variable that replaces the default.
    """

    name: str
    text: str
    default: str = ""
    flags: tuple[str, ...] = ()
    metavar: str = ""
    form: Literal["text", "flag", "pairs", "switches", "variables", "names", "seconds", "whole", "number"] = "text"
    commands: tuple[str, ...] = ("run", "sweep")
    variable: str = ""
    in_python: str = ""


OPTIONS: tuple[RunOption, ...] = (
    RunOption(
        name="uri",
        metavar="URI",
        text="The project: a folder, a Git repository or a zip file. #sub/folder picks a folder inside.",
    ),
    RunOption(
        name="entry_point",
        flags=("-e", "--entry-point"),
        metavar="NAME",
        default="main",
        text="The entry point to run: a name from MLproject, or a .py, .sh or .R script of the project.",
    ),
    RunOption(
        name="version",
        flags=("-v", "--version"),
        metavar="VERSION",
        text="The commit, branch or tag of a Git project. Without it: the repository's default branch.",
    ),
    RunOption(
        name="parameters",
        flags=("-P", "--param-list"),
        metavar="NAME=VALUE",
        form="pairs",
        commands=("run",),
        text="A parameter; may be given several times. A list is NAME=[a,b], or several values of one name. One that "
        "the entry point does not declare is appended to its command.",
        in_python="The parameters by name; lists where the type is list. Those that the entry point does not declare "
        "are appended to its command.",
    ),
    RunOption(
        name="docker_args",
        flags=("-A", "--docker-args"),
        metavar="NAME[=VALUE]",
        form="switches",
        text="An option of docker run, as in -A gpus=all or -A t; may be given several times.",
        in_python="Options of docker run by name, as in {'gpus': 'all', 't': True}.",
    ),
    RunOption(
        name="experiment_name",
        flags=("--experiment-name",),
        metavar="NAME",
        variable="MLFLOW_EXPERIMENT_NAME",
        text="The name of the experiment, which is created if it does not exist.",
    ),
    RunOption(
        name="experiment_id",
        flags=("--experiment-id",),
        metavar="ID",
        variable="MLFLOW_EXPERIMENT_ID",
        default="0",
        text="The id of the experiment, instead of its name.",
    ),
    RunOption(
        name="backend",
        flags=("-b", "--backend"),
        metavar="NAME",
        default="local",
        text="The backend that runs the project: local, docker, kubernetes, databricks, slurm, or a plugin's name.",
    ),
    RunOption(
        name="backend_config",
        flags=("-c", "--backend-config"),
        metavar="FILE|JSON",
        text="The settings of the backend: the path of a file that ends in .json, or a JSON object.",
        in_python="The settings of the backend: a mapping, or the path of a file that ends in .json.",
    ),
    RunOption(
        name="storage_dir",
        flags=("--storage-dir",),
        metavar="FOLDER",
        variable="MLFLOW_TMP_DIR",
        text="The folder for downloaded parameters of type path. Without it: the folder for temporary files.",
    ),
    RunOption(
        name="synchronous",
        default="True",
        text="Wait for the end of the run. False returns as soon as the MLflow run exists.",
    ),
    RunOption(
        name="run_id",
        flags=("--run-id",),
        metavar="ID",
        commands=("run",),
        text="The id of an existing MLflow run to use instead of a new one.",
    ),
    RunOption(
        name="run_name",
        flags=("--run-name",),
        metavar="NAME",
        text="The name of the MLflow run. Without it: a name that MLflow makes up.",
    ),
    RunOption(
        name="env_manager",
        flags=("--env-manager",),
        metavar="NAME",
        text="The tool that builds the Python environment: local (none is built), virtualenv, uv or conda. Without it: "
        "the tool that fits the project's files.",
    ),
    RunOption(
        name="build_image",
        flags=("--build-image",),
        form="flag",
        default="False",
        text="For Docker projects: build an image that contains the project's files.",
    ),
    RunOption(
        name="docker_auth",
        text="The credentials of the image's registry: username and password, or what else the engine takes.",
    ),
    RunOption(
        name="tracking_uri",
        flags=("--tracking-uri",),
        metavar="URI",
        variable="MLFLOW_TRACKING_URI",
        default="sqlite:///mlflow.db",
        text="The tracking store: a server (http://…), a database (sqlite:///FILE) or databricks.",
    ),
    RunOption(
        name="parent_run_id",
        text="The id of the MLflow run under which this one is nested. Without it: mlflow's active run in this thread.",
    ),
    RunOption(
        name="tags",
        flags=("--tag",),
        metavar="NAME=VALUE",
        form="pairs",
        text="A tag of the MLflow run; may be given several times.",
        in_python="More tags of the MLflow run, by name.",
    ),
    RunOption(
        name="timeouts",
        text="The time limits of each stage, as Timeouts(queue=…, setup=…, run=…, cancel_grace=…) in seconds.",
    ),
    RunOption(
        name="timeouts.setup",
        flags=("--timeout-setup",),
        metavar="TIME",
        form="seconds",
        text="The time limit for everything between the queue and the command: 90s, 5m, 1h30m; a plain number is "
        "seconds. Without it: no limit.",
    ),
    RunOption(
        name="timeouts.run",
        flags=("--timeout-run",),
        metavar="TIME",
        form="seconds",
        text="The time limit of the command. Without it: no limit.",
    ),
    RunOption(
        name="timeouts.cancel_grace",
        flags=("--cancel-grace",),
        metavar="TIME",
        form="seconds",
        default=f"{DEFAULT_CANCEL_GRACE:g}s",
        text="The time between the request to stop and the kill.",
    ),
    RunOption(
        name="output",
        default="'capture'",
        text="The destination of the run's output: 'capture' is its own file, 'inherit' the stdout of this process.",
    ),
    RunOption(
        name="log_output",
        flags=("--log-output",),
        form="flag",
        default="False",
        text="Log the output as the artifact output.log, too.",
    ),
    RunOption(
        name="resources",
        text="What the run needs, as Resources(cpus=…, gpus=…, memory=…). On this machine it waits until that is free; "
        "in containers these are its limits.",
    ),
    RunOption(
        name="resources.cpus",
        flags=("--cpus",),
        metavar="N",
        form="number",
        text="CPUs to reserve for each run, as in 0.5. On this machine it waits until they are free; a container can "
        "use no more.",
    ),
    RunOption(
        name="resources.gpus",
        flags=("--gpus",),
        metavar="N",
        form="whole",
        text="GPUs to reserve for each run. The run sees only these (CUDA_VISIBLE_DEVICES).",
    ),
    RunOption(
        name="resources.memory",
        flags=("--memory",),
        metavar="SIZE",
        text="Memory to reserve for each run, in bytes or with a unit, as in 4Gi. A container can use no more.",
    ),
    RunOption(
        name="env",
        flags=("--env",),
        metavar="NAME[=VALUE]",
        form="variables",
        text="An environment variable for the command; may be given several times. NAME alone copies the variable that "
        "is set here. The values are kept secret.",
        in_python="Environment variables for the command, by name. The values are kept secret.",
    ),
    RunOption(
        name="inherit_env",
        flags=("--inherit-env",),
        metavar="NAMES",
        form="names",
        default="all",
        text="The variables of this process that the command gets besides --env: all, none, or names as in "
        "AWS_*,HTTPS_PROXY. PATH, HOME, LANG and the like are always among them.",
        in_python="The variables of this process that the command gets: True, False or names, as in ['AWS_*']. PATH, "
        "HOME, LANG and the like are always among them. None: as the Fleet says, whose default is True.",
    ),
    RunOption(
        name="detach",
        flags=("--detach",),
        form="flag",
        default="False",
        commands=("run",),
        text="Return when the MLflow run exists; a process of its own supervises the run from then on. mlfleet logs, "
        "wait and cancel find it.",
    ),
    RunOption(
        name="progress",
        default="False",
        commands=(),
        text="Show the stage of the run and the last line of its output: as a view that is updated on a terminal and "
        "in a notebook, as a few lines on stderr elsewhere.",
    ),
)
"""The options of a run, in the order of the public functions' arguments."""
