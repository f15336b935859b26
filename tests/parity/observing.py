"""The observation of a call, as texts that are equal where both sides did the same."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.projects import pid_is_gone
from parity.places import Place

__all__ = ["Observed", "observe"]


@dataclass(frozen=True)
class Observed:
    """The observation of one call.

    Attributes:
        aspects: The text of each aspect that is compared. Aspects that do not apply are missing.
        error: The text of the error that was raised; empty if there was none.
        classes: The error's class and its base classes.
    """

    aspects: Mapping[str, str]
    error: str = ""
    classes: tuple[str, ...] = ()

    def __getitem__(self, aspect: str) -> str:
        return self.aspects.get(aspect, "")


def observe(
    place: Place, before: Mapping[str, str], answer: dict[str, Any], *, known: set[str], paths: Mapping[str, str]
) -> Observed:
    """Collect what the call left behind.

    Args:
        place: The place of the case.
        before: The snapshot of the place before the call.
        answer: The answer of the side's process.
        known: The MLflow runs of the cases before this one. The runs of this case are added.
        paths: The paths of the side, with the words that replace them.
    """
    records = [_Record.read(folder) for folder in sorted((place.folder / "record").iterdir())]
    command = next((record for record in reversed(records) if record.is_command), None)
    runs = _runs(place, answer, command, known)
    mask = _Mask(place, paths, [run["info"]["run_id"] for run in runs])
    aspects = {
        "outcome": "error" if "error" in answer else "no error",
        "runs": ", ".join(sorted(run["info"]["status"] for run in runs)) or "none",
        "backend_config": str(answer["backend_config"]),
        "project files": ", ".join(_changes(before, place.snapshot())),
        "temporary files": "left" if any((place.folder / "temporary").iterdir()) else "",
        "storage": "left" if any((place.folder / "storage").iterdir()) else "",
        "processes": _left_process(place.folder / "left"),
    }
    if "first_status" in answer:
        aspects["handle first status"] = answer["first_status"]
    if "error" in answer:
        aspects["error class"] = answer["classes"][0]
    else:
        aspects |= {"handle wait": str(answer["wait"]), "handle status": answer["status"]}
        aspects["handle run_id"] = "an MLflow run" if answer["run_id"] in mask.run_ids else "unknown"
    if command is not None:
        aspects |= {"command": command.argv[-1], "folder": command.folder, "exit code": command.code}
        aspects |= {f"variables {name}": value for name, value in command.variables.items()}
    aspects |= _inside(place.folder / "inside")
    if len(runs) == 1:
        aspects |= _tracked(place, runs[0])
    for name in ("variables MLFLOW_EXPERIMENT_ID", "container variables MLFLOW_EXPERIMENT_ID"):
        if aspects.get(name) in {run["info"]["experiment_id"] for run in runs}:
            aspects[name] = "that of the run"
    masked = {name: mask(text) for name, text in aspects.items()}
    return Observed(masked, mask(answer.get("error", "")), tuple(answer.get("classes", ())))


@dataclass(frozen=True)
class _Record:
    """The arguments and the environment of a call of the first bash on PATH."""

    argv: list[str]
    variables: dict[str, str]
    folder: str
    code: str

    @classmethod
    def read(cls, folder: Path) -> _Record:
        argv, environ, where = ((folder / name).read_text() for name in ("cmdline", "environ", "folder"))
        code = folder / "code"
        return cls(
            argv.split("\0")[2:-1],  # the shim is a script: its own path follows that of its interpreter
            _variables(environ.split("\0")),
            where.removesuffix("\n"),
            code.read_text().strip() if code.exists() else "",
        )

    @property
    def is_command(self) -> bool:
        """True if this is the project's command: scripts and the steps of a build do not belong to a run."""
        return self.argv[:1] == ["-c"] and "MLFLOW_RUN_ID" in self.variables


def _left_process(note: Path) -> str:
    """Return ``left`` if the process whose id is in `note` goes on, and kill it."""
    if not note.exists() or pid_is_gone(pid := int(note.read_text())):
        return ""
    os.kill(pid, signal.SIGKILL)
    return "left"


def _variables(lines: list[str]) -> dict[str, str]:
    pairs = (line.partition("=") for line in lines if "=" in line)
    # `_` is what the process before it was called with, by way of a shell.
    return {name: value for name, _, value in pairs if name not in ("PARITY_RECORD", "_")}


def _runs(place: Place, answer: dict[str, Any], command: _Record | None, known: set[str]) -> list[dict[str, Any]]:
    tracking = place.ground.tracking
    latest = tracking.latest_runs(place.words["@experiment"])
    found = {run["info"]["run_id"]: run for run in latest if run["info"]["run_id"] not in known}
    ids = [answer.get("run_id"), command.variables["MLFLOW_RUN_ID"] if command else None]
    for run_id in ids:
        if run_id and run_id not in found:
            found[run_id] = tracking.run(run_id)
    known.update(found)
    found.pop(place.words.get("@parent", ""), None)
    return list(found.values())


def _tracked(place: Place, run: dict[str, Any]) -> dict[str, str]:
    info, data = run["info"], run["data"]
    aspects = {
        "status": info["status"],
        "end time": "set" if info.get("end_time") else "",
        "experiment": place.ground.tracking.experiment_name(info["experiment_id"]),
    }
    aspects |= {f"parameters {each['key']}": each["value"] for each in data.get("params", ())}
    tags = {each["key"]: each["value"] for each in data.get("tags", ())}
    if "run_name" not in place.case.arguments:
        tags.pop("mlflow.runName", None)  # a random one of the server's
    return aspects | {f"tags {name}": value for name, value in tags.items()}


def _inside(folder: Path) -> dict[str, str]:
    """Return the aspects that a container wrote into `folder`."""
    aspects: dict[str, str] = {}
    for path in folder.iterdir():
        text = path.read_text()
        if path.name == "variables":
            inside = _variables(text.split("\n"))
            aspects |= {f"container variables {name}": value for name, value in inside.items() if name != "HOSTNAME"}
        else:
            aspects[f"container {path.name}"] = text.strip()
    return aspects


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@dataclass
class _Mask:
    """Replaces texts that are different on each side by words."""

    place: Place
    paths: Mapping[str, str]
    run_ids: list[str]
    _pairs: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        words = {text: word for word, text in self.place.words.items() if word not in ("@experiment", "@there")}
        words |= dict(self.paths) | dict.fromkeys(self.run_ids, "@run")
        side = str(self.place.folder.parent)
        words[side] = "@side"
        self._pairs = sorted(words.items(), key=lambda pair: len(pair[0]), reverse=True)

    def __call__(self, text: str) -> str:
        for found, word in self._pairs:
            text = text.replace(found, word)
        # Random names.
        text = re.sub(r"@case/temporary/[^/\s'\"]+", "@case/temporary/@folder", text)
        return re.sub(r"(@case/storage/(?:new/)?)[^/\s'\"]+", r"\1@folder", text)
