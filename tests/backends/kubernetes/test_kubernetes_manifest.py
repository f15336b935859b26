"""Manifests: their content, their validity for Kubernetes 1.29 to the newest, and the early report of mistakes."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fakes.kubernetes_node import expand
from mlfleet._project.spec import DockerEnv
from mlfleet.backends.base import DockerRequest, Job
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.config import KubernetesConfig, parse_config
from mlfleet.backends.kubernetes.delivery import configmap_code
from mlfleet.backends.kubernetes.manifest import Code, job_manifest, launch
from mlfleet.backends.kubernetes.names import NAME, container_name, job_name
from mlfleet.errors import MlfleetError, SpecError, UsageError
from mlfleet.resources import Resources

RUN_ID = "0123456789abcdef0123456789abcdef"
VERSIONS = [f"1.{minor}" for minor in range(29, 38)]

# The one of MLflow's documentation, whose texts in braces the reference replaces.
REFERENCE_TEMPLATE = """
apiVersion: batch/v1
kind: Job
metadata:
  name: "{replaced with MLflow Project name}"
  namespace: mlflow
spec:
  ttlSecondsAfterFinished: 1000
  backoffLimit: 0
  template:
    spec:
      containers:
        - name: "{replaced with MLflow Project name}"
          image: "{replaced with URI of Docker image created during Project execution}"
          command: ["{replaced with MLflow Project entry point command}"]
          resources:
            limits: {memory: 512Mi}
      restartPolicy: Never
"""

RICH: dict[str, Any] = {
    "metadata": {"labels": {"team": "a"}, "annotations": {"note": "b"}},
    "spec": {
        "backoffLimit": 3,
        "activeDeadlineSeconds": 3600,
        "template": {
            "metadata": {"annotations": {"kubectl.kubernetes.io/default-container": "train"}},
            "spec": {
                "initContainers": [{"name": "proxy", "image": "envoy:1", "restartPolicy": "Always"}],
                "containers": [
                    {"name": "other", "image": "other:1", "env": [{"name": "MLFLOW_RUN_ID", "value": "theirs"}]},
                    {"name": "train", "image": "train:1", "args": ["x"], "env": [{"name": "OWN", "value": "1"}]},
                ],
                "terminationGracePeriodSeconds": 77,
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
            },
        },
    },
}


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    config = {
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "contexts": [
            {"name": "one", "context": {"cluster": "c", "namespace": "team-a"}},
            {"name": "two", "context": {"cluster": "c"}},
        ],
        "current-context": "one",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    return {"KUBECONFIG": str(tmp_path / "kubeconfig")}


def job(command: str = "python train.py", **options: Any) -> Job:
    fields: dict[str, Any] = {
        "run_id": RUN_ID,
        "experiment_id": "0",
        "project_name": "My_Project",
        "project_dir": Path(),
        "command": command,
    }
    return Job(**{**fields, **options})


def manifest(config: KubernetesConfig, made: Job | None = None, **options: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"secrets": (), "submission": "s", "plain": {"MLFLOW_RUN_ID": RUN_ID}}
    given = {**fields, **options}
    plain = given.pop("plain")
    return job_manifest(made or job(), config, given.pop("code", Code(image="train:2")), plain, **given)


def pod(made: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = made["spec"]["template"]["spec"]
    return spec


def config_of(environ: dict[str, str], **keys: Any) -> KubernetesConfig:
    return parse_config({"code-delivery": "none", **{key.replace("_", "-"): keys[key] for key in keys}}, environ)


# --- what Kubernetes takes


@pytest.mark.parametrize("delivery", ["none", "configmap", "git", "image"])
@pytest.mark.parametrize("template", [None, "reference", "rich"])
def test_every_kubernetes_version_accepts_the_manifests(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delivery: str, template: str | None
) -> None:
    keys: dict[str, Any] = {"code-delivery": delivery, "repository-uri": "host:5000/a/b", "image": "base:1"}
    if template == "reference":
        (tmp_path / "job.yaml").write_text(REFERENCE_TEMPLATE)
        keys["kube-job-template-path"] = str(tmp_path / "job.yaml")
    if template == "rich":
        keys["job-template"] = RICH
    keys |= {
        "resources": {"cpu": 2, "nvidia.com/gpu": 1}, "service-account": "runner", "git-secret": "git",
        "node-selector": {"pool": "gpu"}, "tolerations": [{"key": "spot", "operator": "Exists"}],
        "image-pull-secrets": ["pull"],
    }  # fmt: skip
    docker = DockerRequest(env=DockerEnv(image="x:1", volumes=("/data:/data:ro",), environment=(("A", "$(B) $C"),)))
    made = job(
        "echo \"$HOME\" $(date) '$$'", config=parse_config(keys, environ), docker=docker, secrets={"TOKEN": "hush"},
        environ={"MLFLOW_TRACKING_URI": "http://mlflow"}, resources=Resources(cpus=0.5, memory="1Gi", gpus=2),
    )  # fmt: skip
    text = KubernetesBackend().preview(made)
    assert "hush" not in text
    documents = list(yaml.safe_load_all(text))
    assert [document["kind"] for document in documents] == ["Job", "Secret"]
    for version in VERSIONS:
        for document in documents:
            kubernetes_validate.validate(document, version, strict=True)


def test_mlflow_backend_config_is_accepted_unchanged(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(REFERENCE_TEMPLATE)
    keys = {
        "kube-context": "two",
        "repository-uri": "host:5000/a/b",
        "kube-job-template-path": str(tmp_path / "job.yaml"),
    }
    config = parse_config(keys, environ)
    made = manifest(config, code=Code(image="host:5000/a/b:tag@sha256:0"))
    assert made["metadata"]["name"] == f"my-project-{RUN_ID}"
    assert made["metadata"]["namespace"] == "mlflow"
    assert made["spec"]["ttlSecondsAfterFinished"] == 1000
    (container,) = pod(made)["containers"]
    assert container["name"] == "my-project"
    assert container["image"] == "host:5000/a/b:tag@sha256:0"
    assert container["env"] == [{"name": "MLFLOW_RUN_ID", "value": RUN_ID}]
    assert container["resources"] == {"limits": {"memory": "512Mi"}}


# --- the template


def test_template_fields_are_kept_and_the_template_is_not_modified(environ: dict[str, str]) -> None:
    before = copy.deepcopy(RICH)
    config = config_of(environ, job_template=RICH)
    made = manifest(config)
    manifest(config)
    assert before == RICH
    assert made["metadata"]["labels"]["team"] == "a"
    other, train = pod(made)["containers"]
    assert other == RICH["spec"]["template"]["spec"]["containers"][0]
    assert train["image"] == "train:2"
    assert train["env"][0] == {"name": "OWN", "value": "1"}
    assert "args" not in train
    assert pod(made)["initContainers"] == RICH["spec"]["template"]["spec"]["initContainers"]
    assert pod(made)["terminationGracePeriodSeconds"] == 77
    assert made["spec"]["backoffLimit"] == 3


def test_template_must_not_set_fields_that_the_run_sets(environ: dict[str, str]) -> None:
    for extra, told in (
        ({"env": [{"name": "MLFLOW_RUN_ID", "value": "x"}]}, "sets MLFLOW_RUN_ID, which the run sets too"),
        ({"env": [{"name": "TOKEN", "value": "x"}]}, "sets TOKEN, which the run sets too"),
        ({"workingDir": "/x"}, "sets workingDir"),
    ):
        template = {"spec": {"template": {"spec": {"containers": [{"name": "main", **extra}]}}}}
        config = config_of(environ, job_template=template)
        with pytest.raises(UsageError, match=told):
            manifest(config, secrets=("TOKEN",), code=Code(image="x", folder="/code"))


def test_init_containers_are_as_restricted_as_the_run_container(environ: dict[str, str]) -> None:
    """Namespaces with Pod Security or a ResourceQuota refuse a pod if any of its containers is unrestricted."""
    restricted = {"runAsNonRoot": True, "allowPrivilegeEscalation": False}
    limits = {"cpu": "2", "memory": "1Gi", "nvidia.com/gpu": "1"}
    container = {"name": "main", "securityContext": restricted, "resources": {"limits": limits}}
    config = config_of(environ, job_template={"spec": {"template": {"spec": {"containers": [container]}}}})
    made = pod(manifest(config, code=configmap_code("x:1", "code")))
    (init,) = made["initContainers"]
    assert init["securityContext"] == restricted
    assert init["resources"] == {"limits": {"cpu": "2", "memory": "1Gi"}}, "a device for the run alone"


def test_labels_identify_runs_and_sweeps(environ: dict[str, str]) -> None:
    made = manifest(config_of(environ), job(sweep_id="fedcba98765432100123456789abcdef"))
    expected = {
        "app.kubernetes.io/managed-by": "mlfleet",
        "mlfleet.run-id": RUN_ID,
        "mlfleet.sweep-id": "fedcba98765432100123456789abcdef",
    }
    assert made["metadata"]["labels"] == made["spec"]["template"]["metadata"]["labels"] == expected
    assert "mlfleet.sweep-id" not in manifest(config_of(environ))["metadata"]["labels"]


def test_pods_get_the_grace_period_of_the_run(environ: dict[str, str]) -> None:
    assert pod(manifest(config_of(environ), job(cancel_grace=2.5)))["terminationGracePeriodSeconds"] == 3
    # 0 would remove pods from the API server while their processes still run.
    assert pod(manifest(config_of(environ), job(cancel_grace=0.0)))["terminationGracePeriodSeconds"] == 1


def test_docker_env_volumes_are_mounted(environ: dict[str, str]) -> None:
    docker = DockerRequest(env=DockerEnv(image="x", volumes=("/here:/there:ro",)))
    made = pod(manifest(config_of(environ), job(docker=docker)))
    assert made["volumes"] == [{"name": "mlfleet-volume-0", "hostPath": {"path": "/here"}}]
    for text in ("data:/there", "./here:/there", "/here:there"):
        wrong = DockerRequest(env=DockerEnv(image="x", volumes=(text,)))
        with pytest.raises(UsageError, match=r"is not a folder of a node.*persistentVolumeClaim"):
            KubernetesBackend().check(wrong, Path())


def test_copied_environment_variables_must_be_set() -> None:
    docker = DockerRequest(env=DockerEnv(image="x", environment=(("SURELY_NOT_SET_1", None),)))
    with pytest.raises(UsageError, match="not set here: SURELY_NOT_SET_1"):
        KubernetesBackend().check(docker, Path())


# --- the command


@given(st.text(), st.dictionaries(st.text(), st.text()))
def test_commands_survive_kubernetes_variable_expansion(command: str, environ: dict[str, str]) -> None:
    assert expand(launch(command)[3], environ) == command


@pytest.mark.parametrize(
    ("command", "code", "printed"),
    [
        ("echo 'two  words' \"$(printf '%s' '$(X)')\"; exit 3", 3, "two  words $(X)\n"),
        ("echo $((6 * 7)); test $$ -gt 1", 0, "42\n"),
        ("echo out; echo err >&2", 0, "out\nerr\n"),
        ("cat; echo end", 0, "end\n"),
        ("kill -KILL $$", 137, ""),
    ],
)
def test_command_runs_unchanged(command: str, code: int, printed: str) -> None:
    argv = [expand(part, {"X": "wrong"}) for part in launch(command)]
    done = subprocess.run(argv, capture_output=True, text=True, input="not for the run", timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (code, printed, "")


# --- names


@given(st.text(max_size=100), st.one_of(st.uuids().map(lambda each: each.hex), st.text(max_size=80)))
def test_job_names_are_valid_for_any_project_name(project: str, run_id: str) -> None:
    name = job_name(project, run_id)
    assert NAME.fullmatch(name)
    assert len(name) <= 57
    assert name == job_name(project, run_id)
    assert NAME.fullmatch(container_name(project, project))


# --- the configuration


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"kube-contxt": "x"}, "unknown key 'kube-contxt', did you mean 'kube-context'"),
        ({"kube-context": "three"}, "no context 'three'; it has one, two: kube-context must be one of them"),
        ({"code-delivery": "ftp"}, "code-delivery is 'ftp': give one of 'image', 'none', 'configmap', 'git'"),
        ({"code-delivery": "image"}, "repository-uri is missing.*'configmap'"),
        ({"namespace": "Not_Valid"}, "'Not_Valid' is not the name of a namespace"),
        ({"ttl-seconds": -1}, "ttl-seconds is -1: give a whole number of seconds"),
        ({"ttl-seconds": True}, "ttl-seconds is True"),
        ({"keep-jobs": "no"}, "keep-jobs is 'no': give true or false"),
        ({"tolerations": {}}, "tolerations is {}: give a list"),
        ({"start-timeout": {"images": 1}}, "start-timeout has 'images': it takes image, config, unschedulable"),
        ({"start-timeout": "soon"}, "start-timeout is 'soon': give seconds"),
        ({"resources": {"limits": {}, "cpu": 1}}, "resources has requests or limits, and other keys"),
        ({"builder": "kaniko"}, "builder is 'kaniko'"),
        ({"platform": "amd64"}, "platform is 'amd64'"),
        ({"job-template": {"kind": "Pod"}}, "a Job .batch/v1. was expected"),
        ({"job-template": {"spec": {}}}, "spec.template.spec.containers must be a list"),
        ({"image": 3}, "image is 3: give a text"),
    ],
)
def test_config_mistakes_are_reported_before_anything_is_created(
    environ: dict[str, str], keys: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        parse_config({"code-delivery": "none", **keys}, environ)


def test_missing_or_malformed_template_is_refused(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere\.yaml: there is no such file"):
        config_of(environ, kube_job_template_path="nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("spec:\n  template: [\n")
    with pytest.raises(SpecError, match="line"):
        config_of(environ, kube_job_template_path=str(tmp_path / "bad.yaml"))


def test_missing_cluster_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no cluster.*kind create cluster"):
        parse_config({"code-delivery": "none"}, {"KUBECONFIG": str(tmp_path / "none")})
    # A mistyped context does not fall back to the cluster that this process is in.
    environ = {"KUBECONFIG": str(tmp_path / "none"), "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    with pytest.raises(UsageError, match="has no context 'mine'"):
        parse_config({"code-delivery": "none", "kube-context": "mine"}, environ)


def test_damaged_kubeconfig_is_reported(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("contexts: [\n")
    with pytest.raises(MlfleetError, match="cannot be read"):
        parse_config({"code-delivery": "none"}, {"KUBECONFIG": str(tmp_path / "config")})


def test_namespace_comes_from_config_then_template_then_context(environ: dict[str, str]) -> None:
    template = {"metadata": {"namespace": "t"}, "spec": RICH["spec"]}
    assert config_of(environ, job_template=template, namespace="n").namespace == "n"
    assert config_of(environ, job_template=template).namespace == "t"
    assert config_of(environ).namespace == "team-a"
    assert config_of(environ, kube_context="two").namespace == "default"


def test_caller_config_is_not_modified(environ: dict[str, str]) -> None:
    keys = {"code-delivery": "none", "job-template": copy.deepcopy(RICH), "resources": {"cpu": 1}}
    before = copy.deepcopy(keys)
    made = manifest(parse_config(keys, environ))
    pod(made)["containers"].clear()
    assert keys == before
