"""Cases of where projects come from, of MLproject, and of entry points."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from components.git_repository import git
from parity.case import SIMPLE, Case, entry_point
from parity.places import Place

__all__ = ["CASES"]


def zipped(place: Place) -> None:
    """``@case/project.zip``, which is served, too."""
    path = place.folder / "project.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(place.project.rglob("*")):
            archive.write(file, file.relative_to(place.project))
    place.ground.files.files["/" + "/".join([*place.folder.parts[-2:], path.name])] = path.read_bytes()


def zipped_below(place: Place) -> None:
    """``@case/project.zip`` with all its members below one folder, as GitHub makes zips."""
    with zipfile.ZipFile(place.folder / "project.zip", "w") as archive:
        for file in sorted(place.project.rglob("*")):
            archive.write(file, Path("project-main", file.relative_to(place.project)))


def broken_zip(place: Place) -> None:
    (place.folder / "project.zip").write_bytes(b"no zip")


def environment_beside(place: Place) -> None:
    (place.folder / "a.yaml").write_text("python: '3.11'\n")


def repository(place: Place) -> None:
    """``@case/repo.git``, served as ``@git/repo.git``: the project, changed on the branch ``work``, tagged ``v1``."""
    folder = place.project
    git(folder, "init", "--quiet", "--initial-branch=main", ".")
    git(folder, "remote", "add", "origin", f"{place.words['@git']}/repo.git")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "first", "--date", "2024-01-01T00:00:00Z")
    git(folder, "tag", "v1")
    place.words["@first"] = git(folder, "rev-parse", "HEAD")
    place.words["@short"] = place.words["@first"][:8]
    git(folder, "checkout", "--quiet", "-b", "work")
    (folder / "more.txt").write_text("more\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "second")
    place.words["@second"] = git(folder, "rev-parse", "HEAD")
    git(folder, "checkout", "--quiet", "main")
    git(place.folder, "clone", "--quiet", "--bare", str(folder), "repo.git")
    git(place.folder / "repo.git", "remote", "remove", "origin")
    # A checkout where git's own default branch has another name must not matter.
    git(place.folder / "repo.git", "symbolic-ref", "HEAD", "refs/heads/main")


def renamed(name: str) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        place.project.rename(place.folder / name)

    return prepare


SUB = {"sub/dir/MLproject": entry_point("echo below"), "v1.0/MLproject": entry_point("echo of a version")}
SHOW = entry_point("git log --format=%s; ls")

URIS = [
    Case("uri-folder"),
    Case("uri-relative", uri="project"),
    Case("uri-path", ("path-objects",), as_paths=True),
    Case("uri-file", ("source-name",), uri="file://@project"),
    Case("uri-file-escaped", ("file-uri-escapes",), uri="file://@case/a%20b", prepare=renamed("a b")),
    Case("uri-quoted", ("source-name",), uri="'@project'"),
    Case("uri-subfolder", files=SUB, uri="@project#sub/dir"),
    Case("uri-file-subfolder", ("source-name",), files=SUB, uri="file://@project#sub/dir"),
    Case("uri-subfolder-with-dot", ("subfolder-dots",), files=SUB, uri="@project#v1.0"),
    Case("uri-subfolder-escapes", uri="@project/sub#../dir", files=SUB),
    Case("uri-subfolder-missing", uri="@project#nowhere"),
    Case("uri-missing", uri="@case/nowhere"),
    Case("uri-zip", ("folder-named",), uri="@case/project.zip", prepare=zipped),
    Case("uri-zip-subfolder", ("folder-named",), uri="@case/project.zip#sub/dir", files=SUB, prepare=zipped),
    Case("uri-zip-one-folder", ("zip-folder-entered",), uri="@case/project.zip", prepare=zipped_below),
    Case("uri-zip-file", ("folder-named", "source-name"), uri="file://@case/project.zip", prepare=zipped),
    Case("uri-zip-http", ("folder-named",), uri="@files/project.zip", prepare=zipped),
    Case("uri-zip-broken", uri="@case/project.zip", prepare=broken_zip),
    Case("uri-git", ("folder-named",), mlproject=SHOW, uri="@git/repo.git", prepare=repository),
    Case(
        "uri-git-subfolder",
        ("folder-named",),
        files=SUB,
        uri="@git/repo.git#sub/dir",
        arguments={"version": "v1"},
        prepare=repository,
    ),
    Case("uri-git-missing", uri="@git/nowhere.git"),
    Case("uri-git-bare", ("bare-repository",), mlproject=SHOW, uri="file://@case/repo.git", prepare=repository),
    Case("uri-checkout", mlproject=SHOW, prepare=repository),
    Case("uri-checkout-subfolder", ("source-name-subfolder",), files=SUB, uri="@project#sub/dir", prepare=repository),
]

VERSIONS = [
    Case(
        "version-branch",
        ("folder-named",),
        uri="@git/repo.git",
        arguments={"version": "work"},
        mlproject=SHOW,
        prepare=repository,
    ),
    Case(
        "version-commit",
        ("folder-named",),
        uri="@git/repo.git",
        arguments={"version": "@second"},
        mlproject=SHOW,
        prepare=repository,
    ),
    Case(
        "version-short-commit",
        ("short-commits",),
        uri="@git/repo.git",
        arguments={"version": "@short"},
        prepare=repository,
    ),
    Case("version-unknown", uri="@git/repo.git", arguments={"version": "nowhere"}, prepare=repository),
    Case("version-of-folder", arguments={"version": "main"}),
    Case("version-of-zip", uri="@case/project.zip", arguments={"version": "main"}, prepare=zipped),
    Case(
        "version-of-checkout",
        ("version-of-checkout", "user-files-untouched"),
        arguments={"version": "work"},
        prepare=repository,
    ),
    Case(
        "version-of-bare",
        ("bare-repository", "user-files-untouched"),
        uri="file://@case/repo.git",
        arguments={"version": "work"},
        prepare=repository,
    ),
]

TWO = "name: two\nentry_points:\n  main: {command: echo main}\n  other: {command: echo other}\n"
PRINT = "import sys; print(sys.argv)\n"

ENTRY_POINTS = [
    Case("entry-point-named", mlproject=TWO, arguments={"entry_point": "other"}),
    Case("entry-point-unknown", mlproject=TWO, arguments={"entry_point": "another"}),
    Case("entry-point-python", files={"train.py": PRINT}, arguments={"entry_point": "train.py"}),
    Case("entry-point-in-folder", files={"steps/train.py": PRINT}, arguments={"entry_point": "steps/train.py"}),
    Case("entry-point-spaces", files={"my train.py": PRINT}, arguments={"entry_point": "my train.py"}),
    Case("entry-point-shell", files={"run.sh": "echo run"}, arguments={"entry_point": "run.sh"}),
    Case(
        "entry-point-shell-unset",
        files={"run.sh": "echo run"},
        arguments={"entry_point": "run.sh"},
        environ={"SHELL": None},
    ),
    Case("entry-point-r", files={"train.R": ""}, arguments={"entry_point": "train.R"}),
    Case(
        "entry-point-parameters",
        ("values-in-variables",),
        files={"train.py": PRINT},
        arguments={"entry_point": "train.py", "parameters": {"alpha": 0.5, "name": "a b"}},
    ),
    Case(
        "entry-point-number",
        ("entry-point-names",),
        mlproject="entry_points: {1: {command: echo hello}}\n",
        arguments={"entry_point": "1"},
    ),
    Case(
        "entry-point-yes",
        ("entry-point-names",),
        mlproject="entry_points: {yes: {command: echo hello}}\n",
        arguments={"entry_point": "yes"},
    ),
    Case("entry-point-script-missing", ("script-checked",), arguments={"entry_point": "nowhere.py"}),
    Case("entry-point-script-outside", ("script-inside",), arguments={"entry_point": "../train.py"}),
]

SPARK = "databricks_spark_job: {python_file: train.py, parameters: [a, b], python_libraries: [numpy]}\n"

MLPROJECT = [
    Case("mlproject-none", mlproject=None, files={"train.py": PRINT}, arguments={"entry_point": "train.py"}),
    Case("mlproject-lower-case", mlproject_name="mlproject"),
    Case("mlproject-upper-case", mlproject_name="MLPROJECT"),
    Case("mlproject-without-name", mlproject="entry_points: {main: {command: echo hello}}\n"),
    Case("mlproject-unknown-key", mlproject=SIMPLE + "author: me\n"),
    Case("mlproject-empty", ("empty-keys",), mlproject="", files={"a.py": ""}, arguments={"entry_point": "a.py"}),
    Case(
        "mlproject-empty-entry-points",
        ("empty-keys",),
        mlproject="name: a\nentry_points:\n",
        files={"a.py": ""},
        arguments={"entry_point": "a.py"},
    ),
    Case(
        "mlproject-empty-parameters",
        ("empty-keys",),
        mlproject="entry_points:\n  main:\n    parameters:\n    command: echo hello\n",
    ),
    Case(
        "mlproject-empty-parameter",
        ("empty-keys",),
        mlproject=entry_point("echo {a}", "a: "),
        arguments={"parameters": {"a": 1}},
    ),
    Case(
        "mlproject-no-command",
        ("no-run-left",),
        mlproject="entry_points: {main: {parameters: {a: float}}}\n",
        arguments={"parameters": {"a": 1}},
    ),
    Case("mlproject-key-twice", ("keys-once",), mlproject=SIMPLE + "name: again\n"),
    Case(
        "mlproject-parameter-twice",
        ("keys-once",),
        mlproject=entry_point("echo {a}", "a: float, a: string"),
        arguments={"parameters": {"a": 1}},
    ),
    Case("mlproject-not-yaml", mlproject="name: [\n"),
    Case("mlproject-wrong-type", mlproject="entry_points: [main]\n"),
    Case("mlproject-two-environments", mlproject=SIMPLE + "python_env: a.yaml\nconda_env: b.yaml\n"),
    Case("mlproject-python-env", mlproject=SIMPLE + "python_env: a.yaml\n", files={"a.yaml": "python: '3.11'\n"}),
    Case(
        "mlproject-python-env-outside",
        ("files-inside",),
        mlproject=SIMPLE + "python_env: ../a.yaml\n",
        prepare=environment_beside,
    ),
    Case("mlproject-python-env-missing", mlproject=SIMPLE + "python_env: a.yaml\n"),
    Case("mlproject-conda-env", mlproject=SIMPLE + "conda_env: a.yaml\n", files={"a.yaml": "dependencies: [python]\n"}),
    Case("mlproject-conda-env-missing", mlproject=SIMPLE + "conda_env: a.yaml\n"),
    Case("spark-job-file", ("spark-job-anywhere",), mlproject=SPARK, files={"train.py": PRINT}),
    Case("spark-job-entry-point", mlproject=SIMPLE + "databricks_spark_job: {python_libraries: [numpy]}\n"),
    Case("spark-job-nothing", mlproject="databricks_spark_job: {parameters: [a]}\n"),
    Case("spark-job-both", mlproject=SIMPLE + SPARK),
    Case("spark-job-environment", mlproject=SPARK + "python_env: a.yaml\n", files={"a.yaml": "{}"}),
    Case(
        "spark-job-path",
        mlproject=entry_point("echo {a}", "a: path") + "databricks_spark_job: {parameters: []}\n",
        arguments={"parameters": {"a": "."}},
    ),
]

CASES = [*URIS, *VERSIONS, *ENTRY_POINTS, *MLPROJECT]
