"""``backend_config`` of the Databricks backend: the accepted keys, and the errors for all others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlfleet._project.spec import DockerEnv
from mlfleet.backends.base import DockerRequest
from mlfleet.backends.databricks import DatabricksBackend
from mlfleet.backends.databricks.config import KEYS, UploadKind, parse_config
from mlfleet.backends.databricks.fields import read_fields
from mlfleet.errors import UsageError

CLUSTER = {"spark_version": "15.4.x-scala2.12", "num_workers": 2, "node_type_id": "i3.xlarge"}


def keys() -> st.SearchStrategy[str]:
    fields = read_fields()
    others = ("spark_version", "num_workers", "autoscale", *fields.submit, *fields.task, *fields.environment)
    return st.sampled_from([*KEYS, *others])


def test_both_mlflow_config_forms_are_accepted() -> None:
    bare = parse_config(CLUSTER)
    assert bare.compute.new_cluster == CLUSTER
    libraries = [{"pypi": {"package": "tensorflow"}}]
    full = parse_config({"new_cluster": CLUSTER, "libraries": libraries})
    assert full.compute.new_cluster == CLUSTER
    assert list(full.compute.libraries) == libraries


def test_an_empty_config_means_serverless() -> None:
    assert parse_config({}).compute.serverless
    assert parse_config({"dependencies": ["scikit-learn"], "environment_version": 3}).compute.environment_version == "3"


def test_an_existing_cluster_config() -> None:
    compute = parse_config({"existing_cluster_id": "0923-164208-meows279"}).compute
    assert not compute.serverless
    assert compute.existing_cluster_id == "0923-164208-meows279"


@pytest.mark.parametrize(
    ("config", "kind", "path"),
    [
        ({}, UploadKind.WORKSPACE, ""),
        ({"upload_path": "/Volumes/main/default/runs/"}, UploadKind.VOLUME, "/Volumes/main/default/runs"),
        ({"upload_path": "dbfs:/Volumes/main/default/runs/x"}, UploadKind.VOLUME, "/Volumes/main/default/runs/x"),
        ({"upload_path": "/Workspace/Shared/x"}, UploadKind.WORKSPACE, "/Workspace/Shared/x"),
        ({"upload": "dbfs"}, UploadKind.DBFS, "/dbfs/mlfleet"),
        ({"upload_path": "dbfs:/a/b"}, UploadKind.DBFS, "/dbfs/a/b"),
        ({"upload": "volume", "upload_path": "/Volumes/a/b/c"}, UploadKind.VOLUME, "/Volumes/a/b/c"),
    ],
)
def test_upload_location_of_each_config(config: dict[str, Any], kind: UploadKind, path: str) -> None:
    upload = parse_config(config).upload
    assert (upload.kind, upload.path) == (kind, path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"profil": "x"}, r"key 'profil' is unknown, did you mean 'profile'\?.*Known are .*new_cluster"),
        (
            {"new_cluster": {"spark_vesion": "15"}},
            r"new_cluster: the key 'spark_vesion' is unknown, did you mean 'spark",
        ),
        ({"new_cluster": {"num_workers": 1}}, "no spark_version: give a Databricks Runtime such as"),
        ({"num_workers": 1}, "no spark_version"),
        ({"job_clusters": []}, "job_clusters belong to jobs, and a project is a one-time run: give new_cluster"),
        ({**CLUSTER, "num_workers": "two"}, "num_workers is 'two': give a whole number"),
        ({**CLUSTER, "num_workers": -1}, "num_workers is -1"),
        ({**CLUSTER, "autoscale": {"min_workers": 1}}, "both num_workers and autoscale"),
        ({**CLUSTER, "spark_env_vars": "A=1"}, "spark_env_vars is 'A=1': give a mapping"),
        ({"new_cluster": CLUSTER, "existing_cluster_id": "x"}, "both new_cluster and existing_cluster_id"),
        ({"new_cluster": CLUSTER, "num_workers": 3}, "num_workers belong into new_cluster"),
        ({"new_cluster": "small"}, "new_cluster is 'small': give a cluster such as"),
        ({"new_cluster": CLUSTER, "dependencies": ["x"]}, "dependencies is for serverless compute only"),
        ({"libraries": [{"pypi": {"package": "x"}}]}, "libraries is for clusters only"),
        ({"new_cluster": CLUSTER, "libraries": ["tensorflow"]}, "libraries holds 'tensorflow'"),
        ({"dependencies": [1]}, "dependencies holds 1"),
        ({"upload": "s3"}, "upload is 's3': give 'volume' or 'workspace' or 'dbfs'"),
        ({"upload": "volume"}, "needs upload_path"),
        ({"upload": "dbfs", "upload_path": "/Volumes/a/b/c"}, "which is a place of another kind"),
        ({"upload_path": "/tmp/x"}, "give a folder below /Volumes"),
        ({"upload_path": "/Volumes/main"}, "a volume is /Volumes/<catalog>/<schema>/<volume>"),
        ({"upload_path": "/Workspace/../x"}, "without '..'"),
        ({"task": "notebook"}, "task is 'notebook': give 'python' or 'shell_command'"),
        ({"task": "shell_command"}, "runs on a new cluster only"),
        ({"api_version": "2.0"}, "api_version is '2.0'"),
        ({"secret_scope": ""}, "secret_scope is empty"),
        ({"run_name": 3}, "run_name is 3: give a string"),
        ({"max_retrys": 1}, r"key 'max_retrys' is unknown, did you mean 'max_retries'\?"),
        ({"git_source": {"git_ulr": "x"}}, r"git_source: the key 'git_ulr' is unknown, did you mean 'git_url'\?"),
        ({"queue": True}, "queue is True: give a mapping"),
        ({"access_control_list": {"user_name": "me"}}, r"access_control_list is .*: give a list"),
        (
            {"access_control_list": [{"user": "me"}]},
            r"access_control_list\[0\]: the key 'user' is unknown, did you mean 'user_name'",
        ),
        ({"compute": {"hardware_acelerator": "GPU_1xA10"}}, "did you mean 'hardware_accelerator'"),
        ({**CLUSTER, "aws_attributes": {"availabilty": "SPOT"}}, "new_cluster: aws_attributes: .*'availability'"),
        ({"base_environment": "/Workspace/env.yaml", "environment_version": "4"}, "both environment_version and base_"),
        ({**CLUSTER, "base_environment": "/Workspace/env.yaml"}, "base_environment is for serverless compute only"),
        (
            {"environment_variables": [{"environment_variables_key": "a"}, {"environment_variables_key": "b"}]},
            r"has 2 entries: name one of them in environment_variables_key \(a, b\)",
        ),
        ({"depends_on": []}, "the key 'depends_on' is unknown"),
        ({"notebook_task": {}}, "the key 'notebook_task' is unknown"),
    ],
)
def test_config_mistakes_are_reported(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_config(config)


def test_the_callers_mapping_is_not_modified() -> None:
    config = {
        "new_cluster": copy.deepcopy(CLUSTER),
        "libraries": [{"pypi": {"package": "x"}}],
        "queue": {"enabled": True},
    }
    before = copy.deepcopy(config)
    parsed = parse_config(config)
    assert config == before
    assert parsed.passed_on == {"queue": {"enabled": True}}


@given(
    st.dictionaries(
        st.deferred(keys) | st.text(max_size=8),  # they import the SDK, which takes a second
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=12),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
            max_leaves=4,
        ),
        max_size=4,
    )
)
@example({"environment_variables": [None]})
def test_any_invalid_config_raises_only_our_own_error(config: dict[str, Any]) -> None:
    try:
        parse_config(config)
    except UsageError:
        return


def test_a_missing_profile_is_reported_before_anything_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "databrickscfg"
    file.write_text("[prod]\nhost = https://x\ntoken = t\n")
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(file))
    with pytest.raises(UsageError, match=r"has no profile 'prodd'; it has: prod"):
        DatabricksBackend().configure({"profile": "prodd"})
    assert DatabricksBackend().configure({"profile": "prod"}).profile == "prod"


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "./mlruns", "file:///tmp/mlruns", "postgresql://x/y"])
def test_a_local_tracking_store_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="on this machine, where Databricks cannot reach it: use 'databricks'"):
        DatabricksBackend().check_tracking(uri)


@pytest.mark.parametrize("uri", ["databricks", "databricks://prod", "http://mlflow:5000", "https://mlflow"])
def test_a_reachable_tracking_server_is_accepted(uri: str) -> None:
    DatabricksBackend().check_tracking(uri)


def test_docker_projects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="docker_env cannot run on Databricks"):
        DatabricksBackend().check(DockerRequest(env=DockerEnv("python:3.12")), tmp_path)
