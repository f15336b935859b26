"""Checks and resolves the parameters of a run."""

from __future__ import annotations

import difflib
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Number
from pathlib import Path, PurePath
from urllib.parse import unquote, urlsplit

from mlfleet._project.lists import format_list, parse_list
from mlfleet._project.spec import EntryPoint, Parameter
from mlfleet._run_log import get_logger, warn_once
from mlfleet._text.masking import mask_query
from mlfleet._text.plain import UNENCODABLE
from mlfleet.errors import FetchError, ParameterError

__all__ = ["Download", "ResolvedParameters", "is_true", "resolve"]

# RFC 3986, 3.1.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_log = get_logger("mlfleet.project")
# What MLflow takes as the name of a parameter (mlflow/utils/validation.py, _validate_param_name).
_NAME = re.compile(r"[/\w.\- :]+")
_LONGEST_NAME = 250
_PLAIN = "a string, a number, a boolean or a path was expected"
_WHOLE = re.compile(r"[+-]?[0-9]+")
# As in YAML.
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True)
class Download:
    """A ``path`` parameter that names a remote URI.

    Attributes:
        name: The name of the parameter.
        uri: The URI to download.
        index: The number in ``param_<index>``, the sub-folder of the run's storage folder.
    """

    name: str
    uri: str
    index: int

    def failed(self, reason: str | Exception) -> FetchError:
        """Return the error that says why it could not be downloaded, without the secrets of its URI."""
        if isinstance(reason, Exception):
            reason = f"{type(reason).__name__}: {reason}"
        uri, text = mask_query(self.uri), mask_query(reason)[:500]
        return FetchError(f"{uri} of the parameter {self.name!r} cannot be downloaded: {text}", uri=uri)


@dataclass(frozen=True, slots=True)
class ResolvedParameters:
    """All parameters of a run.

    Attributes:
        logged: Name → raw text for MLflow, of declared and extra parameters.
        declared: Name → text for the command. Those in `downloads` still hold their URI.
        extra: The undeclared parameters, appended to the command as ``--name value``, in this order.
        downloads: The files to download before the command can be rendered.
        placed: Text for the command → value, of the ``path`` parameters whose files are elsewhere.
        lists: Name → items, of the declared parameters of the type ``list``.
    """

    logged: Mapping[str, str]
    declared: Mapping[str, str]
    extra: Mapping[str, str]
    downloads: tuple[Download, ...] = ()
    placed: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def resolve(
    entry_point: EntryPoint,
    given: Mapping[str, object] | None,
    place: Callable[[str, int], str | None] = lambda path, index: None,
    *,
    project_dir: Path | None = None,
) -> ResolvedParameters:
    """Check `given` against what the entry point declares. It reads the disk only to check that local paths exist.

    Values are texts, numbers, booleans and paths, which count as what ``str()`` makes of them, and lists of these where
    the type is ``list``. A relative path is
    relative to the caller's working directory, as in the reference. Only a default that does not exist there is looked
    for in the project, too: its author cannot know the folders of callers.

    Args:
        entry_point: The entry point with its declared parameters.
        given: Name → value.
        place: A function that takes the URI or absolute path of a ``path`` parameter and its index, and returns the
            text for the command if the command finds the file elsewhere than on this machine. Its ValueError says why
            it cannot.
        project_dir: The folder of the project, in which the command will run; None: defaults are not looked for there.

    Raises:
        ParameterError: Parameters are missing or wrong; the text names all of them.
    """
    faults: dict[str, str] = {}
    texts = _texts(given or {}, faults, entry_point)
    extra = {name: text for name, text in texts.items() if name not in entry_point.parameters}
    logged: dict[str, str] = {}
    declared: dict[str, str] = {}
    downloads: list[Download] = []
    placed: dict[str, str] = {}
    missing: list[str] = []
    for index, parameter in enumerate(entry_point.parameters.values()):
        text = texts.get(parameter.name, parameter.default)
        if parameter.name in faults:
            continue
        if text is None and parameter.default_error is not None:
            faults[parameter.name] = parameter.default_error
            continue
        if text is None:
            missing.append(parameter.name)
            continue
        if (refusal := _refusal(parameter.name)) is not None:
            faults[parameter.name] = refusal
            continue
        logged[parameter.name] = text
        if parameter.optional and not text:
            declared[parameter.name] = text
            continue
        if parameter.name not in texts and _is_in_project(parameter, project_dir):
            # As it is: the command runs in the project's folder, or in a copy of it.
            declared[parameter.name] = text
            continue
        try:
            there = place(_uri_or_path(text), index) if parameter.type == "path" else None
            declared[parameter.name] = _checked(parameter, text) if there is None else there
        except ValueError as error:
            faults[parameter.name] = str(error)
            continue
        if there is not None:
            placed[there] = text
        elif parameter.type == "path" and _is_remote(text):
            downloads.append(Download(parameter.name, text, index))
    _raise_faults(entry_point, missing, faults, extra)
    hints = _misspelt([name for name in declared if name not in texts], extra)
    if hints:
        text = "%s The entry point %r does not declare it: it goes to the command as one more option"
        warn_once(_log, text, hints, entry_point.name)
    return ResolvedParameters(logged | extra, declared, extra, tuple(downloads), placed, _lists(entry_point, declared))


def _lists(entry_point: EntryPoint, declared: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: parse_list(text) for name, text in declared.items() if entry_point.parameters[name].type == "list"}


def _texts(given: Mapping[str, object], faults: dict[str, str], entry_point: EntryPoint) -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, value in given.items():
        name = str(key)
        declared = entry_point.parameters.get(name)
        if not name or UNENCODABLE.search(name):
            faults[name] = "this cannot be the name of a parameter"
            continue
        if (refusal := _refusal(name)) is not None:
            faults[name] = refusal
            continue
        try:
            if isinstance(value, list | tuple):
                if declared is None or declared.type != "list":
                    raise ValueError(
                        f"{_PLAIN}, got {type(value).__name__} (several values need `type: list` in MLproject)"
                    )
                texts[name] = format_list([_text(item) for item in value])
            else:
                texts[name] = _text(value)
        except ValueError as error:
            faults[name] = str(error)
    return texts


def _text(value: object) -> str:
    """Return the text of a plain value; a ValueError says what is wrong with it."""
    if not isinstance(value, str | Number | PurePath):
        raise ValueError(f"{_PLAIN}, got {'nothing' if value is None else type(value).__name__}")
    text = str(value)
    if UNENCODABLE.search(text):
        raise ValueError("the value holds a NUL character or half a character, which no command can")
    return text


def _refusal(name: str) -> str | None:
    """Return why MLflow would not log a parameter of that name; None if it does."""
    if not _NAME.fullmatch(name):
        return "MLflow takes letters, digits, spaces and _ - . : / in the names of parameters, and nothing else"
    if posixpath.normpath(name) != name or name.startswith(("/", "..")) or name == ".":
        return "MLflow does not take names of parameters that are paths written in another way than the shortest"
    if len(name) > _LONGEST_NAME:
        return f"the name is {len(name)} characters long, and MLflow takes {_LONGEST_NAME}"
    return None


def _checked(parameter: Parameter, text: str) -> str:
    """Return the text for the command; a ValueError says what is wrong with the value."""
    match parameter.type:
        case "float":
            try:
                float(text)
            except ValueError:
                raise ValueError(f"a number was expected, got {_shown(text)}") from None
        case "int" if not _WHOLE.fullmatch(text.strip()):
            raise ValueError(f"a whole number was expected, got {_shown(text)}")
        case "bool":
            is_true(text)
        case "list":
            parse_list(text)
        case "uri":
            if not _SCHEME.match(text):
                raise ValueError(f"a URI such as s3://bucket/key was expected, got {_shown(text)}")
        case "path" if not _is_remote(text):
            path = _uri_or_path(text)
            if not _exists(path):
                raise ValueError(f"there is no file or folder {path!r}")
            return path
    return text


def is_true(text: str) -> bool:
    """Return the value of a parameter of the type ``bool``; a ValueError says that it is none."""
    known = _BOOLEANS.get(text.strip().lower())
    if known is None:
        raise ValueError(f"true or false was expected, got {_shown(text)}")
    return known


def _uri_or_path(text: str) -> str:
    """Return a URI as it is; of anything else the absolute path."""
    if _is_remote(text):
        return text
    path = text
    if text[:5].lower() == "file:":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"the URI {_shown(text)} is on another machine; leave its host out: file:///path")
        path = unquote(parts.path)
    if not path:
        raise ValueError("a file or folder was expected, got an empty text")
    return os.path.abspath(path)  # noqa: PTH100 - as the reference: without the dots, links kept


def _is_in_project(parameter: Parameter, project_dir: Path | None) -> bool:
    """Return True if the default of a ``path`` parameter can only mean a file of the project."""
    text = parameter.default
    if parameter.type != "path" or project_dir is None or not text or _SCHEME.match(text) or Path(text).is_absolute():
        return False
    if _exists(text):
        return False
    try:
        file = (project_dir / text).resolve()
        return file.exists() and file.is_relative_to(project_dir.resolve())
    except (OSError, RuntimeError, ValueError):
        return False


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _is_remote(text: str) -> bool:
    scheme = _SCHEME.match(text)
    return scheme is not None and scheme[0].lower() != "file:"


def _shown(text: str) -> str:
    text = mask_query(text)
    return repr(text if len(text) <= 200 else text[:200] + "...")


def _raise_faults(entry_point: EntryPoint, missing: list[str], faults: Mapping[str, str], extra: Iterable[str]) -> None:
    parts = []
    if missing:
        names = ", ".join(repr(name) for name in missing)
        hints = _misspelt(missing, extra)
        parts.append(f"no value is given for {names}" + (f" ({hints})" if hints else ""))
    parts += [f"{name!r}: {fault}" for name, fault in faults.items()]
    if parts:
        raise ParameterError(
            f"the parameters of the entry point {entry_point.name!r} are wrong: {'; '.join(parts)}",
            names=[*missing, *faults],
        )


def _misspelt(declared: list[str], extra: Iterable[str]) -> str:
    near = {name: difflib.get_close_matches(name, declared, n=1) for name in extra}
    return " ".join(f"{name!r} was given, did you mean {found[0]!r}?" for name, found in near.items() if found)
