"""The request for one run: its arguments, checked as far as that is possible without the project."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

from mlfleet._engine.options import Output, RunOptions
from mlfleet._engine.variables import read_variables
from mlfleet._process.inherit import read_inherit_env
from mlfleet._text.documents import read_json
from mlfleet._text.plain import UNENCODABLE
from mlfleet.errors import UsageError
from mlfleet.resources import Resources
from mlfleet.runs import Timeouts

__all__ = [
    "NAME_TAG",
    "SPACE_TAG",
    "STOPPED_TAG",
    "Output",
    "RunOptions",
    "RunRequest",
    "SweepMember",
    "active_run_id",
    "choose_experiment",
    "tagged_number",
]

# The tags of a sweep's own MLflow run: its name, its space as JSON, and the reason why it ended early.
NAME_TAG = "mlfleet.sweep.name"
SPACE_TAG = "mlfleet.sweep.space"
STOPPED_TAG = "mlfleet.sweep.stopped"


_NUMBER = re.compile(r"[0-9]{1,15}")


def tagged_number(tags: Mapping[str, str], tag: str) -> int | None:
    """Return the number in a tag, which anybody may have written; None if there is none."""
    text = tags.get(tag, "")
    return int(text) if _NUMBER.fullmatch(text) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepMember:
    """The place of a run in its sweep.

    Attributes:
        sweep_id: The id of the sweep's MLflow run.
        index: The number of its point in the space, counted from 0.
        key: The key of the point, a hash of the project's content, the entry point and the parameters; None if the
            sweep cannot be resumed.
        attempt: The number of the attempt, counted from 1.
        retry_reason: The reason why the previous attempt failed; None for the first one.
        durable: Let the run outlive this process on this machine, so that it can be found again.
        token: The number by which the driver's list knows the run before it has an id; None if there is no list.
    """

    sweep_id: str
    index: int
    key: str | None = None
    attempt: int = 1
    retry_reason: str | None = None
    durable: bool = False
    token: str | None = None

    ID_TAG: ClassVar[str] = "mlfleet.sweep.id"
    KEY_TAG: ClassVar[str] = "mlfleet.sweep.point"
    INDEX_TAG: ClassVar[str] = "mlfleet.sweep.index"
    ATTEMPT_TAG: ClassVar[str] = "mlfleet.sweep.attempt"
    REASON_TAG: ClassVar[str] = "mlfleet.sweep.retry_reason"
    MEMBER_TAG: ClassVar[str] = "mlfleet.sweep.member"
    LOST_TAG: ClassVar[str] = "mlfleet.lost"
    """The tag of a run that did not fail by itself, but died with its driver: its point runs again at resume."""

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Self | None:
        """Return the place that `tags` wrote; None if the run does not belong to a sweep."""
        sweep_id, index = tags.get(cls.ID_TAG), tagged_number(tags, cls.INDEX_TAG)
        if sweep_id is None or index is None:
            return None
        return cls(
            sweep_id=sweep_id,
            index=index,
            key=tags.get(cls.KEY_TAG),
            durable=cls.KEY_TAG in tags,
            attempt=tagged_number(tags, cls.ATTEMPT_TAG) or 1,
            retry_reason=tags.get(cls.REASON_TAG),
        )

    def tags(self) -> dict[str, str]:
        """Return the tags of the MLflow run that hold this place."""
        tags = {
            self.ID_TAG: self.sweep_id,
            self.KEY_TAG: self.key,
            self.INDEX_TAG: str(self.index),
            self.ATTEMPT_TAG: str(self.attempt),
            self.REASON_TAG: self.retry_reason,
            self.MEMBER_TAG: self.token,
        }
        return {name: value for name, value in tags.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """The request for one run. `OPTIONS` describes its fields; the first fifteen are arguments of mlflow.projects.run.

    Attributes:
        docker_auth: The credentials of the image's registry (secret).
        timeouts: The time limits of the stages; None for those of the Fleet.
        env: The caller's environment variables for the command (secret).
        inherit_env: The variables of this process that the command gets; None for those that the Fleet says.
        member: The place of the run in its sweep; None if it does not belong to one.
        group: The group of the run in its Fleet; None if it belongs to none.
    """

    uri: str
    entry_point: str = "main"
    version: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    docker_args: Mapping[str, Any] | None = field(default=None, repr=False)
    experiment_name: str | None = None
    experiment_id: str | None = None
    backend: str = "local"
    backend_config: Mapping[str, Any] | str | os.PathLike[str] | None = None
    storage_dir: str | os.PathLike[str] | None = None
    run_id: str | None = None
    run_name: str | None = None
    env_manager: str | None = None
    build_image: bool = False
    docker_auth: Mapping[str, Any] | None = field(default=None, repr=False)
    parent_run_id: str | None = None
    tags: Mapping[str, str] | None = None
    timeouts: Timeouts | None = None
    output: Output = "capture"
    log_output: bool = False
    resources: Resources | None = None
    env: Mapping[str, str] | None = field(default=None, repr=False)
    inherit_env: bool | Collection[str] | None = None
    detach: bool = False
    member: SweepMember | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if self.experiment_name and self.experiment_id:
            raise UsageError("both experiment_name and experiment_id are given: give one of them")
        for name in ("parameters", "docker_args", "tags"):
            # mlflow takes None for an empty mapping. The copy is safe from later changes of the caller's mapping.
            given = getattr(self, name)
            if given is not None and not isinstance(given, Mapping):
                raise UsageError(f"{name} is {type(given).__name__}: give a mapping of names to values")
            object.__setattr__(self, name, dict(given or {}))
        object.__setattr__(self, "env", read_variables(self.env))
        if self.inherit_env is not None:
            object.__setattr__(self, "inherit_env", read_inherit_env(self.inherit_env))
        self._check_texts()
        if self.output not in ("capture", "inherit"):
            raise UsageError(f"output is {self.output!r}: give 'capture' or 'inherit'")
        if self.detach and self.output == "inherit":
            raise UsageError("a detached run has no stdout of this process: give output='capture' with detach=True")
        if self.group == "":
            raise UsageError(f"group is {self.group!r}: give the name of a group, or None")
        if self.detach and self.group is not None:
            raise UsageError("a detached run does not count in a Fleet: leave out its group, or detach")
        if self.log_output and self.output == "inherit":
            raise UsageError("log_output needs the output captured: give output='capture' with it")

    def _check_texts(self) -> None:
        """Check the texts that go to tracking or traces as they are; others are checked where they are used."""
        names = ("run_name", "experiment_name", "experiment_id", "run_id", "parent_run_id", "storage_dir", "group")
        texts = [(name, os.fspath(getattr(self, name) or "")) for name in names]
        for tag, value in (self.tags or {}).items():
            texts += [("the name of a tag", str(tag)), (f"the tag {str(tag)!r}", str(value))]
        for name, text in texts:
            if UNENCODABLE.search(text):
                raise UsageError(f"{name} is {text[:200]!r}: give a text without NUL and with valid UTF-8 only")

    @classmethod
    def of(
        cls,
        uri: str | os.PathLike[str],
        entry_point: str = "main",
        version: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        *,
        group: str | None = None,
        **options: Unpack[RunOptions],
    ) -> Self:
        """Make a request from the arguments of a public function. The default parent is mlflow's active run."""
        if options.get("parent_run_id") is None:
            options["parent_run_id"] = active_run_id()
        return cls(
            uri=os.fspath(uri),
            entry_point=entry_point,
            version=version,
            parameters=parameters or {},
            group=group,
            **options,
        )

    def read_backend_config(self) -> dict[str, Any]:
        """Return ``backend_config`` as a new dictionary. Blocking if it is a file.

        Raises:
            UsageError: The value is neither a mapping nor the path of a ``.json`` file with an object.
            SpecError: The file is missing or malformed; the error has the line and the column.
        """
        config = self.backend_config
        if config is None or config == "":
            return {}
        if isinstance(config, Mapping):
            return dict(config)
        if not isinstance(config, str | os.PathLike):
            raise UsageError(f"backend_config is {type(config).__name__}: give a mapping, or the path of a .json file")
        if Path(config).suffix != ".json":
            raise UsageError(
                f"backend_config is {os.fspath(config)!r}: give a mapping, or the path of a file that ends in .json"
            )
        data = read_json(Path(config))
        if not isinstance(data, dict):
            raise UsageError(f"backend_config: {os.fspath(config)} holds {type(data).__name__}, not a JSON object")
        return data


def active_run_id() -> str | None:
    """Return the id of mlflow's active run in this thread; None if there is none or mlflow is not imported."""
    mlflow = sys.modules.get("mlflow")
    active_run = getattr(mlflow, "active_run", None)
    run = active_run() if active_run is not None else None
    return None if run is None else str(run.info.run_id)


def choose_experiment(name: str | None, experiment_id: str | None) -> tuple[str | None, str]:
    """Return the experiment of a run: as asked for, else by the environment, else the default one.

    Args:
        name: The experiment's name; None if none was given.
        experiment_id: The experiment's id; None if none was given.

    Returns:
        The experiment's name and an empty text, or None and its id.

    Raises:
        UsageError: Both are given.
    """
    if name and experiment_id:
        raise UsageError("both experiment_name and experiment_id are given: give one of them")
    if experiment_id:
        return None, str(experiment_id)
    chosen = name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    return (chosen, "") if chosen else (None, os.environ.get("MLFLOW_EXPERIMENT_ID") or "0")
