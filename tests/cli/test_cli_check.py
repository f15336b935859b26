"""``mlfleet check``: all mistakes and warnings of a project, by the real command line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from components.command_line import mlfleet
from components.projects import write_project


def found(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    """The exit code and the lines of the command in a folder."""
    done = mlfleet("check", *arguments, cwd=folder)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.splitlines()


def starts(lines: list[str]) -> list[str]:
    """The places and kinds of findings."""
    return [line.partition(" ")[0] + " " + line.split(": ")[1] for line in lines]


def test_every_mistake_of_all_entry_points_is_shown_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text("""\
name: demo
entrypoints: 3
docker_env:
  images: python
  volumes: 3
entry_points:
  main:
    parameters:
      alpha: {type: float, default: abc}
      ratio: integer
      unused: {type: string, defualt: x}
      data: [1]
      ratio: float
      ratio: int
    command: python train.py {alpha} {ratios} {data}
  other:
    parameters: {beta: [1]}
    comand: x
  third:
    command: [python]
""")
    code, lines = found(tmp_path)
    assert code == 2
    assert starts(lines) == [
        "MLproject:2:14: warning",
        "MLproject:4:3: error",
        "MLproject:4:11: warning",
        "MLproject:5:12: error",
        "MLproject:9: error",
        "MLproject:11: warning",
        "MLproject:11:39: warning",
        "MLproject:12:13: error",
        "MLproject:13:7: error",
        "MLproject:14: warning",
        "MLproject:14:7: error",
        "MLproject:15: error",
        "MLproject:17:5: error",
        "MLproject:17:24: error",
        "MLproject:18:13: warning",
        "MLproject:20:14: error",
    ]
    text = "\n".join(lines)
    assert "'entrypoints' is unknown and has no effect, did you mean 'entry_points'?" in text
    assert "'alpha': a number was expected, got 'abc'" in text
    assert "'unused' is declared, but the command does not use it" in text
    assert "the command uses {ratios}, and there is no such parameter, did you mean 'ratio'?" in text
    assert "the key 'ratio' is there twice" in text


def test_every_mistake_in_the_files_of_the_environment_is_shown(tmp_path: Path) -> None:
    write_project(tmp_path, "true", extra="python_env: python_env.yaml\n")
    (tmp_path / "python_env.yaml").write_text(
        "python: three\nbuild_depends: []\ndependencies:\n  - 3\n  - -r requirements.txt\n  - ./nowhere\n"
    )
    (tmp_path / "requirements.txt").write_text("numpy\nnot a requirement\n-r more.txt\n")
    code, lines = found(tmp_path)
    assert code == 2
    assert starts(lines) == [
        "python_env.yaml:1:9: error",
        "python_env.yaml:2:16: warning",
        "python_env.yaml:4:5: error",
        "python_env.yaml:6:5: error",
        "requirements.txt:2: error",
        "requirements.txt:3: error",
    ]


def test_every_mistake_in_pyproject_is_shown(tmp_path: Path) -> None:
    write_project(tmp_path, "true")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\nrequires-python = "3.x"\ndependencies = ["six", "six ==", 3]\n'
    )
    code, lines = found(tmp_path)
    assert code == 2
    assert starts(lines) == ["pyproject.toml:3: error", "pyproject.toml:4: error", "pyproject.toml:4: error"]


def test_a_file_of_the_environment_that_is_missing_is_named_with_the_nearest(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true", extra="conda_env: conda.yaml\n")
    (tmp_path / "demo" / "conda.yml").touch()
    code, [line] = found(tmp_path, "demo")
    assert (code, line) == (
        2,
        f"demo/MLproject:6:12: error: conda_env: there is no file '{uri}/conda.yaml', did you mean 'conda.yml'?",
    )


@pytest.mark.parametrize(
    ("files", "code", "line"),
    [
        ({"notes.txt": "", "pyproject.toml": ""}, 2, ".: error: there is no MLproject file; there is nothing to run"),
        (
            {"MLprojct": ""},
            2,
            ".: error: there is no MLproject file, did you mean 'MLprojct'?; there is nothing to run",
        ),
        (
            {"MLproject.yml": "", "a.py": ""},
            0,
            ".: warning: there is no MLproject file: rename 'MLproject.yml'; a run has to name a script, as in -e a.py",
        ),
        (
            {"MLproject": "name: x\n"},
            2,
            "MLproject: error: MLproject declares no entry points; there is nothing to run",
        ),
        (
            {"MLproject": "entry_points:\n\tmain: {command: x}\n"},
            2,
            "MLproject:2:1: error: not YAML: found character that cannot start any token while scanning for the next"
            " token; indent with spaces, YAML does not take tabs",
        ),
    ],
    ids=["nothing", "misspelt", "another name", "no entry points", "tabs"],
)
def test_the_first_mistakes_of_a_newcomer(tmp_path: Path, files: dict[str, str], code: int, line: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert found(tmp_path) == (code, [line])


def test_warnings_alone_exit_with_0_and_nothing_is_run_or_made(tmp_path: Path) -> None:
    uri = write_project(
        tmp_path / "demo",
        "touch ran; find . -name {name} -exec sh -c 'echo {text}' ; echo ${HOME} {{raw}} '{awk}'",
        parameters="name: path\ntext: string\nfile: {type: path, default: not-there}",
    )
    code, lines = found(tmp_path, uri)
    assert code == 0
    assert len(lines) == 3
    assert all(": warning: " in line for line in lines)
    assert "the command does not use it" in lines[0] + lines[1]
    assert "there is no file or folder" in lines[0] + lines[1]
    assert "some values cannot be given" in lines[2]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["MLproject", "demo"]


def test_a_project_in_git_and_the_settings_of_a_backend_are_checked(tmp_path: Path) -> None:
    write_project(tmp_path / "repo", "echo {a}", parameters="a: {type: int, default: one}")
    for arguments in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x"]):
        subprocess.run(["git", *arguments], cwd=tmp_path / "repo", check=True)
    subprocess.run(["git", "clone", "-q", "--bare", "repo", "bare.git"], cwd=tmp_path, check=True)
    template = tmp_path / "job.yaml"
    template.write_text("kind: Job\nkind: Job\n")
    config = json.dumps({"code-delivery": "none", "kube-job-template-path": str(template)})
    done = mlfleet("check", f"file://{tmp_path}/bare.git", "-b", "kubernetes", "-c", config, "--json", cwd=tmp_path)
    assert done.returncode == 2
    shown = [(each["path"], each["line"], each["kind"]) for each in json.loads(done.stdout)]
    assert shown == [("MLproject", 5, "error"), ("job.yaml", 2, "error")]


def test_a_backend_that_does_not_exist_is_a_mistake_of_the_call(tmp_path: Path) -> None:
    uri = write_project(tmp_path / "demo", "true")
    done = mlfleet("check", uri, "-b", "kubernets")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no backend 'kubernets'. Did you mean 'kubernetes'?" in done.stderr
