"""The places of cases: a folder for each side of each case, and the services that all of them share."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.git_http import GitServer
from components.http_files import FileServer

if TYPE_CHECKING:
    from parity.case import Case

__all__ = ["Ground", "Place", "TrackingServer"]


class TrackingServer:
    """A client of the tracking server that is independent of both sides."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._names: dict[str, str] = {}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, path: str, **body: object) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}/api/2.0/mlflow/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with self._opener.open(request) as answer:
            return dict(json.load(answer))

    def create_experiment(self, name: str) -> str:
        experiment_id = str(self.call("experiments/create", name=name)["experiment_id"])
        self._names[experiment_id] = name
        return experiment_id

    def create_run(self, experiment_id: str, **more: object) -> str:
        return str(self.call("runs/create", experiment_id=experiment_id, **more)["run"]["info"]["run_id"])

    def latest_runs(self, experiment_id: str) -> list[dict[str, Any]]:
        found = self.call("runs/search", experiment_ids=[experiment_id], max_results=5)
        return list(found.get("runs", ()))

    def run(self, run_id: str) -> dict[str, Any]:
        return dict(self._get(f"runs/get?run_id={run_id}")["run"])

    def experiment_name(self, experiment_id: str) -> str:
        if experiment_id not in self._names:
            found = self._get(f"experiments/get?experiment_id={experiment_id}")
            self._names[experiment_id] = str(found["experiment"]["name"])
        return self._names[experiment_id]

    def put_artifact(self, run_id: str, path: str, content: bytes) -> None:
        uri = str(self.run(run_id)["info"]["artifact_uri"])
        where = uri.removeprefix("mlflow-artifacts:/")
        url = f"{self.url}/api/2.0/mlflow-artifacts/artifacts/{where}/{path}"
        self._opener.open(urllib.request.Request(url, content, method="PUT")).close()

    def _get(self, path: str) -> dict[str, Any]:
        with self._opener.open(f"{self.url}/api/2.0/mlflow/{path}") as answer:
            return dict(json.load(answer))


@dataclass(frozen=True)
class Ground:
    """The services and folders that all cases of both sides share.

    Attributes:
        tracking: The tracking server.
        root: The folder that contains the places of all cases; `git` serves it over HTTP.
        tools: A folder with programs that come first on PATH.
        home: An empty home.
        git: A server of repositories.
        files: A server of zips and data.
        plugins: A folder for PYTHONPATH with a plugin of mlflow.
        unique: A name that other sessions do not have. Everything outside `root` is named ``parity-<unique>…``.
        words: Words for texts that fixtures determine, as in `Place`.
    """

    tracking: TrackingServer
    root: Path
    tools: Path
    home: Path
    git: GitServer
    files: FileServer
    plugins: Path
    unique: str
    words: dict[str, str] = field(default_factory=dict)


@dataclass
class Place:
    """The place in which one side runs one case.

    Attributes:
        ground: The services that it shares.
        case: The case.
        folder: The folder with everything of the case; ``@case`` in the texts of the case.
        project: The project's folder; ``@project`` in the texts of the case.
        words: Other words in the texts of the case, with the texts that replace them.
    """

    ground: Ground
    case: Case
    folder: Path
    words: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, ground: Ground, folder: Path, case: Case, experiment_id: str) -> Place:
        """Make the place and write the case's project.

        Args:
            ground: The services that it shares.
            folder: The folder for everything of the case.
            case: The case.
            experiment_id: The experiment of its run, unless the case needs one of its own.
        """
        place = cls(ground, case, folder)
        for name in ("record", "inside", "temporary", "storage", "project"):
            (folder / name).mkdir(parents=True)
        where = "/".join(folder.parts[-2:])
        name = f"parity/{where}"
        place.words = {
            "@project": str(place.project),
            "@case": str(folder),
            "@experiment": ground.tracking.create_experiment(name) if case.own_experiment else experiment_id,
            "@name": name if case.own_experiment else ground.tracking.experiment_name(experiment_id),
            "@tracking": ground.tracking.url,
            "@files": f"{ground.files.url}/{where}",
            "@git": f"{ground.git.url}/{folder.relative_to(ground.root)}",
            "@unique": f"parity-{ground.unique}-{folder.parent.name}",
            **ground.words,
        }
        if case.mlproject is not None:
            (place.project / case.mlproject_name).write_text(place.fill(case.mlproject))
        for name, text in case.files.items():
            path = place.project / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(place.fill(text))
        if case.prepare is not None:
            case.prepare(place)
        return place

    @property
    def project(self) -> Path:
        return self.folder / "project"

    def fill(self, value: Any) -> Any:
        """Replace the words in a value by their texts."""
        if isinstance(value, str):
            for word in sorted(self.words, key=len, reverse=True):
                value = value.replace(word, self.words[word])
            return value
        if isinstance(value, Mapping):
            return {self.fill(name): self.fill(each) for name, each in value.items()}
        return [self.fill(each) for each in value] if isinstance(value, list | tuple) else value

    def call(self) -> dict[str, Any]:
        """Return the call for the side's process."""
        case = self.case
        arguments = dict(case.arguments)
        arguments.setdefault("env_manager", "local")
        if not case.own_experiment:
            arguments["experiment_id"] = "@experiment"
        return {
            "name": case.name,
            "as_paths": case.as_paths,
            "uri": self.fill(case.uri),
            "arguments": self.fill(arguments),
            "environ": self.fill(
                {"PARITY_RECORD": "@case/record", "TMPDIR": "@case/temporary", "CALLER": "here", **case.environ}
            ),
            "cwd": str(self.folder),
            "parent": self.words.get("@parent"),
            "cancel_after": str(self.folder / "begun") if case.cancel else None,
        }

    def snapshot(self) -> dict[str, str]:
        """What is in the project's folder; of its repository only what it has checked out."""
        found = {}
        for path in sorted(self.project.rglob("*")):
            name = str(path.relative_to(self.project))
            if path.is_file() and (not name.startswith(".git/") or name in (".git/HEAD", ".git/shallow")):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(self.folder.glob("*.git")):
            found |= {f"{path.name}/{name}": "" for name in os.listdir(path)}
        return found
