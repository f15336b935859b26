"""``mlfleet run`` as a person or a script uses it, against a real MLflow server."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from components import free_port, missing
from components.command_line import ARGV, id_in, mlfleet, read_json, run_on, started
from components.mlflow_server import MlflowServer
from components.projects import pid_is_gone, write_project
from mlfleet._cli.program import _cli as cli

LOCAL = ("--env-manager", "local")


@pytest.fixture
def server(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    return mlflow_server


def pairs(run: dict[str, Any], kind: str) -> dict[str, str]:
    return {each["key"]: each["value"] for each in run["data"].get(kind, [])}


def test_stdout_is_the_projects_and_stderr_says_how_the_run_ended(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(
        tmp_path / "demo", "echo alpha={alpha} run=$MLFLOW_RUN_ID; echo oops >&2; echo", parameters="alpha: float"
    )
    done = mlfleet(
        "run", uri, *LOCAL, "-P", "alpha=0.5", "-P", "note=a b", "--run-name", "first try", "--tag", "team=x",
        "--experiment-name", "from the shell",
    )  # fmt: skip
    run_id = id_in(done.stderr)
    assert (done.returncode, done.stdout) == (0, f"alpha=0.5 run={run_id}\n--note a b\n")
    assert "oops\n" in done.stderr
    assert f"mlfleet: 'first try' (run {run_id}) is FINISHED" in done.stderr
    run = run_on(server, run_id)
    assert f"{server.url}/#/experiments/{run['info']['experiment_id']}/runs/{run_id}" in done.stderr
    assert run["info"]["status"] == "FINISHED"
    assert pairs(run, "params") == {"alpha": "0.5", "note": "a b"}
    assert pairs(run, "tags")["team"] == "x"


def test_a_failed_run_exits_with_1_and_says_why(server: MlflowServer, tmp_path: Path) -> None:
    done = mlfleet("run", write_project(tmp_path / "demo", "echo before; exit 7"), *LOCAL)
    assert (done.returncode, done.stdout) == (1, "before\n")
    run_id = id_in(done.stderr)
    assert re.search(rf"^Error: the run '.*' \({run_id}\) failed: exit code 7$", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    assert run_on(server, run_id)["info"]["status"] == "FAILED"


def test_quiet_leaves_only_errors(server: MlflowServer, tmp_path: Path) -> None:
    assert mlfleet("run", write_project(tmp_path / "well", "echo out"), *LOCAL, "-q").stderr == ""
    failed = mlfleet("run", write_project(tmp_path / "ill", "exit 7"), *LOCAL, "--quiet")
    assert failed.stderr.startswith("Error: ")
    assert len(failed.stderr.splitlines()) == 1


def test_json_is_the_only_text_on_stdout(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo to stdout; echo to stderr >&2; exit 3")
    done = mlfleet("run", uri, *LOCAL, "--json", "--run-name", "for machines")
    result = read_json(done.stdout, "run")
    run = run_on(server, result["run_id"])
    assert done.returncode == 1
    assert {name: result[name] for name in ("run_name", "status", "exit_code", "reason", "project", "backend")} == {
        "run_name": "for machines",
        "status": "FAILED",
        "exit_code": 3,
        "reason": "exit code 3",
        "project": "demo",
        "backend": "local",
    }
    assert result["experiment_id"] == run["info"]["experiment_id"]
    assert result["tracking_uri"] == server.url
    assert result["url"].endswith(f"/runs/{result['run_id']}")
    assert result["error"]["type"] == "ExecutionException"
    assert Path(result["output"]).read_text() == "to stdout\nto stderr\n"


def test_json_of_a_run_that_finished_has_no_error(server: MlflowServer, tmp_path: Path) -> None:
    done = mlfleet("run", write_project(tmp_path / "demo", "true"), *LOCAL, "--json")
    result = read_json(done.stdout, "run")
    assert (done.returncode, result["status"], result["exit_code"], result["error"]) == (0, "FINISHED", 0, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-P", "alpha=fast"], "'alpha': a number was expected, got 'fast'"),
        (["-e", "mian"], "there is no entry point 'mian'"),
        (["-b", "locale"], "there is no backend 'locale'"),
        (["-v", "main"], "version"),
        (["-c", "missing.json"], "missing.json"),
        (["--experiment-name", "a", "--experiment-id", "1"], "give one of them"),
    ],
)
def test_mistakes_exit_with_2_and_make_no_run(
    server: MlflowServer, tmp_path: Path, arguments: list[str], message: str
) -> None:
    uri = write_project(tmp_path / "demo", "echo never", parameters="alpha: {type: float, default: 1}")
    done = mlfleet("run", uri, *LOCAL, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "run " + "(" not in done.stderr


def test_a_mistake_leaves_no_new_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri, here = write_project(tmp_path / "demo", "echo never"), tmp_path / "here"
    here.mkdir()
    done = mlfleet("run", uri, *LOCAL, "-e", "mian", cwd=here)
    assert (done.returncode, list(here.iterdir())) == (2, []), done.stderr


def test_a_missing_project_is_reported_in_json_too(server: MlflowServer, tmp_path: Path) -> None:
    done = mlfleet("run", str(tmp_path / "nowhere"), "--json")
    result = read_json(done.stdout, "run")
    assert done.returncode == 2
    assert result["run_id"] is None
    assert result["error"]["type"] == "FetchError"
    assert "nowhere" in result["error"]["message"]


def test_an_unreachable_server_exits_with_1(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo never")
    done = mlfleet("run", uri, *LOCAL, "--tracking-uri", f"http://ada:s3cret@127.0.0.1:{free_port()}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "\nError: the tracking server" in done.stderr
    assert "127.0.0.1" in done.stderr
    assert "s3cret" not in done.stderr


def test_a_timeout_ends_the_command_and_is_named(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo $$; exec sleep 600")
    done = mlfleet("run", uri, *LOCAL, "--timeout-run", "500ms", "--cancel-grace", "1s")
    assert done.returncode == 1
    assert "the run timeout of 0.5 s ran out" in done.stderr
    assert pid_is_gone(int(done.stdout))
    assert run_on(server, id_in(done.stderr))["info"]["status"] == "FAILED"


def test_output_that_is_logged_is_printed_too(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo one; echo two >&2")
    done = mlfleet("run", uri, *LOCAL, "--log-output")
    assert (done.returncode, done.stdout) == (0, "one\ntwo\n")
    run_id = id_in(done.stderr)
    listed = httpx.get(f"{server.url}/api/2.0/mlflow/artifacts/list", params={"run_id": run_id}, trust_env=False)
    assert [file["path"] for file in listed.json()["files"]] == ["output.log"]


def test_output_that_is_logged_is_printed_byte_for_byte(server: MlflowServer, tmp_path: Path) -> None:
    printed = b"\xff\xfe\r50%\r\nlast\0" + "\N{SNOWMAN}".encode()
    write_project(tmp_path / "demo", "cat data")
    (tmp_path / "demo" / "data").write_bytes(printed)
    argv = [*ARGV, "run", str(tmp_path / "demo"), *LOCAL, "--log-output"]
    done = subprocess.run(argv, capture_output=True, check=True)
    assert done.stdout == printed
    run_id = id_in(done.stderr.decode())
    assert subprocess.run([*ARGV, "logs", run_id], capture_output=True, check=True).stdout == printed


def test_a_reader_that_goes_away_does_not_stop_the_run(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "for i in $(seq 5000); do echo line $i; done; touch done")
    with subprocess.Popen(
        [*ARGV, "run", uri, *LOCAL, "--log-output"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 0
    assert "is FINISHED" in told
    assert (tmp_path / "demo" / "done").exists()


def test_an_error_shows_its_traceback_only_with_debug(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true", parameters="alpha: float")
    done = mlfleet("run", uri, *LOCAL, "--debug")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "Error: " in done.stderr


def test_a_warning_of_the_library_is_a_short_line(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true", extra="entry_pionts: {}\n")
    done = mlfleet("run", uri, *LOCAL)
    assert done.returncode == 0
    warnings = [line for line in done.stderr.splitlines() if "entry_pionts" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("Warning: ")


@pytest.mark.timeout(90)  # mlflow is imported and makes its tables: seconds each on a slow machine
def test_without_a_server_runs_go_to_sqlite_in_this_folder(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo $MLFLOW_TRACKING_URI")
    done = mlfleet("run", uri, *LOCAL, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"sqlite:///{tmp_path}/mlflow.db\n")
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in done.stderr
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select run_uuid, status from runs").fetchall() == [(id_in(done.stderr), "FINISHED")]
    database.close()


def test_a_dry_run_shows_everything_and_makes_nothing(tmp_path: Path) -> None:
    uri = write_project(
        tmp_path / "demo",
        "python train.py --name {name} --data {data}",
        parameters="name: string\ndata: path\nseed: {type: float, default: 7}",
    )
    before = sorted(os.listdir(tmp_path))
    done = mlfleet(
        "run", uri, "--dry-run", "-P", "name=it's $HOME", "-P", "data=s3://bucket/data.csv", "-P", "extra=x y",
        "--run-name", "maybe", cwd=tmp_path, env={"MLFLOW_EXPERIMENT_NAME": "later"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    shown = " ".join(done.stdout.split())
    command = re.search(r"command (.*) folder", shown)
    assert command
    # What bash makes of it is what was asked for.
    printed = subprocess.run(
        ["bash", "-c", command[1].replace("python train.py", "printf '%s|'")], capture_output=True, text=True
    )
    assert printed.stdout == "--name|it's $HOME|--data|s3://bucket/data.csv|--extra|x y|"
    for part in (
        f"folder {uri}",
        "environment virtualenv, to be built",
        "backend local",
        f"tracking sqlite:///{tmp_path}/mlflow.db",
        "experiment later",
        "run name maybe",
        "seed=7",
        "downloads data=s3://bucket/data.csv",
        f"variables MLFLOW_TRACKING_URI=sqlite:///{tmp_path}/mlflow.db",
    ):
        assert part in shown
    assert sorted(os.listdir(tmp_path)) == before


def test_a_list_is_several_values_of_one_name(tmp_path: Path) -> None:
    parameters = "tags: {type: list, default: []}\nname: {default: x}"
    uri = write_project(tmp_path / "demo", "echo {tags} {name}", parameters=parameters)
    for given in (["-P", "tags=a b", "-P", "tags=c"], ["-P", "tags=[a b,c]"]):
        found = json.loads(mlfleet("run", uri, *LOCAL, "--dry-run", "--json", *given).stdout)
        assert found["command"].strip() == "__mlfleet_1='a b'; echo --tags \"${__mlfleet_1}\" --tags c x"
        assert found["parameters"]["tags"] == "[a b,c]"
    done = mlfleet("run", uri, *LOCAL, "-P", "name=a", "-P", "name=b")
    assert done.returncode == 2
    assert "'name': a string, a number, a boolean or a path was expected, got list (several values need" in done.stderr


def test_a_dry_run_masks_secrets(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true")
    done = mlfleet(
        "run", uri, *LOCAL, "--dry-run", "--json", "--tracking-uri", "http://ada:s3cret@tracking.example:5000",
        env={"MLFLOW_TRACKING_TOKEN": "t0ken"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert "s3cret" not in done.stdout + done.stderr
    assert "t0ken" not in done.stdout + done.stderr
    assert found["variables"]["MLFLOW_TRACKING_URI"] == found["tracking_uri"] == "http://tracking.example:5000"
    assert "***" in found["variables"].values()
    assert found["command"].strip() == "true"
    assert found["environment"] == {"manager": "local", "python": None, "built": None, "image": None, "source": None}


def test_variables_are_given_or_copied(server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPIED", "as it is here")
    uri = write_project(tmp_path / "demo", 'echo "$COPIED|$GIVEN|${EMPTY-unset}"')
    options = ("--env", "COPIED", "--env", "GIVEN=a=b c", "--env", "EMPTY=")
    done = mlfleet("run", uri, *LOCAL, *options)
    assert (done.returncode, done.stdout) == (0, "as it is here|a=b c|\n")
    dry = mlfleet("run", uri, *LOCAL, *options, "--dry-run")
    assert "COPIED=***" in dry.stdout
    assert "a=b c" not in dry.stdout
    assert "as it is here" not in dry.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["NOT_SET_HERE"], "--env 'NOT_SET_HERE' copies a variable that is not set here: set it, or give NAME=VALUE"),
        (["=hush-hush"], "--env has no name: give NAME=VALUE"),
        ([""], "--env has no name"),
        ([" "], "--env ' ' copies a variable that is not set here"),
        (["A=hush-hush", "A=other"], "--env A is given twice"),
        (["1A=hush-hush"], "env has the name '1A'"),
        (["MLFLOW_RUN_ID=hush-hush"], "MLFLOW_RUN_ID is set by mlfleet for each run: give run_id"),
    ],
)
def test_wrong_variables_are_told_without_their_values(tmp_path: Path, given: list[str], message: str) -> None:
    options = [text for each in given for text in ("--env", each)]
    done = CliRunner().invoke(cli, ["run", str(tmp_path), *options, "--dry-run"])
    text = done.output + str(done.exception)
    assert done.exit_code != 0
    assert message in " ".join(text.split())
    assert "hush-hush" not in text


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_dry_run_masks_passwords_in_parameters(tmp_path: Path, form: list[str]) -> None:
    uri = write_project(tmp_path / "demo", "curl {data}; key=1 true", parameters="data: string")
    done = mlfleet(
        "run", uri, *LOCAL, "--dry-run", *form, "-P", "data=https://ada:s3cret@files.example/x?token=t0ken&page=2",
        "-P", "other=postgresql://ada:s3cret@db/x",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    assert "t0ken" not in done.stdout + done.stderr
    assert "https://***@files.example/x?token=***&page=2" in done.stdout
    assert "key=1 true" in done.stdout  # not a part of a URI


def test_control_characters_from_elsewhere_do_not_reach_the_terminal(server: MlflowServer, tmp_path: Path) -> None:
    title = "\\033]0;owned\\007"
    uri = write_project(tmp_path / "demo", f"printf '{title}bad \\033[2J\\233H\\n' >&2; exit 3")
    done = mlfleet("run", uri, *LOCAL, "--log-output")
    assert done.returncode == 1
    assert re.search(r"^  \| bad", done.stderr, re.M), done.stderr  # the last lines of its output, in the error
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\udc9b]|owned", done.stderr)
    assert done.stdout == "\x1b]0;owned\x07bad \x1b[2J\udc9bH\n"  # the output itself, byte for byte
    shown = mlfleet("run", uri, *LOCAL, "--dry-run", "-P", "name=\x1b[2Jcleared", "--run-name", "\x9b2Jnamed")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown.stdout)
    assert "name=cleared" in shown.stdout
    found = mlfleet("run", uri, *LOCAL, "--dry-run", "--json", "-P", "name=\x9b2Jcleared")
    assert "\x9b" not in found.stdout
    assert json.loads(found.stdout)["parameters"] == {"name": "\x9b2Jcleared"}


def test_a_dry_run_of_a_docker_project_names_its_image(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true", extra="docker_env: {image: 'registry.example/train:3'}\n")
    done = mlfleet("run", uri, "--dry-run")
    if done.returncode == 2:
        assert "pip install 'mlfleet[docker]'" in done.stderr
        missing("the docker extra", "pip install 'mlfleet[docker]'")
    assert "environment docker image registry.example/train:3" in " ".join(done.stdout.split())


def test_a_dry_run_of_a_mistake_fails_like_a_run(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true", parameters="alpha: float")
    done = mlfleet("run", uri, "--dry-run", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "ParameterError"
    assert "no value is given for 'alpha'" in done.stderr


def test_a_background_job_of_a_script_ignores_ctrl_c(server: MlflowServer, tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "echo ready; while [ ! -e go ]; do sleep 0.05; done")
    with started("run", uri, *LOCAL, before=("bash", "-c", "trap '' INT; exec \"$@\"", "bash")) as job:
        job.read_until("ready")
        job.signal(signal.SIGINT)
        (tmp_path / "demo" / "go").touch()
        assert job.finish() == 0
    assert "is FINISHED" in job.plain
