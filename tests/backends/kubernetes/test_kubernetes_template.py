"""Wrong templates and configurations: every mistake is reported before there is a run, with the path of its key."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from components.fake_kubernetes import FakeCluster
from mlfleet import Fleet
from mlfleet.backends.base import Job
from mlfleet.backends.kubernetes import KubernetesBackend
from mlfleet.backends.kubernetes.config import parse_config
from mlfleet.errors import UsageError
from mlfleet.testing import FakeTracking

TEMPLATE: dict[str, Any] = yaml.safe_load("""
apiVersion: batch/v1
kind: Job
metadata: {name: n, namespace: team, labels: {team: a}, annotations: {note: b}, creationTimestamp: null}
spec:
  backoffLimit: 3
  activeDeadlineSeconds: 3600
  ttlSecondsAfterFinished: 1000
  suspend: false
  podFailurePolicy:
    rules: [{action: Ignore, onPodConditions: [{type: DisruptionTarget, status: "True"}]}]
  template:
    metadata:
      labels: {app: train}
      annotations: {kubectl.kubernetes.io/default-container: train}
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 77
      serviceAccountName: runner
      nodeSelector: {pool: gpu}
      securityContext: {runAsUser: 1000, fsGroup: 2000}
      tolerations: [{key: spot, operator: Exists, tolerationSeconds: 3}]
      imagePullSecrets: [{name: pull}]
      initContainers: [{name: proxy, image: "envoy:1", restartPolicy: Always, args: [x]}]
      affinity:
        nodeAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            nodeSelectorTerms: [{matchExpressions: [{key: gpu, operator: In, values: [a100]}]}]
      containers:
        - {name: other, image: "other:1", livenessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 3}}
        - name: train
          image: train:1
          args: [x]
          env:
            - {name: OWN, value: "1"}
            - {name: CPUS, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: "1"}}}
          envFrom: [{secretRef: {name: more, optional: true}}]
          resources: {limits: {cpu: 2, memory: 4Gi}, requests: {cpu: 500m}}
          volumeMounts: [{name: data, mountPath: /data, readOnly: true}]
          securityContext: {runAsNonRoot: true, capabilities: {drop: [ALL]}}
      volumes:
        - {name: data, persistentVolumeClaim: {claimName: data}}
        - {name: scratch, emptyDir: {sizeLimit: 1Gi}}
""")

CONFIG: dict[str, Any] = {
    "kube-context": "one",
    "repository-uri": "host:5000/a/b",
    "namespace": "n",
    "image": "x:1",
    "code-delivery": "configmap",
    "tracking-uri": "http://mlflow:5000",
    "resources": {"cpu": 2, "memory": "4Gi"},
    "service-account": "runner",
    "node-selector": {"pool": "gpu"},
    "tolerations": [{"key": "spot", "tolerationSeconds": 3}],
    "image-pull-secrets": ["pull"],
    "ttl-seconds": 1000,
    "start-timeout": {"image": 5},
    "keep-jobs": False,
    "builder": "registry",
    "platform": "linux/amd64",
    "git-image": "git:1",
    "git-secret": "git",
}

WRONG: list[Any] = [
    True,
    7,
    -1.5,
    "4Gx",
    "",
    [],
    ["x"],
    [None],
    {},
    {"A": "b"},
    {"A": None},
    {3: "b"},
    {"x"},
    float("nan"),
]


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    contexts = [{"name": "one", "context": {"cluster": "c", "namespace": "team-a"}}]
    (tmp_path / "kubeconfig").write_text(json.dumps({"clusters": [], "contexts": contexts, "current-context": "one"}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    return {"KUBECONFIG": str(tmp_path / "kubeconfig")}


def nodes(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the keys that lead to each value of a document, the document itself first."""
    yield path
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from nodes(value[key], (*path, key))


def replaced(value: Any, path: tuple[str | int, ...], by: Any) -> Any:
    if not path:
        return copy.deepcopy(by)
    made = copy.deepcopy(value)
    holder = made
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = copy.deepcopy(by)
    return made


def written(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def preview(keys: dict[str, Any], environ: dict[str, str]) -> str:
    config = parse_config(keys, environ)
    backend = KubernetesBackend()
    backend.check_config(config, None, ["MLFLOW_RUN_ID"])
    job = Job(
        run_id="0" * 32, experiment_id="0", project_name="p", project_dir=Path(), command="true", config=config,
        environ={"MLFLOW_RUN_ID": "x", "MLFLOW_TRACKING_URI": "http://mlflow"}, secrets={"TOKEN": "hush"},
    )  # fmt: skip
    try:
        return backend.preview(job)
    except Exception as error:
        raise AssertionError(f"accepted, and then {error!r}") from error


def wrong_values(original: Any) -> Iterator[Any]:
    for value in WRONG:
        alike = type(value) is type(original) or (isinstance(value, int | float) and isinstance(original, int | float))
        if not (alike and not isinstance(value, bool)) or (isinstance(value, dict) and value):
            yield value


def failures(base: dict[str, Any], path: tuple[str | int, ...], environ: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong about the reaction to wrong values in one place of `base`."""
    original: Any = base
    for key in path:
        original = original[key]
    names = [written(path[:length]).removeprefix("job-template.") for length in range(1, len(path) + 1)][-2:]
    for value in wrong_values(original):
        case = f"{written(path)} is {value!r}"
        try:
            text = preview(replaced(base, path, value), environ)
        except UsageError as error:
            if not any(name in str(error) for name in names):
                yield f"{case}: the path is not in {error}"
        except Exception as error:
            yield f"{case}: {error!r}"
        else:
            try:
                kubernetes_validate.validate(next(yaml.safe_load_all(text)), "1.36", strict=False)
            except kubernetes_validate.ValidationError as error:
                yield f"{case}: accepted, and not valid: {error.message}"


def test_every_wrong_value_in_a_template_is_reported_with_its_path(environ: dict[str, str]) -> None:
    base = {"code-delivery": "configmap", "image": "x:1", "job-template": TEMPLATE}
    assert "other:1" in preview(base, environ)
    paths = [path for path in nodes(base) if path[:1] == ("job-template",)]
    assert len(paths) > 100
    assert [each for path in paths for each in failures(base, path, environ)] == []


def test_every_wrong_value_in_backend_config_is_reported_with_its_key(environ: dict[str, str]) -> None:
    preview(CONFIG, environ)
    assert [each for path in nodes(CONFIG) if path for each in failures(CONFIG, path, environ)] == []


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("metadata", "x", "job-template: metadata is 'x': give a mapping"),
        ("metadata.labels", ["a"], "metadata.labels is a list: give a mapping"),
        ("metadata.annotations", {"a": 1}, "metadata.annotations.a is 1: give a text, in quotes"),
        ("spec.template.spec.containers.0.env", {"A": "b"}, "containers[0].env is a mapping: give a list"),
        ("spec.template.spec.containers.0.env", ["A=b c"], "containers[0].env[0] is a text: give a mapping"),
        ("spec.template.spec.containers.0.env", [{"value": "b"}], "containers[0].env[0] has no name"),
        ("spec.template.spec.containers.0.resources", {"limits": {"memory": "4Gx"}},
         "containers[0].resources.limits.memory is '4Gx': give a quantity, as in 500m, 2 or 4Gi"),
        ("spec.backoffLimit", True, "spec.backoffLimit is true: give a whole number"),
        ("spec.template.metadata", {"annotations": {"kubectl.kubernetes.io/default-container": "none"}},
         "default-container is 'none', and the names of the containers are 'other', 'train'"),
    ],
)  # fmt: skip
def test_message_names_the_path_and_what_to_give(environ: dict[str, str], path: str, value: Any, told: str) -> None:
    keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))
    with pytest.raises(UsageError) as caught:
        parse_config({"code-delivery": "none", "job-template": replaced(TEMPLATE, keys, value)}, environ)
    assert told in str(caught.value)


def test_mistake_in_a_template_file_names_the_file(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("spec: {template: {spec: {containers: [{name: a, env: {A: b}}]}}}")
    with pytest.raises(UsageError, match=r"job\.yaml: spec\.template\.spec\.containers\[0\]\.env is a mapping"):
        parse_config({"code-delivery": "none", "kube-job-template-path": tmp_path / "job.yaml"}, environ)


CLASHES: list[tuple[dict[str, Any], str]] = [
    ({"env": [{"name": "MLFLOW_RUN_ID", "value": "x"}]}, "sets MLFLOW_RUN_ID"),
    ({"env": [{"name": "MLFLOW_TRACKING_USERNAME", "value": "x"}]}, "sets MLFLOW_TRACKING_USERNAME"),
    ({"env": [{"name": "FROM_PROJECT", "value": "x"}]}, "sets FROM_PROJECT"),
    ({"workingDir": "/x"}, "sets workingDir"),
    ({"volumeMounts": [{"name": "a", "mountPath": "/there"}]}, "has the mountPath '/there' in volumeMounts"),
]


@pytest.mark.parametrize(("extra", "told"), CLASHES)
async def test_clash_with_the_template_makes_no_run(
    fake_cluster: FakeCluster, tmp_path: Path, extra: dict[str, Any], told: str
) -> None:
    (tmp_path / "MLproject").write_text(
        "docker_env: {image: 'x:1', environment: [[FROM_PROJECT, y]], volumes: ['/here:/there']}\n"
        "entry_points: {main: {command: 'true'}}\n"
    )
    template = {"spec": {"template": {"spec": {"containers": [{"name": "main", **extra}]}}}}
    config = {"code-delivery": "configmap", "tracking-uri": "http://mlflow:5000", "job-template": template}
    tracking = FakeTracking()
    tracking.environment = {"MLFLOW_TRACKING_USERNAME": "me"}
    async with Fleet(tracking=tracking) as fleet:
        with pytest.raises(UsageError, match=told):
            await fleet.submit(str(tmp_path), backend="kubernetes", backend_config=config)
    assert tracking.runs == {}
    assert fake_cluster.api.requests == []


async def test_project_without_an_image_makes_no_run(fake_cluster: FakeCluster, tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text("entry_points: {main: {command: 'true'}}\n")
    tracking = FakeTracking()
    config = {"code-delivery": "configmap", "tracking-uri": "http://mlflow:5000"}
    async with Fleet(tracking=tracking) as fleet:
        with pytest.raises(UsageError, match="the project names no image"):
            await fleet.submit(str(tmp_path), backend="kubernetes", backend_config=config)
    assert tracking.runs == {}


async def test_invalid_name_of_a_variable_makes_no_run(fake_cluster: FakeCluster, tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text(
        "docker_env: {image: 'x:1', environment: [['1 A', y]]}\nentry_points: {main: {command: 'true'}}\n"
    )
    tracking = FakeTracking()
    config = {"code-delivery": "configmap", "tracking-uri": "http://mlflow:5000"}
    async with Fleet(tracking=tracking) as fleet:
        with pytest.raises(UsageError, match="'1 A' is not a valid name for a variable of a container"):
            await fleet.submit(str(tmp_path), backend="kubernetes", backend_config=config)
    assert tracking.runs == {}
