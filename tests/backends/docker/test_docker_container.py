"""The request for a container: image names, mounts for the tracking store, credentials, the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlfleet._oci.login import check_auth, registry_of
from mlfleet._project.spec import DockerEnv
from mlfleet.backends.base import DockerRequest, Job
from mlfleet.backends.docker.container import TrackingMounts, container_body, tracking_mounts
from mlfleet.backends.docker.image import Image, check_reference
from mlfleet.backends.docker.run_options import ContainerOptions, parse_arguments
from mlfleet.errors import SubmitError, UsageError
from mlfleet.resources import Resources

IMAGE = Image("team/image:1", "sha256:" + "0" * 64)


def job(**options: Any) -> Job:
    given: dict[str, Any] = {
        "run_id": "r1",
        "experiment_id": "0",
        "project_name": "demo",
        "project_dir": Path("/projects/demo"),
        "command": "echo 'a b' | cat",
        "docker": DockerRequest(env=DockerEnv("team/image:1", environment=(("BOTH", "project"), ("ONLY", "project")))),
    }
    return Job(**{**given, **options})


@pytest.mark.parametrize(
    "name", ["python", "python:3.11", "a/b/c:tag", "host:5000/a_b/c-d@sha256:" + "a" * 64, "0" * 64]
)
def test_the_name_of_an_image_is_accepted(name: str) -> None:
    check_reference(name)


@pytest.mark.parametrize("name", ["", "Team/Image", "a b", "image:tag\nRUN evil", "-v", "a//b", "x:y:z"])
def test_a_text_that_is_not_the_name_of_an_image_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not the name of an image"):
        check_reference(name)


@pytest.mark.parametrize(
    ("image", "registry"),
    [
        ("python:3", "https://index.docker.io/v1/"),
        ("team/image", "https://index.docker.io/v1/"),
        ("docker.io/team/image", "https://index.docker.io/v1/"),
        ("localhost/image", "localhost"),
        ("host:5000/image:1", "host:5000"),
        ("ghcr.io/team/image", "ghcr.io"),
    ],
)
def test_the_registry_of_an_image(image: str, registry: str) -> None:
    assert registry_of(image) == registry


def test_docker_auth_is_checked_without_showing_its_values() -> None:
    with pytest.raises(UsageError, match="docker_auth has pasword: it takes username, password"):
        check_auth({"username": "me", "pasword": "hush"})
    with pytest.raises(UsageError, match="needs username and password") as caught:
        check_auth({"password": "hush"})
    assert "hush" not in str(caught.value)


def test_the_command_is_one_argument_and_variables_have_an_order() -> None:
    options = parse_arguments({"env": ["BOTH=caller"], "label": "team=x"}, environ={}, folder=Path("/"))
    body = container_body(
        job(environ={"ONLY": "mlfleet", "M": "1"}, secrets={"S": "hush"}), options, IMAGE, TrackingMounts()
    )
    assert body["Cmd"][-1] == "echo 'a b' | cat"
    assert {"BOTH=caller", "ONLY=project", "M=1", "S=hush"} <= set(body["Env"])
    assert body["Labels"]["team"] == "x"
    assert body["Labels"]["mlfleet.run-id"] == "r1"
    assert "hush" not in str(body["Labels"]) + str(body["Cmd"])
    assert body["HostConfig"]["Init"] is True


def test_the_callers_variables_count_more_than_those_of_the_project() -> None:
    env = DockerEnv("team/image:1", environment=(("BOTH", "project"), ("ONLY", "project")))
    made = job(
        docker=DockerRequest(env=env, caller_variables=frozenset({"BOTH"})),
        secrets={"BOTH": "caller", "MLFLOW_TRACKING_TOKEN": "hush"},
    )
    body = container_body(made, ContainerOptions(), IMAGE, TrackingMounts())
    assert {"BOTH=caller", "ONLY=project"} <= set(body["Env"])
    assert "BOTH=project" not in body["Env"]
    options = parse_arguments({"env": ["BOTH=flag"]}, environ={}, folder=Path("/"))
    assert "BOTH=flag" in container_body(made, options, IMAGE, TrackingMounts())["Env"]


def test_an_image_with_an_init_of_its_own_gets_no_second_one() -> None:
    image = Image("i", "sha256:0", entrypoint=("/usr/bin/tini", "--"))
    assert container_body(job(), ContainerOptions(), image, TrackingMounts())["HostConfig"]["Init"] is False
    options = ContainerOptions(host={"Init": True})
    assert container_body(job(), options, image, TrackingMounts())["HostConfig"]["Init"] is True


def test_files_of_parameters_are_mounted_at_their_own_path() -> None:
    paths = (Path("/data/in.csv"), Path("/data/in.csv"), Path("/mine"))
    options = ContainerOptions(host={"Binds": ["/elsewhere:/mine:ro"]})
    body = container_body(job(paths=paths), options, IMAGE, TrackingMounts())
    assert body["HostConfig"]["Binds"] == ["/elsewhere:/mine:ro", "/data/in.csv:/data/in.csv"]


def test_resources_are_limits_unless_docker_args_say_otherwise() -> None:
    resources = Resources(cpus=1.5, gpus=2, memory="1Gi")
    host = container_body(job(resources=resources), ContainerOptions(), IMAGE, TrackingMounts())["HostConfig"]
    assert (host["NanoCpus"], host["Memory"], host["DeviceRequests"][0]["Count"]) == (1_500_000_000, 2**30, 2)
    options = parse_arguments({"memory": "2g", "cpu-quota": 1, "gpus": "all"}, environ={}, folder=Path("/"))
    host = container_body(job(resources=resources), options, IMAGE, TrackingMounts())["HostConfig"]
    assert (host["Memory"], host["DeviceRequests"][0]["Count"]) == (2 * 2**30, -1)
    assert "NanoCpus" not in host


def where(
    uri: str,
    artifacts: str = "",
    here: dict[str, str] | None = None,
    *,
    local: bool = True,
    home: Path = Path("/home/me"),
) -> TrackingMounts:
    return tracking_mounts(
        {"MLFLOW_TRACKING_URI": uri}, artifacts, here=here or {}, home=home, engine="tcp://elsewhere:2375", local=local
    )


def test_a_sqlite_store_is_mounted_with_its_journal() -> None:
    made = where("sqlite:////data/runs/mlflow.db", "/data/artifacts/0/r1/artifacts")
    assert made.binds == [
        "/data/runs:/mlflow/tmp/mlruns",
        "/data/artifacts/0/r1/artifacts:/data/artifacts/0/r1/artifacts",
    ]
    assert made.environ == {"MLFLOW_TRACKING_URI": "sqlite:////mlflow/tmp/mlruns/mlflow.db"}
    assert not made.host_network


def test_a_file_store_is_mounted() -> None:
    made = where("file:///data/ml%20runs", "file:///data/ml%20runs/0/r1/artifacts")
    assert made.binds[0] == "/data/ml runs:/mlflow/tmp/mlruns"
    assert made.environ["MLFLOW_TRACKING_URI"] == "file:///mlflow/tmp/mlruns"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "http://localhost:5000", "http://[::1]:5000"])
def test_a_server_on_loopback_needs_the_network_of_the_host(uri: str) -> None:
    assert where(uri).host_network
    body = container_body(job(), ContainerOptions(), IMAGE, where(uri))
    assert body["HostConfig"]["NetworkMode"] == "host"
    chosen = ContainerOptions(host={"NetworkMode": "mine"})
    assert container_body(job(), chosen, IMAGE, where(uri))["HostConfig"]["NetworkMode"] == "mine"


@pytest.mark.parametrize("uri", ["https://mlflow.example.com", "databricks", "databricks://profile", "http://10.0.0.1"])
def test_other_servers_need_nothing(uri: str) -> None:
    assert where(uri) == TrackingMounts()


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "sqlite:////data/mlflow.db", "file:///data"])
def test_an_engine_elsewhere_cannot_reach_this_machine(uri: str) -> None:
    with pytest.raises(SubmitError, match=r"is on this machine, and the Docker engine at tcp://elsewhere:2375"):
        where(uri, local=False)


def test_only_credentials_for_the_kind_of_store_are_passed_on(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    keys = {"AWS_SECRET_ACCESS_KEY": "s", "AZURE_STORAGE_ACCESS_KEY": "a", "GOOGLE_APPLICATION_CREDENTIALS": "/g.json"}
    s3 = where(
        "https://x", "s3://bucket/0/r1", {**keys, "MLFLOW_S3_ENDPOINT_URL": "http://127.0.0.1:9000"}, home=tmp_path
    )
    assert s3.environ["AWS_SECRET_ACCESS_KEY"] == "s"
    assert "AZURE_STORAGE_ACCESS_KEY" not in s3.environ
    assert s3.binds == [f"{tmp_path}/.aws:/.aws:ro"]
    assert s3.host_network
    assert where("https://x", "wasbs://c@a/0", keys).environ == {"AZURE_STORAGE_ACCESS_KEY": "a"}
    gcs = where("https://x", "gs://bucket/0", keys)
    assert (gcs.binds, gcs.environ) == (["/g.json:/.gcs:ro"], {"GOOGLE_APPLICATION_CREDENTIALS": "/.gcs"})
    hdfs = where("https://x", "hdfs://h/0", {"MLFLOW_KERBEROS_TICKET_CACHE": "/tmp/krb", "MLFLOW_KERBEROS_USER": "u"})
    assert hdfs.binds == ["/tmp/krb:/tmp/krb:ro"]
    assert where("https://x", "mlflow-artifacts:/0/r1", keys) == TrackingMounts()
