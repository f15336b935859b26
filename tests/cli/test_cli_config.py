"""The configuration file and ``mlfleet config show``, through the real command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from components.command_line import mlfleet
from components.mlflow_server import MlflowServer
from components.projects import write_project


def dry(project: str, *options: str, cwd: Path, env: dict[str, str] | None = None) -> dict[str, Any]:
    done = mlfleet("run", project, "--dry-run", "--json", *options, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def shown(*options: str, cwd: Path, env: dict[str, str] | None = None) -> dict[str, tuple[Any, str]]:
    done = mlfleet("config", "show", "--json", *options, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return {row["name"]: (row["value"], row["from"]) for row in json.loads(done.stdout)}


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_an_option_counts_before_the_environment_before_the_file_before_the_default(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", "echo hello")
    here = tmp_path / "settings" / "deep" / "below"
    here.mkdir(parents=True)
    environment = {"MLFLOW_TRACKING_URI": "http://environment:5000"}
    assert dry(project, cwd=here)["tracking_uri"] == f"sqlite:///{here}/mlflow.db"

    write(
        tmp_path / "settings" / "pyproject.toml",
        "[project]", 'name = "ours"', "[tool.mlfleet]", 'tracking-uri = "sqlite:///of/file.db"', 'env-manager = "uv"',
    )  # fmt: skip
    found = dry(project, cwd=here)
    # From the folder of the file, not from the working directory.
    assert found["tracking_uri"] == f"sqlite:///{tmp_path}/settings/of/file.db"
    assert found["environment"]["manager"] == "uv"
    assert dry(project, cwd=here, env=environment)["tracking_uri"] == "http://environment:5000"
    found = dry(project, "--tracking-uri", "http://option", "--env-manager", "local", cwd=here, env=environment)
    assert found["tracking_uri"] == "http://option"
    assert found["environment"]["manager"] == "local"


def test_the_nearest_file_counts_and_a_project_brings_none(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", "echo hello")
    write(tmp_path / "project" / "mlfleet.toml", 'backend = "nowhere"')
    write(tmp_path / "mlfleet.toml", 'env-manager = "uv"', 'tracking-uri = "http://far"')
    write(tmp_path / "pyproject.toml", "[tool.mlfleet]", 'env-manager = "conda"')
    # Files without settings are passed over, even one that is not TOML.
    write(tmp_path / "near" / "here" / "pyproject.toml", "{{ template }}")
    assert dry(project, cwd=tmp_path / "near" / "here")["environment"]["manager"] == "uv"
    write(tmp_path / "near" / "mlfleet.toml", 'env-manager = "local"')
    found = dry(project, cwd=tmp_path / "near" / "here")
    assert found["environment"]["manager"] == "local"
    assert "far" not in found["tracking_uri"]  # one file counts, not several
    # Above the home folder nobody looks.
    done = mlfleet("config", "show", cwd=tmp_path / "near" / "here", env={"HOME": str(tmp_path / "near" / "here")})
    assert "there is no mlfleet.toml" in done.stderr


def test_the_table_of_a_backend_is_its_configuration(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", "echo hello")
    kubeconfig = {
        "contexts": [{"name": "ours", "context": {"cluster": "ours", "user": "me", "namespace": "mine"}}],
        "clusters": [{"name": "ours", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "me", "user": {"token": "s3cret"}}],
    }
    environment = {"KUBECONFIG": str(write(tmp_path / "kubeconfig", json.dumps(kubeconfig)))}
    write(tmp_path / "job.yaml", "spec: {template: {spec: {priorityClassName: urgent, containers: [{name: run}]}}}")
    write(
        tmp_path / "mlfleet.toml",
        'backend = "kubernetes"', 'tracking-uri = "http://tracking.example"', "[backends.kubernetes]",
        'kube-context = "ours"', 'image = "quay.io/ours/image"', 'code-delivery = "none"',
        'kube-job-template-path = "job.yaml"', "[backends.another-plugin]", "any = 1",
    )  # fmt: skip
    (tmp_path / "below").mkdir()
    found = dry(
        project, cwd=tmp_path / "below", env={**environment, "KUBE_MLFLOW_TRACKING_URI": "http://inside.example"}
    )
    assert found["variables"]["MLFLOW_TRACKING_URI"] == "http://inside.example"
    request = found["request"]
    assert "namespace: mine" in request
    assert "image: quay.io/ours/image" in request
    assert "priorityClassName: urgent" in request  # found beside the file
    assert dry(project, "-b", "local", cwd=tmp_path / "below")["request"] is None
    # -c takes the place of the whole table.
    given = json.dumps({"kube-context": "ours", "image": "other", "code-delivery": "none"})
    request = dry(project, "-c", given, cwd=tmp_path / "below", env=environment)["request"]
    assert "image: other" in request
    assert "urgent" not in request


def test_every_command_with_settings_refuses_a_broken_file_and_help_does_not(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", "echo hello")
    file = write(tmp_path / "pyproject.toml", "[tool.mlfleet]", "bakend = 1")
    place = f"{file}, line 2: the key 'bakend' is unknown"
    for arguments in (["run", project, "--json"], ["sweep", project, "-P", "x=1,2"], ["wait", "0" * 32], ["ps"]):
        done = mlfleet(*arguments, cwd=tmp_path)
        assert done.returncode == 2, arguments
        assert place in done.stderr
    assert mlfleet("run", "--help", cwd=tmp_path).returncode == 0
    assert mlfleet("--version", cwd=tmp_path).returncode == 0


def test_a_mistake_in_the_table_of_a_backend_names_the_file(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", "echo hello")
    file = write(tmp_path / "mlfleet.toml", "", "[backends.slurm]", 'partiton = "gpu"')
    done = mlfleet("run", project, "-b", "slurm", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown key 'partiton', did you mean 'partition'?" in done.stderr
    assert f"(backend_config is backends.slurm in {file}, line 2)" in done.stderr
    assert mlfleet("run", project, "--dry-run", cwd=tmp_path).returncode == 0  # of no concern to other backends


def test_nesting_without_end_is_an_error_in_the_file_and_in_the_option(tmp_path: Path) -> None:
    option = mlfleet("config", "show", "-c", '{"a":' * 300 + "1" + "}" * 300, cwd=tmp_path)
    write(tmp_path / "mlfleet.toml", "[backends.slurm]", ".".join("a" * 3000) + " = 1")
    for done in (option, mlfleet("config", "show", cwd=tmp_path), mlfleet("run", ".", "--dry-run", cwd=tmp_path)):
        assert (done.returncode, done.stdout) == (2, "")
        assert "nested more than 64 levels deep" in done.stderr


def test_a_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "mlfleet.toml", "jobs = 3")
    file.chmod(0o666)
    done = mlfleet("config", "show", cwd=tmp_path)
    assert done.returncode == 2
    assert f"the settings in {file} are refused" in done.stderr
    assert f"other users can write to {file}; `chmod go-w {file}`" in done.stderr
    assert shown(cwd=tmp_path, env={"MLFLEET_TRUSTED_FOLDERS": str(tmp_path)})["jobs"][0] == 3
    file.chmod(0o644)
    assert shown(cwd=tmp_path)["jobs"] == (3, f"{file}, line 1")
    tmp_path.chmod(0o777)
    assert f"other users can write to {tmp_path};" in mlfleet("config", "show", cwd=tmp_path).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user, which only root may: run as root")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(write(tmp_path / "mlfleet.toml", "jobs = 3"), 12345, 12345)
    assert "belongs to the user 12345" in mlfleet("config", "show", cwd=tmp_path).stderr


def test_config_show_says_where_each_value_is_from_and_hides_secrets(tmp_path: Path) -> None:
    file = write(
        tmp_path / "pyproject.toml",
        "[tool.mlfleet]", 'tracking-uri = "https://ada:s3cret@tracking.example"', "[tool.mlfleet.backends.kubernetes]",
        'job-template = {metadata = {annotations = {"api-token" = "s3cret"}}}', 'tracking-uri = "http://a:s3cret@b"',
        "[[tool.mlfleet.backends.databricks.new-cluster.init]]", 'password = "s3cret"',
    )  # fmt: skip
    done = mlfleet("config", "show", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "s3cret" not in done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "setting value from"
    assert "backend local default" in lines
    assert f"tracking-uri https://***@tracking.example {file}, line 2" in lines
    assert f"backends.kubernetes.tracking-uri http://***@b {file}, line 5" in lines

    environment = {"MLFLOW_TRACKING_URI": "http://environment:s3cret@host"}
    found = shown("--jobs", "7", "-c", '{"password": "s3cret"}', cwd=tmp_path, env=environment)
    assert "s3cret" not in str(found)
    assert found["jobs"] == (7, "option --jobs")
    assert found["backend-config"] == ({"password": "***"}, "option --backend-config")
    assert found["tracking-uri"] == ("http://***@host", "environment variable MLFLOW_TRACKING_URI")
    assert found["env-manager"] == ("(the one that fits the project's files)", "default")
    assert found["backends.kubernetes.job-template"][1] == f"{file}, line 4"


def test_a_sweep_runs_as_many_at_once_as_the_file_says(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    project = write_project(tmp_path / "project", "echo {x}", parameters="x: float")
    write(tmp_path / "mlfleet.toml", "jobs = 1", f'tracking-uri = "{mlflow_server.url}"', 'env-manager = "local"')
    done = mlfleet("sweep", project, "-P", "x=1,2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 points, up to 1 at once" in done.stderr
    assert f"to look at it: {mlflow_server.url}" in done.stderr


def test_a_dry_run_of_a_sweep_shows_the_first_points_and_one_run(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", "echo {x} and {y} {z}", parameters="x: float\ny: float\nz: string")
    arguments = ("sweep", project, "-P", "x=1:4:1", "-P", "y=0.5,1", "-P", "z=https://a:s3cret@b", "--name", "lr")
    done = mlfleet(*arguments, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "s3cret" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == "points       8; the first one is the run below"
    assert [line.strip() for line in lines[1:7]] == ["x=1 y=0.5", "x=1 y=1", "x=2 y=0.5", "x=2 y=1", "x=3 y=0.5", "…"]
    assert "command      echo 1 and 0.5 https://***@b" in done.stdout
    assert "run name     lr-0" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["project"]  # no database either

    found = json.loads(mlfleet(*arguments, "--dry-run", "--json", cwd=tmp_path).stdout)
    assert found["points"] == {
        "count": 8,
        "first": [{"x": x, "y": y} for x in (1, 2) for y in ("0.5", "1")] + [{"x": 3, "y": "0.5"}],
    }
    assert found["parameters"]["x"] == "1"

    refused = mlfleet(*arguments, "--resume", "--dry-run", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--dry-run shows all points, and --resume runs some of them: give one of them" in refused.stderr
    (tmp_path / "none.csv").write_text("x\n")
    empty = mlfleet("sweep", project, "--points", "none.csv", "--dry-run", cwd=tmp_path)
    assert empty.returncode == 2
    assert "the space of the sweep has no points" in empty.stderr
    mistaken = mlfleet("sweep", project, "-P", "x=1,2", "-P", "y=no", "-P", "z=1", "--dry-run", cwd=tmp_path)
    assert mistaken.returncode == 2
    assert "'no'" in mistaken.stderr
