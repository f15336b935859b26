"""The request that starts a run; the Databricks SDK checks that it knows every key."""

from __future__ import annotations

import ast
import inspect
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from databricks.sdk.service import jobs
from hypothesis import given
from hypothesis import strategies as st

from mlfleet._project.spec import EnvironmentFile, EnvironmentFileKind, read_project
from mlfleet.backends.base import Job
from mlfleet.backends.databricks import DatabricksBackend, bootstrap
from mlfleet.backends.databricks.config import parse_config
from mlfleet.backends.databricks.request import ROOT, RunPaths, bootstrap_argument, mask_request, request_body
from mlfleet.errors import SpecError, SubmitError

RUN = "0123456789abcdef0123456789abcdef"
CLUSTER = {"spark_version": "15.4.x-scala2.12", "num_workers": 2, "node_type_id": "i3.xlarge"}
PATHS = RunPaths("/Workspace/Users/me/.mlfleet/b.py", "/Volumes/a/b/c/x.tar.gz", "abc", "/Volumes/a/b/c/output/1")


def make_job(tmp_path: Path = Path("/project"), **options: Any) -> Job:
    defaults: dict[str, Any] = {
        "run_id": RUN,
        "experiment_id": "7",
        "project_name": "demo",
        "project_dir": tmp_path,
        "command": "python train.py",
        "environ": {"MLFLOW_RUN_ID": RUN, "MLFLOW_TRACKING_URI": "databricks", "DATABRICKS_HOST": "https://mine"},
        "secrets": {"DATABRICKS_TOKEN": "dapi-not-to-be-seen"},
        "tracking_uri": "databricks",
    }
    return Job(**{**defaults, **options})


def body_of(config: dict[str, Any], **options: Any) -> dict[str, Any]:
    return request_body(make_job(**options), parse_config(config), PATHS, token="t")


def spec_of(body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(body["tasks"][0]["spark_python_task"]["parameters"][0])
    return found


def assert_understood(body: dict[str, Any]) -> None:
    """Assert that the Databricks SDK knows every key: it drops unknown keys."""
    for task in body["tasks"]:
        assert jobs.SubmitTask.from_dict(task).as_dict() == task
    for environment in body.get("environments", []):
        assert jobs.JobEnvironment.from_dict(environment).as_dict() == environment


def test_request_for_a_new_cluster() -> None:
    body = body_of({"new_cluster": CLUSTER, "libraries": [{"pypi": {"package": "xgboost"}}]})
    assert_understood(body)
    (task,) = body["tasks"]
    assert task["new_cluster"] == CLUSTER
    assert task["libraries"] == [{"pypi": {"package": "xgboost"}}, {"pypi": {"package": "mlflow"}}]
    assert body["run_name"] == f"demo ({RUN})"
    assert body["idempotency_token"] == "t"


def test_mlflow_is_not_added_to_libraries_that_have_it() -> None:
    body = body_of({"new_cluster": CLUSTER, "libraries": [{"pypi": {"package": "mlflow==2.14.1"}}]})
    assert body["tasks"][0]["libraries"] == [{"pypi": {"package": "mlflow==2.14.1"}}]


def test_no_libraries_are_added_to_an_existing_cluster() -> None:
    body = body_of({"existing_cluster_id": "0923-164208-meows279"})
    assert_understood(body)
    assert body["tasks"][0]["existing_cluster_id"] == "0923-164208-meows279"
    assert "libraries" not in body["tasks"][0]


def test_request_for_serverless_compute() -> None:
    body = body_of({"dependencies": ["scikit-learn==1.5"], "performance_target": "PERFORMANCE_OPTIMIZED"})
    assert_understood(body)
    assert body["tasks"][0]["environment_key"] == "default"
    spec = {"environment_version": "4", "dependencies": ["scikit-learn==1.5", "mlflow"]}
    assert body["environments"] == [{"environment_key": "default", "spec": spec}]
    assert body["performance_target"] == "PERFORMANCE_OPTIMIZED"


def test_request_for_a_shell_command_task() -> None:
    body = body_of({**CLUSTER, "task": "shell_command"})
    assert "tasks" not in body
    assert body["new_cluster"] == CLUSTER
    shell, flag, script = body["shell_command_task"]["command"]
    assert (shell, flag) == ("bash", "-c")
    *_, path, argument = shlex.split(script)
    assert path == PATHS.script
    assert json.loads(argument)["command"] == "python train.py"


def test_runs_of_the_tracking_workspace_have_their_own_identity() -> None:
    body = body_of({})
    assert "dapi" not in json.dumps(body)
    spec = spec_of(body)
    assert spec["identity"] is True
    assert spec["environ"] == {"MLFLOW_RUN_ID": RUN, "MLFLOW_TRACKING_URI": "databricks"}


def test_runs_of_another_workspace_get_secrets_from_its_scope() -> None:
    config = parse_config({"new_cluster": CLUSTER, "secret_scope": "ours"})
    environ = {"MLFLOW_TRACKING_URI": "https://mlflow.example.com"}
    job = make_job(environ=environ, secrets={"MLFLOW_TRACKING_TOKEN": "hush"})
    paths = RunPaths("s", "a", "d", "o", secret=f"mlfleet-{RUN}")
    body = request_body(job, config, paths, token="t")
    assert "hush" not in json.dumps(body)
    assert body["tasks"][0]["new_cluster"]["spark_env_vars"] == {
        "MLFLEET_SECRETS": f"{{{{secrets/ours/mlfleet-{RUN}}}}}"
    }
    assert spec_of(body)["secrets"] == {"scope": "ours", "key": f"mlfleet-{RUN}"}


@given(st.text(alphabet=st.sampled_from('{}"\\ a\n$é'), max_size=40))
def test_databricks_does_not_substitute_anything_in_a_command(command: str) -> None:
    argument = bootstrap_argument({"command": command, "environ": {"A": command}})
    assert "{{" not in argument
    assert json.loads(argument)["command"] == command


def test_a_spark_job_runs_in_the_process_that_has_the_session(tmp_path: Path) -> None:
    options: dict[str, Any] = {"spark_job": {"python_file": "job.py", "python_libraries": []}}
    spec = spec_of(body_of(CLUSTER, command="python job.py --rows 'a b'", **options))
    assert (spec["mode"], shlex.split(spec["command"])) == ("python", ["python", "job.py", "--rows", "a b"])
    # A Spark job has no bash that could expand the variables that hold values.
    for command in ("__mlfleet_1='a b'; python job.py --rows \"${__mlfleet_1}\"", "python job.py --rows a\\ b"):
        spec = spec_of(body_of(CLUSTER, command=command, **options))
        assert shlex.split(spec["command"]) == ["python", "job.py", "--rows", "a b"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("spark-submit job.py", "its command must be 'python FILE …', not 'spark-submit job.py'"),
        ("python -m job", "must be 'python FILE"),
        ("python 'job", "must be 'python FILE"),
        ("python", "must be 'python FILE"),
        ("python /etc/job.py", "outside the project"),
        ("python ../job.py", "outside the project"),
    ],
)
def test_a_spark_job_that_is_not_a_python_file_is_refused(command: str, message: str) -> None:
    with pytest.raises(SubmitError, match=message):
        body_of(CLUSTER, command=command, spark_job={"python_libraries": []})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/Volumes/main/default/data/train.csv", "/Volumes/main/default/data/train.csv"),
        ("dbfs:/Volumes/main/default/data/train.csv", "/Volumes/main/default/data/train.csv"),
        ("/dbfs/train.csv", "/dbfs/train.csv"),
        ("/Workspace/Shared/train.csv", "/Workspace/Shared/train.csv"),
        ("s3://bucket/data/train.csv", f"{ROOT}/param_3/train.csv"),
        ("dbfs:/data/", f"{ROOT}/param_3/data"),
        ("https://x/a%20'b'.parquet?sig=1", f"{ROOT}/param_3/a__b_.parquet"),
        ("runs:/0123/model", f"{ROOT}/param_3/model"),
        ("s3://bucket", f"{ROOT}/param_3/data"),
    ],
)
def test_remote_path_of_each_path_parameter(value: str, expected: str) -> None:
    assert DatabricksBackend().place(value, 3, Path("/project")) == expected


def test_local_files_must_be_inside_the_project(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "data" / "train.csv").write_text("a\n")
    (tmp_path / "beside.csv").write_text("b\n")
    place = DatabricksBackend().place
    assert place(str(project / "data" / "train.csv"), 0, project) == f"{ROOT}/project/data/train.csv"
    assert place(str(project), 0, project) == f"{ROOT}/project"
    assert place(str(project / "nothing.csv"), 0, project) is None
    with pytest.raises(
        ValueError, match=r"beside\.csv' is on this machine, where Databricks cannot read it: put it into"
    ):
        place(str(tmp_path / "beside.csv"), 0, project)


def test_the_script_receives_the_list_of_downloads() -> None:
    placed = {f"{ROOT}/param_0/a.csv": "s3://b/a.csv", "/Volumes/a/b/c": "/Volumes/a/b/c", f"{ROOT}/project/d": "d"}
    spec = spec_of(body_of({}, placed=placed))
    assert (spec["root"], spec["downloads"]) == (ROOT, {"param_0/a.csv": "s3://b/a.csv"})
    assert "downloads" not in spec_of(body_of({}))


def test_the_masked_request_contains_no_secrets() -> None:
    cluster = {
        **CLUSTER,
        "docker_image": {"url": "registry.example.com/x", "basic_auth": {"username": "me", "password": "hush"}},
        "spark_env_vars": {"API_TOKEN": "hush", "OTHER": "{{secrets/ours/key}}", "TOKEN_OF": "{{secrets/ours/key}}"},
        "spark_conf": {"spark.hadoop.fs.azure.account.key.x": "hush", "spark.master": "local[*]"},
    }
    libraries = [{"pypi": {"package": "x", "repo": "https://me:hush@index.example.com/simple"}}]
    shown = mask_request(body_of({"new_cluster": cluster, "libraries": libraries}))
    assert "hush" not in json.dumps(shown)
    (task,) = shown["tasks"]
    assert task["new_cluster"]["spark_env_vars"]["TOKEN_OF"] == "{{secrets/ours/key}}"
    assert task["new_cluster"]["spark_conf"]["spark.master"] == "local[*]"
    assert task["libraries"][0]["pypi"]["repo"] == "https://***@index.example.com/simple"
    assert shown["idempotency_token"] == "t"
    assert spec_of(shown) == spec_of(body_of({"new_cluster": cluster}))


def test_job_settings_are_passed_through_unchanged() -> None:
    passed = {
        "access_control_list": [{"user_name": "me@example.com", "permission_level": "CAN_VIEW"}],
        "budget_policy_id": "b",
        "email_notifications": {"on_failure": ["me@example.com"]},
        "git_source": {"git_url": "https://git.example.com/x", "git_provider": "gitHub", "git_branch": "main"},
        "health": {"rules": []},
        "notification_settings": {"no_alert_for_skipped_runs": True},
        "performance_target": "STANDARD",
        "queue": {"enabled": True},
        "run_as": {"user_name": "robot@example.com"},
        "timeout_seconds": 600,
        "usage_policy_id": "u",
        "webhook_notifications": {"on_failure": [{"id": "w"}]},
    }
    body = body_of(passed)
    assert {key: body[key] for key in passed} == passed


def test_every_setting_of_the_databricks_sdk_is_passed_on() -> None:
    variables = {"environment_variables_key": "data", "spec": {"variables": {"REGION": "eu"}}}
    request = {
        "performance_target": "COST_OPTIMIZED",  # newer than the enumeration of databricks-sdk
        "duration_target": "12h",
        "environment_variables": [variables],
    }
    task = {
        "compute": {"hardware_accelerator": "GPU_1xA10"},
        "description": "a demonstration",
        "disable_auto_optimization": True,
        "max_retries": 2,
        "min_retry_interval_millis": 1000,
        "retry_on_timeout": True,
    }
    environment = {"base_environment": "/Workspace/Shared/env.yaml", "java_dependencies": ["a:b:1"]}
    body = body_of({**request, **task, **environment})
    assert_understood(body)
    assert {key: body[key] for key in request} == request
    (sent,) = body["tasks"]
    assert {key: sent[key] for key in task} == task
    assert sent["environment_variables_key"] == "data"
    assert body["environments"][0]["spec"] == {**environment, "dependencies": ["mlflow"]}
    signature = inspect.signature(jobs.JobsAPI.submit)
    assert body.keys() <= signature.parameters.keys()


def test_retries_of_a_shell_command_are_passed_on() -> None:
    assert body_of({**CLUSTER, "task": "shell_command", "max_retries": 2})["max_retries"] == 2


def test_the_preview_lists_the_project_requirements(tmp_path: Path) -> None:
    (tmp_path / "python_env.yaml").write_text("python: '3.12'\ndependencies: [scikit-learn==1.5, mlflow>=3]\n")
    file = EnvironmentFile(EnvironmentFileKind.PYTHON_ENV, tmp_path / "python_env.yaml")
    backend = DatabricksBackend()
    job = make_job(tmp_path, environment_file=file, config=backend.configure({}))
    body = json.loads(backend.preview(job))
    assert_understood(body)
    assert body["environments"][0]["spec"]["dependencies"] == ["scikit-learn==1.5", "mlflow>=3"]
    assert "dapi" not in backend.preview(job)


def test_requirements_of_a_project_that_names_no_environment_are_listed(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("scikit-learn==1.5  # pinned\nmlflow>=3\n")
    backend = DatabricksBackend()
    file = read_project(tmp_path).environment
    body = json.loads(backend.preview(make_job(tmp_path, environment_file=file, config=backend.configure({}))))
    assert body["environments"][0]["spec"]["dependencies"] == ["scikit-learn==1.5", "mlflow>=3"]


def preview_of(folder: Path, config: dict[str, Any], dependencies: str) -> dict[str, Any]:
    """Return the preview for a project with these dependencies in its ``python_env.yaml``."""
    (folder / "python_env.yaml").write_text(f"dependencies: {dependencies}\n")
    file = EnvironmentFile(EnvironmentFileKind.PYTHON_ENV, folder / "python_env.yaml")
    backend = DatabricksBackend()
    found: dict[str, Any] = json.loads(
        backend.preview(make_job(folder, environment_file=file, config=backend.configure(config)))
    )
    return found


def test_lines_of_requirements_files_go_into_the_request(tmp_path: Path) -> None:
    (tmp_path / "deps").mkdir()
    (tmp_path / "requirements.txt").write_text("# packages\nmlflow\n-r deps/more.txt\nscikit-learn \\\n  >=1.5\n")
    (tmp_path / "deps" / "more.txt").write_text("pandas[parquet]; python_version > '3'\n-c pins.txt\n")
    (tmp_path / "deps" / "pins.txt").write_text("Scikit_Learn<2\nnumpy==1.26\n")
    body = preview_of(tmp_path, {}, "['-r requirements.txt', torch]")
    assert body["environments"][0]["spec"]["dependencies"] == [
        "torch",
        "mlflow",
        "pandas[parquet]; python_version > '3'",
        "scikit-learn<2,>=1.5",
        "numpy==1.26",
    ]
    assert_understood(body)


def test_requirements_files_become_libraries_of_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "pins.txt").write_text("mlflow==3.1\n")
    body = preview_of(tmp_path, CLUSTER, "['-c pins.txt', mlflow]")
    assert body["tasks"][0]["libraries"] == [{"pypi": {"package": "mlflow==3.1"}}]


@pytest.mark.parametrize("line", ["--extra-index-url https://me:hush@x/simple", "torch --hash=sha256:0"])
def test_options_of_pip_go_to_serverless_compute_only(tmp_path: Path, line: str) -> None:
    body = preview_of(tmp_path, {}, f"['{line}']")
    assert body["environments"][0]["spec"]["dependencies"] == [line.replace("me:hush", "***"), "mlflow"]
    with pytest.raises(SubmitError, match="which the libraries of a cluster do not take: name the package") as error:
        preview_of(tmp_path, CLUSTER, f"['{line}']")
    assert "hush" not in str(error.value)


@pytest.mark.parametrize("name", ["../other.txt", "own.txt"])
def test_requirements_files_elsewhere_or_with_local_packages_are_refused(tmp_path: Path, name: str) -> None:
    project = tmp_path / "project"
    (project / "wheels").mkdir(parents=True)
    (project / "wheels" / "own.whl").write_bytes(b"")
    (project / "own.txt").write_text("./wheels/own.whl\n")
    (tmp_path / "other.txt").write_text("secret-line\n")
    with pytest.raises((SubmitError, SpecError), match=r"outside of the project|cannot install") as error:
        preview_of(project, {}, f"['-r {name}']")
    assert "secret-line" not in str(error.value)


def test_local_requirements_are_refused(tmp_path: Path) -> None:
    (tmp_path / "python_env.yaml").write_text("dependencies: [./wheels/own.whl]\n")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "own.whl").write_bytes(b"")
    file = EnvironmentFile(EnvironmentFileKind.PYTHON_ENV, tmp_path / "python_env.yaml")
    with pytest.raises(SubmitError, match="which Databricks cannot install: name packages of an index"):
        DatabricksBackend().preview(make_job(tmp_path, environment_file=file))


def test_the_bootstrap_script_parses_on_old_runtimes() -> None:
    source = Path(bootstrap.__file__).read_text()
    ast.parse(source, feature_version=(3, 8))
