"""The differences that docs/differences.md lists, and how each of them is recognised.

The page says where each is seen and with which mlflow. The functions recognise it, so that neither the page nor the
behaviour can change without the other.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mlfleet._project.command import substitute
from parity.observing import Observed

__all__ = ["EVERYWHERE", "RULES", "Listed", "read_page"]

Rule = Callable[[str, Observed, Observed], bool]
"""A function that returns True if it recognises the difference: given an aspect and both observations."""

_ROW = re.compile(r"^\| `(?P<id>[a-z0-9-]+)` \| (?P<mlflow>[^|]+) \| (?P<seen>[^|]+) \|(?P<rest>.*)\|$")


@dataclass(frozen=True)
class Listed:
    """A row of the page.

    Attributes:
        id: The id of the difference.
        references: The versions of mlflow that show it, as in ``sides.REFERENCES``.
        aspects: Patterns of the aspects that show it.
        cells: The cells about mlflow, about mlfleet, and about the reason.
    """

    id: str
    references: frozenset[str]
    aspects: tuple[str, ...]
    cells: tuple[str, ...]

    def covers(self, reference: str, aspect: str) -> bool:
        return reference in self.references and any(fnmatchcase(aspect, pattern) for pattern in self.aspects)


def read_page(page: Path, references: Iterable[str]) -> dict[str, Listed]:
    """Return the rows of all tables of the page, by id."""
    found: dict[str, Listed] = {}
    for line in page.read_text().splitlines():
        if match := _ROW.match(line):
            named = match["mlflow"].strip()
            listed = Listed(
                match["id"],
                frozenset(references) if named == "all" else frozenset({named}),
                tuple(re.findall(r"`([^`]+)`", match["seen"])),
                tuple(cell.strip() for cell in match["rest"].split("|")),
            )
            assert listed.id not in found, f"{listed.id} is listed twice"
            found[listed.id] = listed
    return found


# ---- what differs ---------------------------------------------------------------------------------------------------


def _works(error: str) -> Rule:
    """Recognise that mlflow raises `error` and mlfleet runs the project."""
    return lambda aspect, theirs, ours: error in _raised(theirs) and not ours.error and ours["runs"] == "FINISHED"


def _refuses(error: str) -> Rule:
    """Recognise that mlflow makes a run and mlfleet raises `error` before it makes one."""
    return lambda aspect, theirs, ours: error in ours.error and ours["runs"] == "none" and theirs["runs"] in _ENDED


def _only_ours(aspect: str, theirs: Observed, ours: Observed) -> bool:
    return aspect not in theirs.aspects and aspect in ours.aspects


def _raised(observed: Observed) -> str:
    return f"{observed.classes[0]}: {observed.error}" if observed.classes else ""


_ENDED = ("FINISHED", "FAILED")


def _quoted(aspect: str, theirs: Observed, ours: Observed) -> bool:
    return theirs[aspect] == shlex.quote(ours[aspect])


def _left_running(aspect: str, theirs: Observed, ours: Observed) -> bool:
    return bool(theirs.error) and theirs["runs"] == "RUNNING" and ours["runs"] in ("none", "FAILED")


def _activated(aspect: str, theirs: Observed, ours: Observed) -> bool:
    if aspect == "command":
        return re.fullmatch(r"source \S+/bin/activate && " + re.escape(ours[aspect]), theirs[aspect]) is not None
    return _own_environment(aspect, theirs, ours)


def _own_environment(aspect: str, theirs: Observed, ours: Observed) -> bool:
    """Recognise that only mlfleet runs the command in an environment that was built for it."""
    root = ours["variables VIRTUAL_ENV"]
    return bool(root) and (aspect != "variables PATH" or ours[aspect] == f"{root}/bin:{theirs[aspect]}")


def _uv_ignored(aspect: str, theirs: Observed, ours: Observed) -> bool:
    if aspect == "tags mlflow.project.env":
        return _only_ours(aspect, theirs, ours) and ours[aspect] == "uv"
    return _own_environment(aspect, theirs, ours)


def _untouched(aspect: str, theirs: Observed, ours: Observed) -> bool:
    return ours[aspect] == "" and ".git" in theirs[aspect]


def _own_end(aspect: str, theirs: Observed, ours: Observed) -> bool:
    """Recognise that mlflow's status follows the exit code, and mlfleet's the worse status that the code has set."""
    return (theirs["exit code"], theirs["runs"]) == ("0", "FINISHED") and ours["runs"] in ("FAILED", "KILLED")


def _image_name(aspect: str, theirs: Observed, ours: Observed) -> bool:
    if aspect == "tags mlflow.docker.image.uri":
        return re.fullmatch(re.escape(theirs[aspect]) + ":[0-9a-f]{16}", ours[aspect]) is not None
    return ours[aspect].startswith("sha256:")


def _file_of_build(aspect: str, theirs: Observed, ours: Observed) -> bool:
    return theirs[aspect].split() == ["Dockerfile.mlflow-autogenerated", *ours[aspect].split()]


def _in_container(aspect: str, theirs: Observed, ours: Observed) -> bool:
    return not ours.error and ours["container second"] == "second" and theirs["runs"] == "FAILED"


def _config_untouched(aspect: str, theirs: Observed, ours: Observed) -> bool:
    """Recognise that mlflow adds keys for plugins to the caller's mapping, or that the test's plugin emptied it."""
    return "ENV_MANAGER" not in ours[aspect] and ("ENV_MANAGER" in theirs[aspect] or theirs[aspect] == "{}")


def _command_is(command: str) -> Rule:
    return lambda aspect, theirs, ours: ours["command"] == command


_OPTIONS = (
    ("echo True --note ''", "echo --flag "),
    ("echo --tags '[1,2]'", "echo --tags 1 --tags 2"),
)

EVERYWHERE = frozenset(
    [
        "driver-marker",
        "error-classes",
        "legacy-git-tags",
        "own-tags",
        "parameters-raw",
        "storage-removed",
        "temporary-files",
    ]
)
"""The differences that cases need not name."""

RULES: dict[str, Rule] = {
    # Everywhere
    "own-tags": _only_ours,
    "driver-marker": _only_ours,
    "temporary-files": lambda aspect, theirs, ours: (theirs[aspect], ours[aspect]) == ("left", ""),
    "storage-removed": lambda aspect, theirs, ours: (theirs[aspect], ours[aspect]) == ("left", ""),
    "parameters-raw": _quoted,
    "error-classes": lambda aspect, theirs, ours: "MlfleetError" in ours.classes,
    "legacy-git-tags": lambda aspect, theirs, ours: theirs[aspect] != "" and aspect not in ours.aspects,
    "no-run-left": _left_running,
    # Projects
    "file-uri-escapes": _works("does not appear to be a git repository"),
    "source-name": lambda aspect, theirs, ours: theirs[aspect] in (f"'{ours[aspect]}'", f"@case/file:{ours[aspect]}"),
    "source-name-subfolder": lambda aspect, theirs, ours: ours[aspect] == f"file://{theirs[aspect]}",
    "subfolder-dots": _works("'.' is not allowed"),
    "folder-named": lambda aspect, theirs, ours: theirs[aspect] == re.sub("@folder/[^/]+", "@folder", ours[aspect]),
    "bare-repository": _works("ExecutionException"),
    "short-commits": _works("couldn't find remote ref"),
    "version-of-checkout": _refuses("a version can be given only for a Git repository"),
    "user-files-untouched": _untouched,
    # MLproject and entry points
    "zip-folder-entered": _works("among entry points"),
    "path-objects": _works("'PosixPath' object has no attribute 'strip'"),
    "entry-point-names": _works("among entry points ["),
    "keys-once": _refuses("twice"),
    "script-checked": _refuses("there is no entry point"),
    "script-inside": _refuses("is outside the project"),
    "files-inside": _refuses("is outside of the project's repository"),
    "lists-found": _refuses("requirements.txt, line 1: there is no package at './nowhere'"),
    "empty-keys": _works("AttributeError: 'NoneType'"),
    "spark-job-anywhere": _works("AttributeError: 'NoneType' object has no attribute 'compute_command'"),
    # Parameters and the command
    "types-checked": _refuses("was expected, got '"),
    "options-rendered": lambda aspect, theirs, ours: (theirs[aspect], ours[aspect]) in _OPTIONS,
    "plain-values": _refuses("a string, a number, a boolean or a path was expected"),
    "path-default-in-project": _works("no such file"),
    "http-downloads": _works("ValueError: not enough values to unpack"),
    "extra-names-logged": _works("Invalid value \"'a b'\""),
    "values-in-variables": lambda aspect, theirs, ours: substitute(ours[aspect]) == shlex.split(theirs[aspect]),
    "extra-names-quoted": _command_is("__mlfleet_1='a b'; echo hello --\"${__mlfleet_1}\" 1"),
    "quoted-in-place": lambda aspect, theirs, ours: (
        ours[aspect]
        in (
            "__mlfleet_1='x y'; echo \"is ${__mlfleet_1}\"",
            "__mlfleet_1='$(date)'; echo 'is '\"${__mlfleet_1}\"''",
        )
    ),
    "braces-stay": _works("KeyError: "),
    "format-specs": _command_is("echo {a:5}."),
    "extra-after-backslash": _refuses("backslash"),
    "extra-after-newline": _command_is("echo hello --a 1"),
    # Runs
    "status-of-user-code": _own_end,
    "existing-run-described": _only_ours,
    "existing-run-parameters": lambda aspect, theirs, ours: "Changing param values is not allowed" in ours.error,
    "leftovers-ended": lambda aspect, theirs, ours: (theirs[aspect], ours[aspect]) == ("left", ""),
    "cancel-told": lambda aspect, theirs, ours: (theirs["runs"], ours["runs"]) == ("RUNNING", "KILLED"),
    "asynchronous-parameters": _works("AttributeError: 'NoneType' object has no attribute 'items'"),
    # Backends and environments
    "backend-config-checked": _refuses("takes no configuration"),
    "backend-config-untouched": _config_untouched,
    "plugin-own-run": lambda aspect, theirs, ours: ours["runs"] == f"{theirs['runs']}, {theirs['runs']}",
    "pyenv-not-needed": _works("FileNotFoundError: [Errno 2] No such file or directory: 'None'"),
    "environment-entered": _activated,
    "own-environment": lambda aspect, theirs, ours: ours[aspect] == f"@venv/bin:{theirs[aspect]}",
    "uv-ignored": _uv_ignored,
    # Docker
    "docker-engine-api": lambda aspect, theirs, ours: theirs[aspect].startswith("docker run --rm") and not ours[aspect],
    "docker-init": lambda aspect, theirs, ours: "container folder" in ours.aspects,
    "docker-name": _works("Project name in MLProject must be specified"),
    "docker-args-values": _works("expected str instance"),
    "docker-args-checked": _refuses("has no flag"),
    "docker-values-quoted": lambda aspect, theirs, ours: ours["container variables COPIED"] == "a b" and not ours.error,
    "docker-values-as-written": lambda aspect, theirs, ours: "$" in ours[aspect] and "$" not in theirs[aspect],
    "docker-shell": _in_container,
    "docker-auth-when-needed": _works("/auth: Internal Server Error"),
    "docker-image-name": _image_name,
    "docker-build-file": _file_of_build,
}
