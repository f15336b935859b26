"""What a release is made from says the same everywhere."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import mlfleet

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_the_conda_recipe_needs_what_the_package_needs(project: dict[str, Any]) -> None:
    recipe = yaml.safe_load((ROOT / ".conda" / "recipe.yaml").read_text())
    needed = {f"{each.name.lower()} {each.specifier}" for each in map(Requirement, project["dependencies"])}
    assert set(recipe["requirements"]["run"]) == {f"python {project['requires-python']}", *needed}
    assert recipe["context"]["version"] == mlfleet.__version__
    scripts = {f"{name} = {target}" for name, target in project["scripts"].items()}
    assert set(recipe["build"]["python"]["entry_points"]) == scripts


def test_the_workflow_tests_every_python_of_the_classifiers(project: dict[str, Any]) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    prefix = "Programming Language :: Python :: 3."
    named = [each.removeprefix(prefix[:-2]) for each in project["classifiers"] if each.startswith(prefix)]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == named


def test_the_newest_section_of_the_changelog_is_that_of_the_version() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    assert headings[0] == "## [Unreleased]"
    assert len(headings) == 1 or headings[1].startswith(f"## [{mlfleet.__version__}] - 20")
