"""The same calls of the same projects by mlflow and by mlfleet differ as docs/differences.md says, and only so.

To see everything that both sides did in one case: ``pytest tests/parity -k name``, and the message of its failure.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import mlfleet
from parity.case import Case
from parity.cases import CASES
from parity.comparing import Pair, differing
from parity.differences import EVERYWHERE, RULES, read_page
from parity.sides import REFERENCES, Side

PAGE = Path(__file__).parents[2] / "docs" / "differences.md"
KEYS = [
    "name", "docker_env", "python_env", "conda_env", "entry_points", "databricks_spark_job", "parameters", "type",
    "default", "command", "image", "volumes", "environment", "python_file", "python_libraries",
]  # fmt: skip
"""Of MLproject."""

LISTED = read_page(PAGE, REFERENCES)

# The first one waits for two installations, the last one for all cases; each case by itself takes a second.
pytestmark = pytest.mark.timeout(900)


def explained(case: Case, reference: str, pair: Pair) -> dict[str, set[str]]:
    """Return each aspect that differs, with the listed differences that explain it."""
    rows = [LISTED[name] for name in {*case.differs, *EVERYWHERE}]
    return {
        aspect: {
            row.id for row in rows if row.covers(reference, aspect) and RULES[row.id](aspect, pair.theirs, pair.ours)
        }
        for aspect in differing(pair)
    }


def observed(sides: dict[str, Side], reference: str, case: Case) -> Pair:
    return Pair(sides[reference].ask(case).result(), sides["mlfleet"].ask(case).result())


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_differs_is_listed(case: Case, reference: str, asked: dict[str, Side]) -> None:
    pair = observed(asked, reference, case)
    found = explained(case, reference, pair)
    version = f"mlflow {asked[reference].version}"
    unlisted = [aspect for aspect, names in found.items() if not names]
    assert not unlisted, (
        f"{version}: this case shows none of docs/differences.md that explains\n{pair.describe(unlisted)}"
    )
    shown = set().union(*found.values()) - EVERYWHERE
    expected = {name for name in case.differs if reference in LISTED[name].references}
    assert shown == expected, f"{version}, of all that differs:\n{pair.describe(found)}"


@pytest.mark.parametrize("reference", REFERENCES)
def test_what_is_listed_differs(reference: str, asked_all: dict[str, Side]) -> None:
    shown: set[str] = set()
    for case in CASES:
        shown = shown.union(*explained(case, reference, observed(asked_all, reference, case)).values())
    assert {name for name, row in LISTED.items() if reference in row.references} == shown


def test_the_page_is_complete() -> None:
    assert LISTED.keys() == RULES.keys()
    for row in LISTED.values():
        assert row.aspects, row.id
        assert len(row.cells) == 3, row.id
        assert all(row.cells), row.id


def test_every_argument_and_key_has_a_case() -> None:
    arguments = [name for name in inspect.signature(mlfleet.run).parameters if name != "uri"][:15]
    given = {name for case in CASES for name in case.arguments} | {"experiment_id"}
    assert set(arguments) <= given
    text = "\n".join(case.mlproject or "" for case in CASES)
    missing = [key for key in KEYS if not re.search(rf"\b{key}:", text)]
    assert not missing
    assert len({case.name for case in CASES}) == len(CASES)
