"""Nothing above the backends knows one of them by its name: what differs is an attribute or method of `Backend`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlfleet
from mlfleet.backends.registry import available

PACKAGE = Path(mlfleet.__file__).parent
# Their own words for other things: a reference to a host, a kind of login.
SHARED = ("_environments", "_project", "_oci", "tracking", "testing")


def names_in(node: ast.AST) -> set[str]:
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def comparisons(source: str) -> Iterator[str]:
    """The places where code compares something called backend with a backend's name, or imports one of them."""
    backends = {*available(), "docker", "kubernetes", "databricks"}
    modules = {f"mlfleet.backends.{name}" for name in backends}
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Compare() | ast.match_case() | ast.Subscript() | ast.Match():
                text = ast.unparse(node)
                if "backend" in text.lower() and names_in(node) & backends:
                    yield text
            case ast.ImportFrom(module=str(module)):
                imported = {module, *(f"{module}.{alias.name}" for alias in node.names)}
                if any(name == each or name.startswith(f"{each}.") for name in imported for each in modules):
                    yield ast.unparse(node)
            case ast.Import():
                if any(alias.name.startswith(tuple(modules)) for alias in node.names):
                    yield ast.unparse(node)


def test_nothing_above_the_backends_compares_a_name_or_imports_a_backend() -> None:
    above = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in (*SHARED, "backends")]
    assert len(above) > 30
    found = {str(path): list(comparisons(path.read_text())) for path in above}
    assert {path: places for path, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "source",
    [
        'if plan.backend == "local": pass',
        'here = reference.backend not in ("docker", "kubernetes")',
        'match request.backend:\n    case "databricks": pass',
        'limit = LIMITS_OF_BACKENDS["local"]',
        "from mlfleet.backends.local import run_folder",
        "from mlfleet.backends import docker",
        "import mlfleet.backends.docker.inventory",
    ],
)
def test_such_a_place_is_found(source: str) -> None:
    assert list(comparisons(source))


def test_other_places_are_let_through() -> None:
    source = 'from mlfleet.backends.base import Backend\nif environment.manager == "local": backend = "local"'
    assert not list(comparisons(source))
