"""The public surface: what is exported, with which signatures, and that it keeps the promises made for it."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.metadata
import inspect
import pickle
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from importlib.resources import files
from typing import get_type_hints

import pytest

import mlfleet
from components import missing
from mlfleet import errors
from mlfleet._engine.options import OPTIONS, RunOptions
from mlfleet._engine.request import RunRequest
from mlfleet._sweeps import SweepOptions

REFERENCE = (
    "uri, entry_point='main', version=None, parameters=None, docker_args=None, experiment_name=None, "
    "experiment_id=None, backend='local', backend_config=None, storage_dir=None, synchronous=True, run_id=None, "
    "run_name=None, env_manager=None, build_image=False, docker_auth=None"
)
"""The arguments of mlflow.projects.run in mlflow 3.17."""

ARGUMENTS = [option for option in OPTIONS if "." not in option.name]

OURS = [
    "tracking_uri",
    "parent_run_id",
    "tags",
    "timeouts",
    "output",
    "log_output",
    "resources",
    "env",
    "inherit_env",
    "detach",
    "progress",
]

ERRORS = [getattr(errors, name) for name in errors.__all__]


def arguments(function: object) -> list[inspect.Parameter]:
    assert callable(function)
    return list(inspect.signature(function).parameters.values())


def shown(parameters: list[inspect.Parameter]) -> str:
    return ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters)


def test_exports_are_sorted_and_exist() -> None:
    assert mlfleet.__all__ == sorted(mlfleet.__all__)
    assert len(mlfleet.__all__) == len(set(mlfleet.__all__))
    for name in mlfleet.__all__:
        assert hasattr(mlfleet, name), name


def test_every_error_is_exported() -> None:
    assert set(errors.__all__) <= set(mlfleet.__all__)


def test_every_public_name_has_a_docstring() -> None:
    for name in mlfleet.__all__:
        thing = getattr(mlfleet, name)
        if not inspect.isclass(thing) and not inspect.isfunction(thing):
            continue  # the version, and aliases of types
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                    assert inspect.getdoc(value), f"{name}.{method}"


def test_no_docstring_is_taken_for_a_type() -> None:
    # Sphinx's napoleon takes what stands before a colon in these places for a type.
    for module in PUBLIC:
        for thing in vars(importlib.import_module(module)).values():
            for name, member in (vars(thing) if inspect.isclass(thing) else {"": thing}).items():
                text = inspect.getdoc(member) or ""
                first = text.partition("\n")[0] if isinstance(member, property) else ""
                returned = re.search(r"^Returns:\n\s+(.+)", text, re.M)
                for line in (first, returned[1] if returned else ""):
                    assert not re.search(r"\w: ", line), f"{thing}.{name}: {line}"


@pytest.mark.parametrize("function", [mlfleet.run, mlfleet.run_async])
def test_the_first_sixteen_arguments_are_those_of_mlflow(function: object) -> None:
    assert shown(arguments(function)[:16]) == REFERENCE
    assert all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in arguments(function)[:16])


@pytest.mark.parametrize("function", [mlfleet.run, mlfleet.run_async])
def test_new_arguments_are_keyword_only(function: object) -> None:
    new = arguments(function)[16:]
    assert [parameter.name for parameter in new] == OURS
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in new)


def test_the_installed_mlflow_takes_the_same_arguments() -> None:
    # In a process of its own: mlflow's import is slow, and leaves warnings and threads behind.
    script = "import inspect, mlflow.projects; print(list(inspect.signature(mlflow.projects.run).parameters))"
    try:
        importlib.metadata.version("mlflow")
    except importlib.metadata.PackageNotFoundError:
        missing("mlflow", "pip install 'mlfleet[dev]'")
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert found.strip() == str([parameter.name for parameter in arguments(mlfleet.run)[:16]])


def test_submit_takes_the_arguments_of_run_async() -> None:
    positional = [parameter.name for parameter in arguments(mlfleet.submit)[:4]]
    everything = {parameter.name for parameter in arguments(mlfleet.run_async)}
    assert {*positional, "tracking_uri", "synchronous", "progress", *RunOptions.__annotations__} == everything


@pytest.mark.parametrize("function", [mlfleet.run, mlfleet.run_async])
def test_the_arguments_of_a_run_are_those_of_the_table_in_its_order(function: object) -> None:
    assert [parameter.name for parameter in arguments(function)] == [each.name for each in ARGUMENTS]


def test_the_types_and_defaults_of_a_run_are_the_same_everywhere() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(RunRequest)}
    types = get_type_hints(mlfleet.run_async)
    for name, type_ in get_type_hints(RunOptions).items():
        assert type_ == types[name] == get_type_hints(RunRequest)[name], name
    for parameter in arguments(mlfleet.run_async):
        if parameter.name in fields and parameter.name not in ("uri", "parameters"):
            assert fields[parameter.name] == parameter.default, parameter.name
    blocking = {parameter.name: parameter for parameter in arguments(mlfleet.run)}
    for parameter in arguments(mlfleet.run_async):
        if parameter.name != "output":  # None decides by `synchronous`
            assert blocking[parameter.name] == parameter


def test_the_parts_of_an_option_are_fields_of_its_class() -> None:
    classes = {"timeouts": mlfleet.Timeouts, "resources": mlfleet.Resources}
    for option in OPTIONS:
        argument, _, part = option.name.partition(".")
        if part:
            assert part in {field.name for field in dataclasses.fields(classes[argument])}, option.name


def test_sweeps_take_the_same_arguments_in_every_form() -> None:
    named = [parameter.name for parameter in arguments(mlfleet.Fleet.sweep)[3:-1]]
    assert {*named, *RunOptions.__annotations__} == set(SweepOptions.__annotations__)
    for function in (mlfleet.sweep, mlfleet.sweep_async):
        names = [parameter.name for parameter in arguments(function)]
        assert names == ["uri", "space", "tracking_uri", "progress", "metric", "goal", "options"]


def test_handles_satisfy_the_protocol() -> None:
    for method in ("wait", "cancel", "get_status", "logs", "run_id"):
        assert hasattr(mlfleet.FleetRun, method)
        assert hasattr(mlfleet.BlockingRun, method)


def test_statuses_are_the_strings_of_mlflow() -> None:
    assert {str(status) for status in mlfleet.RunStatus} == {"SCHEDULED", "RUNNING", "FINISHED", "FAILED", "KILLED"}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_survive_pickling_and_copying(kind: type[mlfleet.MlfleetError]) -> None:
    fields = {
        name: ("a", "b") if name in ("output", "names") else 3 if name in ("line", "exit_code", "status") else "x"
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    error = kind("what was wrong", **fields)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)
        for name, value in fields.items():
            assert getattr(twin, name) == value


@pytest.mark.parametrize("kind", ERRORS)
def test_one_except_clause_catches_every_error(kind: type[BaseException]) -> None:
    assert issubclass(kind, mlfleet.MlfleetError)


def test_the_package_is_typed() -> None:
    assert files(mlfleet).joinpath("py.typed").is_file()


def test_the_import_brings_no_heavy_packages() -> None:
    script = (
        "import sys, mlfleet\n"
        "heavy = {'mlflow', 'httpx', 'rich', 'click', 'yaml', 'fsspec', 'rattler', 'aiodocker', 'sqlalchemy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"


def test_the_version_is_the_one_that_is_installed() -> None:
    assert mlfleet.__version__ == importlib.metadata.version("mlfleet")


PUBLIC = ["mlfleet", "mlfleet.tracking", "mlfleet.backends.base", "mlfleet.testing", "mlfleet.asgi"]


def types_in(annotation: object) -> Iterator[type]:
    """All classes of mlfleet that stand in an annotation."""
    if isinstance(annotation, type) and annotation.__module__.partition(".")[0] == "mlfleet":
        yield annotation
    for argument in typing.get_args(annotation):
        parts = argument if isinstance(argument, list) else [argument]
        for part in parts:
            yield from types_in(part)


def annotations_of(thing: object) -> Iterator[object]:
    """The annotations of a function, or of the public methods, properties and attributes of a class."""
    if not inspect.isclass(thing):
        if inspect.isfunction(thing):
            yield from typing.get_type_hints(thing, localns=_LATE).values()
        return
    yield from (hint for name, hint in typing.get_type_hints(thing, localns=_LATE).items() if not name.startswith("_"))
    if not dataclasses.is_dataclass(thing) and "__init__" in vars(thing) and thing.__name__ not in _MADE_BY_MLFLEET:
        yield from typing.get_type_hints(thing.__init__, localns=_LATE).values()
    for name, member in vars(thing).items():
        function = getattr(member, "__func__", member)
        function = member.fget if isinstance(member, property) else function
        if not name.startswith("_") and inspect.isfunction(function):
            yield from typing.get_type_hints(function, localns=_LATE).values()


_LATE = {
    "pandas": types.SimpleNamespace(DataFrame=object),
    "httpx": types.SimpleNamespace(AsyncClient=object, AsyncBaseTransport=object, Response=object),
}
_MADE_BY_MLFLEET = {
    "BlockingRun",
    "FleetRun",
    "Sweep",
    "Subscription",
    "TrackedRun",
}  # their constructors are not for callers


@pytest.mark.parametrize("module", PUBLIC)
def test_every_type_in_a_public_signature_is_exported(module: str) -> None:
    modules = [importlib.import_module(name) for name in PUBLIC]
    exported = {id(getattr(each, name)) for each in modules for name in each.__all__}
    public = importlib.import_module(module)
    missing_types = {
        f"{name}: {kind.__module__}.{kind.__name__}"
        for name in public.__all__
        for annotation in annotations_of(getattr(public, name))
        for kind in types_in(annotation)
        if id(kind) not in exported
    }
    assert missing_types == set()
