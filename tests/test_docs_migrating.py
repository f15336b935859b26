"""docs/migrating.md: what stands there for mlflow and for mlfleet leaves the same runs behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from components.git_http import serve
from components.git_repository import git, make_repository
from components.mlflow_server import MlflowServer

PAGE = Path(__file__).parent.parent / "docs" / "migrating.md"
SERVER_ON_THE_PAGE = "http://127.0.0.1:5000"
HOST_ON_THE_PAGE = "https://github.com/example/"
MLPROJECT = """\
name: quickstart
entry_points:
  main:
    parameters:
      alpha: {type: float, default: 0.5}
      epochs: {type: float, default: 20}
    command: "echo trained with {alpha} {epochs}"
  evaluate:
    command: "echo evaluated"
"""
_BLOCK = re.compile(r"^```(python|bash) (before|after)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True, slots=True)
class Example:
    """An mlflow example with the mlfleet examples that do the same."""

    line: int
    before: tuple[str, str]
    after: tuple[tuple[str, str], ...]


def examples() -> list[Example]:
    found: list[Example] = []
    text = PAGE.read_text()
    for match in _BLOCK.finditer(text):
        language, which, code = match.groups()
        if which == "before":
            found.append(Example(text.count("\n", 0, match.start()) + 1, (language, code), ()))
        else:
            last = found.pop()
            found.append(Example(last.line, last.before, (*last.after, (language, code))))
    return found


class Place:
    """A folder with the projects of the page, and the server that its runs are told to."""

    def __init__(self, folder: Path, server: MlflowServer, git_config: Path) -> None:
        self._folder = folder
        self._server = server
        self._git_config = git_config

    def runs_of(self, language: str, code: str) -> list[Mapping[str, Any]]:
        """Run a block of the page; what it has left on the server."""
        names_server = SERVER_ON_THE_PAGE in code
        environ = {
            **os.environ,
            "GIT_CONFIG_GLOBAL": str(self._git_config),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            **({} if names_server else {"MLFLOW_TRACKING_URI": self._server.url}),
        }
        since = time.time_ns() // 1_000_000
        done = subprocess.run(
            ["bash", "-e"] if language == "bash" else [sys.executable, "-"],
            input=code.replace(SERVER_ON_THE_PAGE, self._server.url),
            cwd=self._folder,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return self._since(since)

    def _since(self, moment: int) -> list[Mapping[str, Any]]:
        with httpx.Client(base_url=f"{self._server.url}/api/2.0/mlflow/", trust_env=False) as client:
            experiments = client.get("experiments/search", params={"max_results": 1000}).json()["experiments"]
            names = {each["experiment_id"]: each["name"] for each in experiments}
            body = {"experiment_ids": list(names), "filter": f"attributes.start_time >= {moment}"}
            found = client.post("runs/search", json=body).json().get("runs", [])
        told = [_told(run, names) for run in found]
        return sorted((each for each in told if each["entry point"] and not each["sweep"]), key=str)


def _told(run: Mapping[str, Any], experiments: Mapping[str, str]) -> Mapping[str, Any]:
    tags = {tag["key"]: tag["value"] for tag in run["data"].get("tags", ())}
    named = run["info"]["run_name"] in ("first", "second")  # others are the server's invention
    return {
        "experiment": experiments[run["info"]["experiment_id"]],
        "status": run["info"]["status"],
        "params": {param["key"]: param["value"] for param in run["data"].get("params", ())},
        "entry point": tags.get("mlflow.project.entryPoint"),
        "commit": tags.get("mlflow.source.git.commit"),
        "name": run["info"]["run_name"] if named else None,
        # A sweep has a run of its own, which nothing of mlflow's is like; its points belong to it.
        "sweep": "mlfleet.sweep.space" in tags,
        "parent": "mlflow.parentRunId" in tags and "mlfleet.sweep.id" not in tags,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, mlflow_server: MlflowServer) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("migrating")
    project = folder / "examples" / "quickstart"
    project.mkdir(parents=True)
    (project / "MLproject").write_text(MLPROJECT)
    (project / "broken.sh").write_text("exit 3\n")
    with serve(folder / "git") as git_server:
        make_the_repository(git_server.root)
        # Git finds the repository of the page here.
        settings = folder / "gitconfig"
        settings.write_text(f'[url "{git_server.url}/"]\n  insteadOf = {HOST_ON_THE_PAGE}\n')
        yield Place(folder, mlflow_server, settings)


def make_the_repository(root: Path) -> None:
    repository = make_repository(root, "projects")
    (repository.work / "train").mkdir()
    (repository.work / "train" / "MLproject").write_text(MLPROJECT)
    repository.commit()
    git(repository.work, "tag", "v1.0")
    repository.commit(newer="what v1.0 does not have")


@pytest.mark.timeout(240)  # mlflow alone takes seconds to start, and synchronous=False starts it again for each run
@pytest.mark.parametrize("example", examples(), ids=lambda example: f"line-{example.line}")
def test_mlfleet_leaves_the_same_runs_as_mlflow(example: Example, place: Place) -> None:
    expected = place.runs_of(*example.before)
    assert expected
    assert example.after
    for code in example.after:
        assert place.runs_of(*code) == expected


def test_the_page_has_examples() -> None:
    assert len(examples()) >= 8
