"""The documentation keeps what it says: links lead somewhere, code runs, every variable and option is named."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml

from components.mlflow_server import MlflowServer
from mlfleet import errors
from mlfleet._cli.program import _cli as cli
from mlfleet._cli.sweep_space import read_space
from mlfleet.backends.base import Backend

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md"), *ROOT.glob("benchmarks/*.md")]
)
TEST_VARIABLES = {
    "MLFLEET_REQUIRE_ALL",
    "MLFLEET_TEST_CONTEXT",
    "MLFLEET_TEST_IMAGE",
    "MLFLEET_TEST_KUBECONFIG",
}
"""Read by the tests only."""

_PUBLIC = ("mlfleet", "mlfleet.tracking", "mlfleet.backends.base", "mlfleet.testing", "mlfleet.asgi", "mlfleet.otel")
_SOURCE = "https://github.com/mlfleet/mlfleet/tree/main/"
_FENCE = re.compile(r"^ *```(?P<info>[^\n]*)\n(?P<text>.*?)^ *```$", re.M | re.S)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_VARIABLE = re.compile(r"\b(?:MLFLOW|MLFLEET)_[A-Z0-9_]*[A-Z0-9]\b")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code on a page."""

    page: Path
    line: int
    info: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(info: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _FENCE.finditer(text):
            if match["info"] == info:
                found.append(Block(page, text.count("\n", 0, match.start()) + 1, info, textwrap.dedent(match["text"])))
    return found


def parametrized(*kinds: str) -> pytest.MarkDecorator:
    found = [block for kind in kinds for block in blocks(kind)]
    return pytest.mark.parametrize("block", found, ids=[block.name for block in found])


def command_lines(block: Block) -> list[list[str]]:
    """Every call of mlfleet in a block for bash, without its name."""
    calls = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for position, word in enumerate(words):
            if word == "mlfleet" and "install" not in words[:position][-2:]:
                rest = words[position + 1 :]
                end = next((index for index, each in enumerate(rest) if each in ("&&", "|", ">", ";")), len(rest))
                calls.append(rest[:end])
    return calls


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sources() -> str:
    return "\n".join(path.read_text() for path in sorted(ROOT.glob("src/**/*.py")))


def commands(group: click.Group, prefix: str = "mlfleet") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{prefix} {name}")
        else:
            found[f"{prefix} {name}"] = command
    return found


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    for match in _LINK.finditer(_FENCE.sub("", page.read_text())):
        target, _, anchor = match["target"].partition("#")
        if target.startswith(_SOURCE):
            assert (ROOT / target.removeprefix(_SOURCE)).exists(), f"{match['target']} does not exist"
        if "://" in target:
            continue
        file = (page.parent / target) if target else page
        assert file.exists(), f"{match['target']} does not exist"
        assert file.resolve().is_relative_to(ROOT), f"{match['target']} leads out of the repository"
        if anchor:
            assert anchor in anchors(file), f"{match['target']} names no heading"


def test_every_page_is_in_the_index_and_in_the_tree_of_the_site() -> None:
    folder = ROOT / "docs"
    index = (folder / "index.md").read_text()
    tree = re.findall(r"^[\w/-]+$", "".join(re.findall(r"^```{toctree}\n(.*?)^```$", index, re.M | re.S)), re.M)
    pages = [str(page.relative_to(folder)) for page in folder.rglob("*.md") if page.name != "index.md"]
    assert sorted(f"{name}.md" for name in tree) == sorted(pages)
    for page in pages:
        assert f"({page})" in index, page


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    found = {
        (module, name)
        for module, text in re.findall(r"currentmodule:: (\S+)\n(.*?)```", page, re.DOTALL)
        for name in re.findall(r"^\.\. auto\w+:: (\w+)$", text, re.MULTILINE)
    }
    public = {(name, each) for name in _PUBLIC for each in importlib.import_module(name).__all__}
    assert found == public - {("mlfleet", "__version__")}


def test_every_logger_is_documented_and_knows_the_runs_of_its_records() -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    for name in set(re.findall(r'get_logger\("(mlfleet\..+?)"\)', sources())):
        assert f"`{name}`" in page, name
    assert 'logging.getLogger("mlfleet.' not in sources(), "use mlfleet._run_log.get_logger"


@parametrized("python", "python no-run")
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``examples/quickstart`` is a project with the same parameters that trains nothing."""
    folder = tmp_path_factory.mktemp("docs")
    project = folder / "examples" / "quickstart"
    project.mkdir(parents=True)
    spec = yaml.safe_load((ROOT / "examples" / "quickstart" / "MLproject").read_text())
    del spec["python_env"]
    spec["entry_points"]["main"]["command"] = "echo trained with {alpha} {l1_ratio} {epochs}"
    (project / "MLproject").write_text(yaml.safe_dump(spec))
    return folder


@pytest.mark.timeout(120)  # the first of them builds an environment, on a machine that may be busy
@parametrized("python")
def test_python_runs(block: Block, workplace: Path, mlflow_server: MlflowServer, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(block.text)
    variables = {"MLFLOW_TRACKING_URI": mlflow_server.url, "MLFLOW_ENV_ROOT": str(workplace / "envs")}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=workplace, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


@parametrized("yaml")
def test_yaml_is_valid(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)


@parametrized("bash")
def test_command_lines_are_understood(block: Block) -> None:
    for arguments in command_lines(block):
        command: click.Command = cli
        context = click.Context(cli, info_name="mlfleet")
        while isinstance(command, click.Group):
            name, *arguments = arguments
            if name.startswith("-"):
                break
            found = command.get_command(context, name)
            assert found is not None, f"there is no command {name}"
            command = found
        else:
            options = command.make_context("mlfleet", arguments, parent=context).params
            if command.name == "sweep" and options["points"] is None:
                read_space(options["param_list"], draws=options["draws"], seed=options["seed"])


def test_the_pages_have_blocks_to_check() -> None:
    assert len(blocks("python")) >= 5
    assert sum(len(command_lines(block)) for block in blocks("bash")) >= 5


def test_the_readme_has_its_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "pip install '.[mlflow]' && mlfleet run examples/quickstart -P alpha=0.5" in lines
    assert "pip install -e '.[dev]' && pytest" in lines


def test_every_variable_is_documented() -> None:
    page = (ROOT / "docs" / "environment-variables.md").read_text()
    undocumented = set(_VARIABLE.findall(sources())) - set(_VARIABLE.findall(page))
    assert not undocumented


def test_every_documented_variable_exists() -> None:
    known = set(_VARIABLE.findall(sources())) | TEST_VARIABLES
    for page in PAGES:
        assert set(_VARIABLE.findall(page.read_text())) <= known, page.name


def test_every_difference_of_the_blocking_shim_names_its_test() -> None:
    page = (ROOT / "docs" / "blocking.md").read_text()
    rows = page.partition("| seen in |\n")[2].partition("\n\n")[0].splitlines()[1:]
    tests = (ROOT / "tests" / "test_sync.py").read_text()
    assert rows
    for row in rows:
        named = re.fullmatch(r"`(test_\w+)`", row.rstrip(" |").rpartition("|")[2].strip())
        assert named, row
        assert f"def {named[1]}(" in tests, row


def test_every_command_is_described() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    for name in commands(cli):
        assert name in page


def test_the_layers_of_the_design_are_those_that_import_linter_checks() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in settings if contract["type"] == "layers"]
    page = (ROOT / "docs" / "design.md").read_text()
    table = page.partition("| layer | subject |\n| --- | --- |\n")[2].partition("\n\n")[0]
    shown = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()]
    assert shown == [re.findall(r"mlfleet\.(\w+)", layer) for layer in layers]


def test_the_modules_that_the_design_names_exist() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    for path in re.findall(r"`([\w/]+\.py)`", page):
        assert (ROOT / "src" / "mlfleet" / path).exists(), path


def test_authors_of_backends_find_every_method_and_attribute() -> None:
    page = (ROOT / "docs" / "writing-a-backend.md").read_text()
    for name in vars(Backend):
        if not name.startswith("_"):
            assert re.search(rf"\b{name}\b", page), name


def test_every_error_is_documented() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    for name in errors.__all__:
        assert name in page
