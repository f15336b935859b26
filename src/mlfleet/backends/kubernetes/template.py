"""The template of a Job, checked against the fields that Kubernetes knows. A mistake is reported with its path."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mlfleet.backends.kubernetes.names import LABEL
from mlfleet.backends.kubernetes.state import CONTAINER_ANNOTATION
from mlfleet.errors import UsageError

__all__ = ["Checked", "check_template", "choose_container"]

_QUANTITY = re.compile(r"\+?(\d+\.?\d*|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?", re.A)
_LIST = re.compile(r"list\[(.+)\]")
_MAPPING = re.compile(r"dict\(str, (.+)\)")
_MISSING = re.compile(r"`(\w+)`, must not be `None`")
# The models call these texts, or leave them open.
_KINDS = {
    ("V1ResourceRequirements", "limits"): "dict(str, quantity)",
    ("V1ResourceRequirements", "requests"): "dict(str, quantity)",
    ("V1VolumeResourceRequirements", "limits"): "dict(str, quantity)",
    ("V1VolumeResourceRequirements", "requests"): "dict(str, quantity)",
    ("V1PodSpec", "overhead"): "dict(str, quantity)",
    ("V1EmptyDirVolumeSource", "sizeLimit"): "quantity",
    ("V1ResourceFieldSelector", "divisor"): "quantity",
    ("V1HTTPGetAction", "port"): "port",
    ("V1TCPSocketAction", "port"): "port",
    ("V1ObjectMeta", "labels"): "dict(str, label)",
    ("V1PodSpec", "nodeSelector"): "dict(str, label)",
}
_CONTAINERS = "spec.template.spec.containers["
_DEEPEST = 64


@dataclass(frozen=True, slots=True)
class Checked:
    """A reader of values that Kubernetes will read. It returns copies, without the keys whose value is null.

    Attributes:
        where: The file or key that the values are from, for errors.
    """

    where: str

    def read(self, value: Any, kind: str, path: str) -> Any:
        """Return a checked copy of a value.

        Args:
            value: The value, as JSON or YAML have it.
            kind: A model of kubernetes-asyncio, such as ``V1Job``, or a type as its models write it.
            path: The keys that lead to the value; empty for the whole document.

        Raises:
            UsageError: The value has another type, or a required field is missing.
        """
        if path.count(".") + path.count("[") > _DEEPEST:
            raise UsageError(f"{self.where}: {path[:80]}… is too deep")
        if (inner := _LIST.fullmatch(kind)) is not None:
            if not isinstance(value, list | tuple):
                raise self._wrong(path, value, "a list")
            return [self.read(each, inner[1], f"{path}[{number}]") for number, each in enumerate(value)]
        if (inner := _MAPPING.fullmatch(kind)) is not None:
            return {key: self.read(each, inner[1], f"{path}.{key}") for key, each in self._items(value, path)}
        if kind in _SCALARS:
            expected, accepts = _SCALARS[kind]
            if not accepts(value):
                raise self._wrong(path, value, expected)
            return value
        return self._read_any(value, path) if kind == "object" else self._read_model(value, kind, path)

    def _read_model(self, value: Any, model: str, path: str) -> dict[str, Any]:
        fields = _fields(model)
        made = {
            key: self.read(each, fields.get(key, "object"), f"{path}.{key}".lstrip("."))
            for key, each in self._items(value, path)
        }
        # mlfleet sets the name of the run's container; `check_template` looks for those of the others.
        named = {"name"} if path.startswith(_CONTAINERS) and model == "V1Container" else set()
        missing = sorted(_required(model) - made.keys() - named)
        if missing:
            raise UsageError(f"{self.where}: {path or 'the Job'} has no {missing[0]}, which it needs")
        return made

    def _read_any(self, value: Any, path: str) -> Any:
        """Read a field that the models do not know: the cluster may be newer, or ignore it with a warning."""
        if isinstance(value, Mapping):
            return {key: self.read(each, "object", f"{path}.{key}") for key, each in self._items(value, path)}
        if isinstance(value, list | tuple):
            return [self.read(each, "object", f"{path}[{number}]") for number, each in enumerate(value)]
        if isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        raise self._wrong(path, value, "a value that JSON has")

    def _items(self, value: Any, path: str) -> list[tuple[str, Any]]:
        if not isinstance(value, Mapping):
            raise self._wrong(path, value, "a mapping")
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise UsageError(f"{self.where}: {path or 'the Job'} has the key {wrong!r}: give a text, in quotes")
        return [(key, each) for key, each in value.items() if each is not None]

    def _wrong(self, path: str, value: Any, expected: str) -> UsageError:
        return UsageError(f"{self.where}: {path or 'the document'} is {_described(value)}: give {expected}")


def check_template(value: Any, where: str) -> dict[str, Any]:
    """Return a checked copy of the template of a Job.

    Args:
        value: The template; not changed.
        where: The file or key that it is from, for errors.

    Raises:
        UsageError: It is not a Job, a value has a wrong type, or the container of the run cannot be chosen.
    """
    read = Checked(where)
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: the document is {_described(value)}: give the mapping of a Job")
    if value.get("kind", "Job") != "Job" or value.get("apiVersion", "batch/v1") != "batch/v1":
        kind = f"apiVersion {value.get('apiVersion')!r} and kind {value.get('kind')!r}"
        raise UsageError(f"{where}: a Job (batch/v1) was expected, this has {kind}")
    made: dict[str, Any] = read.read({key: each for key, each in value.items() if key != "status"}, "V1Job", "")
    if not made.get("spec", {}).get("template", {}).get("spec", {}).get("containers"):
        raise UsageError(f"{where}: spec.template.spec.containers must be a list with at least one container")
    template = made["spec"]["template"]
    is_named = CONTAINER_ANNOTATION in template.get("metadata", {}).get("annotations", {})
    for number, container in enumerate(template["spec"]["containers"]):
        if "name" not in container and (is_named or number > 0):
            raise UsageError(f"{where}: {_CONTAINERS}{number}] has no name, which it needs")
    choose_container(made, where)
    return made


def choose_container(manifest: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the container of the run: the one that kubectl's annotation names, else the first one.

    Args:
        manifest: The manifest or template of a Job.
        where: The file or key that it is from, for errors.

    Raises:
        UsageError: The annotation names none of the containers.
    """
    template = manifest["spec"]["template"]
    name = template.get("metadata", {}).get("annotations", {}).get(CONTAINER_ANNOTATION)
    containers: list[dict[str, Any]] = template["spec"]["containers"]
    if name is None:
        return containers[0]
    found = next((each for each in containers if each.get("name") == name), None)
    if found is None:
        known = ", ".join(repr(each.get("name", "")) for each in containers)
        raise UsageError(
            f"{where}: spec.template.metadata.annotations.{CONTAINER_ANNOTATION} is {name!r}, and the names of the"
            f" containers are {known}"
        )
    return found


def _described(value: Any) -> str:
    """Return the type of a value for messages, and no texts, which may be secret."""
    match value:
        case None:
            return "null"
        case bool() | int() | float():
            return str(value).lower()
        case str():
            return f"{value!r}" if len(value) < 20 and " " not in value else "a text"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return f"of the type {type(value).__name__}"


def _is_quantity(value: Any) -> bool:
    if isinstance(value, str):
        return _QUANTITY.fullmatch(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


_SCALARS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a text, in quotes", lambda value: isinstance(value, str)),
    "datetime": ("a time", lambda value: isinstance(value, str)),
    "int": ("a whole number", lambda value: type(value) is int),
    "float": ("a number", lambda value: type(value) in (int, float) and math.isfinite(value)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "port": ("the number or the name of a port", lambda value: type(value) is int or isinstance(value, str)),
    "quantity": ("a quantity, as in 500m, 2 or 4Gi", _is_quantity),
    "label": (
        "a text of at most 63 letters, digits, '-', '_' and '.'",
        lambda value: isinstance(value, str) and (not value or LABEL.fullmatch(value) is not None),
    ),
}


@functools.cache
def _fields(model: str) -> Mapping[str, str]:
    """Return the type of each field of a model of kubernetes-asyncio, by its name in JSON."""
    from kubernetes_asyncio import client  # late: it takes a second

    kind = getattr(client, model)
    return {
        written: _KINDS.get((model, written), kind.openapi_types[name]) for name, written in kind.attribute_map.items()
    }


@functools.cache
def _required(model: str) -> frozenset[str]:
    """Return the names in JSON of the fields that a model does not let be missing."""
    from kubernetes_asyncio import client

    kind = getattr(client, model)
    given: dict[str, Any] = {}
    while True:
        try:
            kind(local_vars_configuration=SimpleNamespace(client_side_validation=True), **given)
        except ValueError as error:
            found = _MISSING.search(str(error))
            if found is None or found[1] in given:
                break
            given[found[1]] = ""
        else:
            break
    # `check_template` looks for the containers.
    ours = {("V1JobSpec", "template"), ("V1PodSpec", "containers")}
    return frozenset(kind.attribute_map[name] for name in given if (model, kind.attribute_map[name]) not in ours)
