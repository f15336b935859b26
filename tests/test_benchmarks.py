import json
import subprocess
import sys
from pathlib import Path

import pytest

from components.event_loops import LOOPS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def table(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCHMARKS / "table.py", *arguments], capture_output=True, text=True)


def test_the_table_of_figures_is_made_from_the_result_files() -> None:
    checked = table("--check")
    assert (checked.returncode, checked.stderr) == (0, "")


def test_every_result_file_has_the_form_that_the_scripts_write() -> None:
    for path in (BENCHMARKS / "results").glob("*.json"):
        result = json.loads(path.read_text())
        assert result.keys() == {"name", "figures", "python", "cpus", "rounds"}, path
        assert all(each.keys() == {"value", "limit"} for each in result["figures"].values()), path


def test_a_changed_figure_shows_in_the_table_and_one_above_its_limit_is_marked(tmp_path: Path) -> None:
    figures = {
        "import mlfleet / import mlflow.projects": {"value": 0.25, "limit": 0.15},
        "mlfleet --help / mlflow run --help": {"value": 0.0712, "limit": None},
    }
    result = {"name": "startup", "figures": figures, "python": "3.13.1", "cpus": 2, "rounds": 9}
    (tmp_path / "startup.json").write_text(json.dumps(result))
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table.py: begin -->\nold\n<!-- table.py: end -->\nafter\n")
    places = ("--results", str(tmp_path), "--readme", str(page))
    assert table("--check", *places).returncode == 1
    assert table(*places).returncode == 0
    assert table("--check", *places).returncode == 0
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert "| import mlfleet / import mlflow.projects | **0.25** (above) | 0.15 | `startup` | 3.13.1 | 2 | 9 |" in lines
    assert "| mlfleet --help / mlflow run --help | 0.0712 |  | `startup` | 3.13.1 | 2 | 9 |" in lines
    assert "| Kubernetes: watches | not recorded | 2 |  |  |  |  |" in lines


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_random_operations_leave_nothing_and_end_with_the_right_statuses(loop: str) -> None:
    script = BENCHMARKS / "random_operations.py"
    driven = subprocess.run(
        [
            sys.executable,
            "-X",
            "dev",
            "-W",
            "error",
            script,
            *f"--operations 120 --drivers 2 --seed 1 --loop {loop}".split(),
        ],
        capture_output=True,
        text=True,
    )
    assert driven.returncode == 0, driven.stderr
    assert driven.stdout.splitlines()[-1].endswith("nothing is left")
