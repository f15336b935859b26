"""Reads the YAML and JSON files that people write, and says where a mistake in them is.

The files come from projects that nobody vetted. So the nodes of ``yaml.compose``, which carry line and column, are
converted here rather than by ``yaml.load``: only plain values are made, and duplicate keys, deep nesting and aliases
that expand into millions of values are refused with their place in the file.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from mlfleet._run_log import get_logger, warn_once
from mlfleet._text.plain import UNENCODABLE
from mlfleet.errors import SpecError

__all__ = [
    "Node",
    "Report",
    "find_toml_line",
    "nearest",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_toml",
    "read_yaml",
    "warn_unknown",
]

MAX_SIZE = 2**20
MAX_TOML_SIZE = 2**25  # lock files of large projects
MAX_DEPTH = 64
MAX_NODES = 100_000
MAX_LABEL = 120
# Python turns long digits into numbers in quadratic time; no number that anybody means is that long.
MAX_NUMBER_LENGTH = 400

_log = get_logger("mlfleet.project")

_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value")}
_MERGE = _TAG + "merge"
_NUMBERS = {_TAG + "int", _TAG + "float"}
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ufffe\uffff]")
_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|(?P<constant>NaN|-?Infinity)', re.S)


class Report:
    """The mistakes and the unknown keys in the documents of a project.

    Args:
        collect: True to keep all mistakes; False to raise the first one.

    Attributes:
        collects: As given.
        mistakes: The mistakes that were collected.
        unknown: For each unknown key its description, and the warning with its place.
    """

    def __init__(self, *, collect: bool = False) -> None:
        self.collects = collect
        self.mistakes: list[SpecError] = []
        self.unknown: list[tuple[str, SpecError]] = []

    def add(self, mistake: SpecError) -> None:
        """Keep a mistake, or raise it."""
        if not self.collects:
            raise mistake
        self.mistakes.append(mistake)

    @contextmanager
    def part(self) -> Iterator[None]:
        """Read a part of a document in this block: the reading goes on behind it if the mistakes are collected."""
        try:
            yield
        except SpecError as mistake:
            self.add(mistake)


@dataclass(frozen=True, slots=True)
class Node:
    """A value in a YAML document, with its place in the file.

    Attributes:
        value: A plain value, or the nodes of a sequence, or those of a mapping by the text of their keys.
        written: The text of a plain value in the file, so that the version 3.10 does not become 3.1.
        label: The place in the document, such as ``entry_points.main``; empty for the whole document.
        path: The file.
        line: The line, counted from 1.
        column: The column, counted from 1.
        faults: The mistakes to report when the keys of a mapping are asked for: some are there twice.
    """

    value: Any
    written: str
    label: str
    path: Path | str | None
    line: int
    column: int
    # How many values this one stands for, counting an aliased value each time that it is used.
    weight: int = field(default=1, repr=False, compare=False)
    faults: tuple[SpecError, ...] = field(default=(), repr=False, compare=False)

    @property
    def is_null(self) -> bool:
        """True if nothing was written, or ``null``."""
        return self.value is None

    def fail(self, message: str) -> NoReturn:
        """Raise a SpecError with the place of this value."""
        raise self.error(message)

    def error(self, message: str, *, named: bool = True) -> SpecError:
        """Return a SpecError with the place of this value, and with its label unless `named` is False."""
        subject = f"{self.label}: " if self.label and named else ""
        return SpecError(subject + message, path=self.path, line=self.line, column=self.column)

    def wrong(self, expected: str) -> NoReturn:
        """Raise a SpecError that says what was expected here, and what was found."""
        self.fail(f"expected {expected}, found {self.kind}")

    @property
    def kind(self) -> str:
        """The description for messages: ``a list``, ``the number 3``."""
        match self.value:
            case None:
                return "nothing"
            case dict():
                return "a mapping"
            case list():
                return "a list"
            case bool():
                return f"the boolean {_short(self.written)}"
            case int() | float():
                return f"the number {_short(self.written)}"
            case str():
                return f"the string {_short(self.written)!r}"
            case _:
                return f"the date {_short(self.written)}"

    def mapping(
        self,
        known: Iterable[str] | None = None,
        *,
        expected: str = "a mapping",
        report: Report | None = None,
    ) -> dict[str, Node]:
        """Return the nodes of a mapping, in their order; nothing counts as an empty mapping.

        Args:
            known: The keys that have an effect here; those without a value are left out. Any other is kept, and
                reported in one warning for the mapping.
            expected: The noun phrase in the error, such as "a mapping with an image".
            report: Gets the unknown keys, for one warning by the caller (see `warn_unknown`), and the mistakes.
        """
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            self.wrong(expected)
        own = report or Report()
        for fault in self.faults:
            own.add(fault)
        if known is None:
            return dict(self.value)
        names = tuple(known)
        own.unknown += [
            _describe_unknown(key, node, self.label, names) for key, node in self.value.items() if key not in names
        ]
        if report is None:
            warn_unknown(self.path, own)
        return {key: node for key, node in self.value.items() if key not in names or not node.is_null}

    def sequence(self, *, expected: str = "a list") -> list[Node]:
        """Return the nodes of a sequence; nothing counts as an empty one."""
        if self.value is None:
            return []
        if not isinstance(self.value, list):
            self.wrong(expected)
        return list(self.value)

    def string(self, *, expected: str = "a string") -> str:
        """Return a string; a number or a boolean is refused (see `text`)."""
        if not isinstance(self.value, str):
            self.wrong(expected)
        return self.value

    def text(self, *, expected: str = "a text") -> str:
        """Return a string, or a number, boolean or date exactly as it was written."""
        if self.value is None or isinstance(self.value, dict | list):
            self.wrong(expected)
        return self.value if isinstance(self.value, str) else self.written

    def plain(self) -> Any:
        """Return the data without the places; dates as they were written."""
        for fault in self.faults:
            raise fault
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value if self.value is None or isinstance(self.value, str | int | float) else self.written


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` with the known name that is most like `name`; empty if none is similar."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""


def read_yaml(path: Path, *, defer_duplicates: bool = False) -> Node:
    """Read the document in a YAML file. Blocking; call it in a thread.

    Args:
        path: The file.
        defer_duplicates: True to raise the error of duplicate keys only when the keys of that mapping are asked for.

    Raises:
        SpecError: The file cannot be read, is not YAML, or holds more than plain data; with line and column.
    """
    return parse_yaml(_read(path), path, defer_duplicates=defer_duplicates)


def parse_yaml(data: bytes, path: Path | str | None = None, *, defer_duplicates: bool = False) -> Node:
    """Parse the one YAML document in `data`.

    Args:
        data: The text in UTF-8; at most 1 MiB.
        path: The file to name in errors.
        defer_duplicates: See `read_yaml`.

    Raises:
        SpecError: See `read_yaml`.
    """
    text = _decode(data, path)
    control = _CONTROL.search(text)
    if control:
        line, column = _place(text, control.start())
        raise SpecError(f"the character {control[0]!r} is not allowed in YAML", path=path, line=line, column=column)
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_structure(text, loader, path)
        composed = yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, path) from error
    except yaml.YAMLError as error:
        raise SpecError(f"not YAML: {error}", path=path) from error
    if composed is None:
        return Node(None, "", "", path, 1, 1)
    return _Converter(path, defer_duplicates=defer_duplicates).convert(composed, "")


def read_json(path: Path) -> Any:
    """Read the data of a JSON file. Blocking; call it in a thread.

    Raises:
        SpecError: The file cannot be read, is not JSON (NaN and duplicate keys are refused) or is nested too deeply;
            with line and column.
    """
    return parse_json(_decode(_read(path), path), path)


def parse_json(text: str, path: Path | None = None) -> Any:
    """Parse the data of a JSON text.

    Args:
        text: The JSON.
        path: The file to name in errors.

    Raises:
        SpecError: See `read_json`.
    """
    for token in _JSON_TOKEN.finditer(text):
        if token["constant"]:
            line, column = _place(text, token.start())
            raise SpecError(f"{token['constant']} is not JSON", path=path, line=line, column=column)
    try:
        data = json.loads(text, object_pairs_hook=functools.partial(_object, path))
    except json.JSONDecodeError as error:
        raise SpecError(f"not JSON: {error.msg}", path=path, line=error.lineno, column=error.colno) from error
    except RecursionError as error:
        raise SpecError(_TOO_DEEP, path=path) from error
    except ValueError as error:
        raise SpecError(f"not JSON: {error}", path=path) from error
    _check_depth(data, path)
    return data


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Blocking; call it in a thread.

    Raises:
        SpecError: The file cannot be read, is not TOML, or is nested too deeply.
    """
    import tomllib

    try:
        data = tomllib.loads(_read(path, MAX_TOML_SIZE).decode("utf-8"))
    except ValueError as error:  # also of numbers with thousands of digits
        raise SpecError(f"not TOML: {error}", path=path) from error
    except RecursionError as error:
        raise SpecError(_TOO_DEEP, path=path) from error
    _check_depth(data, path)
    return data


def _check_depth(data: Any, path: Path | None) -> None:
    """Refuse what the code that reads the data recursively could not take, level by level and not recursively."""
    level = [data]
    for _ in range(MAX_DEPTH):
        inside = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [value for values in inside for value in values]
    if any(isinstance(each, dict | list) for each in level):
        raise SpecError(_TOO_DEEP, path=path)


def find_toml_line(path: Path, keys: Sequence[str]) -> int | None:
    """Return the line of a key or table in a TOML file, counted from 1; None if it is not found. Blocking.

    tomllib gives no positions. So this parses the file up to each line with the last key in it: the key is on that line
    if it is in the data from there on, and not before.

    Args:
        path: The file.
        keys: The names of the tables around the key, and the key.
    """
    try:
        lines = _read(path, MAX_TOML_SIZE).decode("utf-8").replace("\r\n", "\n").split("\n")
    except (SpecError, UnicodeDecodeError):
        return None
    for index, line in enumerate(lines):
        if not keys or keys[-1] not in line or _has_key(lines[:index], keys) is not False:
            continue
        # A value may go on for some lines, during which the file is not TOML.
        found = (_has_key(lines[:end], keys) for end in range(index + 1, len(lines) + 1))
        if next((each for each in found if each is not None), None):
            return index + 1
    return None


def _has_key(lines: Sequence[str], keys: Sequence[str]) -> bool | None:
    """Return True if the lines have a key, and None if they are not TOML."""
    import tomllib

    try:
        data: Any = tomllib.loads("\n".join(lines))
    except (ValueError, RecursionError):
        return None
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            return False
        data = data[key]
    return True


class _Converter:
    """Converts the nodes that PyYAML composed, in one pass that checks tags, keys, size and text.

    `_check_structure` has bounded the depth and refused aliases inside of what they name, so the recursion ends.
    """

    def __init__(self, path: Path | str | None, *, defer_duplicates: bool) -> None:
        # Imported here: it costs more than all the rest of this module.
        import yaml

        self._path = path
        self._defer_duplicates = defer_duplicates
        self._constructor = yaml.constructor.SafeConstructor()
        self._converted: dict[int, Node] = {}  # By the id of the composed node: aliases share one.
        self._merged = 0

    def convert(self, composed: Any, label: str) -> Node:
        known = self._converted.get(id(composed))
        if known is not None:
            return known
        match composed.id:
            case "scalar":
                node = self._scalar(composed, label)
            case "sequence":
                node = self._sequence(composed, label)
            case _:
                node = self._mapping(composed, label)
        if node.weight > MAX_NODES:
            node.fail(f"aliases included, this has more than {MAX_NODES} values")
        self._converted[id(composed)] = node
        return node

    def _node(self, composed: Any, value: Any, label: str, *, weight: int = 1) -> Node:
        mark = composed.start_mark
        written = composed.value if composed.id == "scalar" else ""
        return Node(value, written, label, self._path, mark.line + 1, mark.column + 1, weight)

    def _sequence(self, composed: Any, label: str) -> Node:
        self._check_tag(composed, label, "seq")
        nodes = [self.convert(item, _label(f"{label}[{index}]")) for index, item in enumerate(composed.value)]
        return self._node(composed, nodes, label, weight=1 + sum(node.weight for node in nodes))

    def _mapping(self, composed: Any, label: str) -> Node:
        self._check_tag(composed, label, "map")
        own: dict[str, Node] = {}
        faults: list[SpecError] = []
        merged: list[Node] = []
        for composed_key, composed_value in composed.value:
            if composed_key.tag == _MERGE:
                merged += self._merged_mappings(self.convert(composed_value, _label(f"{label}.<<".removeprefix("."))))
                continue
            key = self.convert(composed_key, label)
            if key.value is None or isinstance(key.value, dict | list):
                key.wrong("a key")
            if key.written in own:
                faults.append(key.error(f"the key {_short(key.written)!r} is there twice"))
                if not self._defer_duplicates:
                    raise faults[0]
            own[key.written] = self.convert(composed_value, _label(f"{label}.{key.written}".removeprefix(".")))
        # Of several mappings to merge the first wins, and the mapping's own keys win over all.
        for mapping in merged:
            for name, node in mapping.value.items():
                own.setdefault(name, node)
        node = self._node(composed, own, label, weight=1 + sum(node.weight for node in own.values()))
        return replace(node, faults=tuple(faults)) if faults else node

    def _merged_mappings(self, node: Node) -> list[Node]:
        mappings = node.value if isinstance(node.value, list) else [node]
        for mapping in mappings:
            if not isinstance(mapping.value, dict):
                mapping.wrong("a mapping, or a list of mappings, to merge")
            self._merged += len(mapping.value)
        if self._merged > MAX_NODES:
            node.fail(f"more than {MAX_NODES} values are merged in this document")
        return list(mappings)

    def _scalar(self, composed: Any, label: str) -> Node:
        import yaml

        plain = self._node(composed, composed.value, label)
        tag = composed.tag
        if tag == _MERGE:  # "<<" as a value is a text
            return plain
        if tag not in _SCALARS:
            plain.fail(f"the tag {tag!r} is not allowed, only plain data is")
        if tag in _NUMBERS and len(composed.value) > MAX_NUMBER_LENGTH:
            plain.fail(f"a number of more than {MAX_NUMBER_LENGTH} characters")
        if bad := UNENCODABLE.search(composed.value):
            plain.fail(f"the text holds {bad[0]!r}, which no command, path or variable can")
        try:
            value = self._constructor.construct_object(composed)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            plain.fail(f"{_short(composed.value)!r} is not a valid {tag.removeprefix(_TAG)} ({error})")
        return replace(plain, value=value)

    def _check_tag(self, composed: Any, label: str, kind: str) -> None:
        if composed.tag != _TAG + kind:
            self._node(composed, None, label).fail(f"the tag {composed.tag!r} is not allowed, only plain data is")


def _check_structure(text: str, loader: Any, path: Path | str | None) -> None:
    """Refuse what must not reach the composer: it recurses in C, so deep nesting would crash the process."""
    import yaml

    open_anchors: list[str | None] = []
    complete_anchors: set[str] = set()
    documents = 0
    for event in yaml.parse(text, Loader=loader):
        message = None
        match event:
            case yaml.DocumentStartEvent():
                documents += 1
                if documents > 1:
                    message = "a second document begins here, one was expected"
            case yaml.AliasEvent() if event.anchor not in complete_anchors:
                message = f"the alias *{event.anchor} stands before the end of what it names, or names nothing"
            case yaml.ScalarEvent() if event.anchor:
                complete_anchors.add(event.anchor)
            case yaml.CollectionStartEvent():
                open_anchors.append(event.anchor)
                if len(open_anchors) > MAX_DEPTH:
                    message = _TOO_DEEP
            case yaml.CollectionEndEvent():
                if anchor := open_anchors.pop():
                    complete_anchors.add(anchor)
        mark = event.start_mark
        if message is not None and mark is not None:
            raise SpecError(message, path=path, line=mark.line + 1, column=mark.column + 1)


def _syntax_error(error: Any, text: str, path: Path | str | None) -> SpecError:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    lines = text.splitlines()
    near = "".join(lines[max(line - 2, 0) : line])
    hint = "; indent with spaces, YAML does not take tabs" if "\t" in near else ""
    context = f" {error.context}" if error.context else ""
    return SpecError(f"not YAML: {error.problem}{context}{hint}", path=path, line=line, column=column)


def _label(label: str) -> str:
    # Cut, because every value below carries it: long keys far up would multiply.
    return label if len(label) <= MAX_LABEL else "…" + label[-MAX_LABEL:]


def _object(path: Path | None, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise SpecError(f"the key {key!r} is there twice", path=path)
        result[key] = value
    return result


def _read(path: Path, largest: int = MAX_SIZE) -> bytes:
    try:
        if path.is_dir():
            raise SpecError("this is a folder, a file was expected", path=path)
        if path.exists() and not path.is_file():
            raise SpecError("not a regular file", path=path)
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except FileNotFoundError as error:
        raise SpecError("there is no such file", path=path) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SpecError(f"cannot be read: {reason}", path=path) from error
    if len(data) > largest:
        raise SpecError(f"larger than {largest} bytes", path=path)
    return data


def _decode(data: bytes, path: Path | str | None) -> str:
    if len(data) > MAX_SIZE:
        raise SpecError(f"larger than {MAX_SIZE} bytes", path=path)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SpecError("the file is UTF-16: save it as UTF-8", path=path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig")
        line, column = _place(before, len(before))
        raise SpecError(
            f"not UTF-8: the byte 0x{data[error.start]:02x}; save the file as UTF-8",
            path=path,
            line=line,
            column=column,
        ) from error


def _place(text: str, position: int) -> tuple[int, int]:
    """Return line and column of a position, both counted from 1."""
    return text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def warn_unknown(path: Path | str | None, report: Report) -> None:
    """Log the unknown keys of a document in one warning, once for all runs; not if the mistakes are collected.

    Args:
        path: The file.
        report: The keys that `Node.mapping` found.
    """
    if not report.collects and (keys := ", ".join(text for text, _ in report.unknown)):
        text = "%s: keys that are unknown and have no effect: %s"
        warn_once(_log, text, str(path or "the document"), keys)


def _describe_unknown(key: str, node: Node, label: str, known: tuple[str, ...]) -> tuple[str, SpecError]:
    where = f" in {label}" if label else ""
    hint = nearest(key, known)
    warning = node.error(f"the key {key!r}{where} is unknown and has no effect{hint}", named=False)
    return f"{key!r}{where} (line {node.line}{hint})", warning
