"""``mlfleet cache`` and ``mlfleet envs``, and what every command has."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from components.command_line import ARGV, mlfleet
from mlfleet import __version__

HOUR = 3600


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The captured output of two runs; the first has not been touched for two hours."""
    monkeypatch.setenv("MLFLEET_STATE_DIR", str(tmp_path))
    for name in ("old", "new"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "output.log").write_text("x" * 5000)
    for path in (tmp_path / "runs" / "old" / "output.log", tmp_path / "runs" / "old"):
        time = path.stat().st_mtime - 2 * HOUR
        os.utime(path, (time, time))
    return tmp_path / "runs"


def test_outputs_are_listed_with_their_age(outputs: Path) -> None:
    done = mlfleet("cache", "list", "--outputs")
    header, new, old = (" ".join(line.split()) for line in done.stdout.splitlines())
    assert done.returncode == 0
    assert header == "kind uri version size last used in use"
    assert new.startswith("run new - ")
    assert old.startswith("run old - ")
    assert old.endswith("2 h ago no")
    listed = json.loads(mlfleet("cache", "list", "--outputs", "--json").stdout)
    assert [Path(entry["path"]) for entry in listed] == [outputs / "new", outputs / "old"]


def test_only_what_is_old_enough_is_pruned(outputs: Path) -> None:
    done = mlfleet("cache", "prune", "--outputs", "--older-than", "90m")
    assert done.stdout.startswith(f"removed {outputs / 'old'}\n1 removed, ")
    assert [folder.name for folder in outputs.iterdir()] == ["new"]
    assert mlfleet("cache", "prune", "--outputs").returncode == 0
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize("what", ["cache", "envs"])
def test_an_empty_store_is_not_an_error(what: str) -> None:
    assert mlfleet(what, "list").stdout == "nothing\n"
    assert json.loads(mlfleet(what, "list", "--json").stdout) == []
    assert mlfleet(what, "prune").stdout == "0 removed, 0 B\n"


def test_a_wrong_age_is_refused_and_nothing_is_removed(outputs: Path) -> None:
    done = mlfleet("cache", "prune", "--outputs", "--older-than", "soon")
    assert done.returncode == 2
    assert "--older-than" in done.stderr
    assert "'soon' is not a duration" in done.stderr
    assert len(list(outputs.iterdir())) == 2


def test_version_and_help() -> None:
    assert __version__ in mlfleet("--version").stdout
    done = mlfleet("run", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("-e,", "-v,", "-P,", "-A,", "-b,", "-c,", "--experiment-id", "--storage-dir", "MLFLOW_TMP_DIR"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["rum"], "No such command 'rum'"),
        (["run"], "Missing argument 'URI'"),
        (["run", ".", "--frob"], "No such option"),
        (["run", ".", "-P", "alpha"], "-P 'alpha' is not of the form NAME=VALUE"),
        (["run", ".", "--tag", "a=1", "--tag", "a=2"], "--tag 'a' is given twice"),
        (["run", ".", "-A", "=x"], "-A '=x' is not of the form NAME=VALUE or NAME"),
        (["run", ".", "--tag", "x"], "--tag 'x' is not of the form"),
        (["run", ".", "-c", "{bad"], "-c is neither a path that ends in .json nor JSON"),
        (["run", ".", "-c", "[1]"], "-c is JSON, but not an object"),
        (["run", ".", "--timeout-run", "-5"], "'-5' is not a duration"),
        (["run", ".", "--env-manager", "pip"], "'pip' is not one of"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(arguments: list[str], message: str) -> None:
    done = mlfleet(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert "--help'" in done.stderr


def test_wrong_usage_is_json_where_json_is_asked_for() -> None:
    done = mlfleet("run", ".", "--json", "-P", "alpha")
    assert done.returncode == 2
    assert "not of the form" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "code"), [(["cache", "list"], 1), (["cache", "list", "--json"], 0), (["run", "nowhere", "--json"], 2)]
)
def test_a_reader_that_goes_away_causes_no_traceback(arguments: list[str], code: int) -> None:
    with subprocess.Popen([*ARGV, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == code


def test_a_full_disk_below_stdout_is_a_short_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*ARGV, "cache", "list", "--json"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: [Errno 28] No space left on device\n")


def test_a_closed_stderr_does_no_harm() -> None:
    done = subprocess.run(["bash", "-c", 'exec "$@" 2>&-', "bash", *ARGV, "run", "nowhere"])
    assert done.returncode == 2


def test_the_shell_completes_names_of_backends() -> None:
    done = mlfleet(env={"_MLFLEET_COMPLETE": "bash_complete", "COMP_WORDS": "mlfleet run . -b lo", "COMP_CWORD": "4"})
    assert done.stdout.split() == ["plain,local"]
