"""Reads the YAML and JSON files that people write, and says where a mistake in them is.

YAML is read event by event rather than with ``yaml.load``, because the files come from projects that nobody vetted:
only plain values are made, and duplicate keys, endless nesting (which crashes the C parser) and aliases that expand
into millions of values are refused while the place in the file is still known.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from mlfleet.errors import SpecError

__all__ = ["Node", "nearest", "parse_yaml", "read_json", "read_yaml"]

MAX_SIZE = 2**20
MAX_DEPTH = 64
MAX_NODES = 100_000
MAX_LABEL = 120
# Python turns long digits into numbers in quadratic time; no number that anybody means is that long.
MAX_NUMBER_LENGTH = 400

_log = logging.getLogger("mlfleet.project")

_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value")}
_MERGE = _TAG + "merge"
_NUMBERS = {_TAG + "int", _TAG + "float"}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ufffe\uffff]")
# Escapes of quoted YAML strings can make these.
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")
_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|(?P<constant>NaN|-?Infinity)', re.S)


@dataclass(frozen=True, slots=True)
class Node:
    """A value in a YAML document that knows its place.

    Attributes:
        value: a plain value, or the nodes of a sequence, or those of a mapping by the text of their keys.
        written: a plain value as it stands in the file, so that the version 3.10 does not become 3.1.
        label: where in the document it is: ``entry_points.main``; empty for the whole document.
        path: the file.
        line: counted from 1.
        column: counted from 1.
    """

    value: Any
    written: str
    label: str
    path: Path | str | None
    line: int
    column: int
    # How many values this one stands for, counting an aliased value each time that it is used.
    weight: int = field(default=1, repr=False, compare=False)

    @property
    def is_null(self) -> bool:
        """Whether nothing was written, or ``null``."""
        return self.value is None

    def fail(self, message: str) -> NoReturn:
        """Raise SpecError with the place of this value."""
        subject = f"{self.label}: " if self.label else ""
        raise SpecError(subject + message, path=self.path, line=self.line, column=self.column)

    def wrong(self, expected: str) -> NoReturn:
        """Raise SpecError that says what was expected here, and what was found."""
        self.fail(f"expected {expected}, found {self.kind}")

    @property
    def kind(self) -> str:
        """What this is, for a person: ``a list``, ``the number 3``."""
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

    def mapping(self, known: Iterable[str] | None = None, *, expected: str = "a mapping") -> dict[str, Node]:
        """The nodes of a mapping, in their order; nothing is an empty mapping.

        Args:
            known: the keys that mean something here; any other is kept, and reported once as a warning.
            expected: what the error asks for.
        """
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            self.wrong(expected)
        if known is not None:
            names = tuple(known)
            for key, node in self.value.items():
                if key not in names:
                    _warn_unknown(str(self.path or "the document"), node.line, self.label, key, names)
        return dict(self.value)

    def sequence(self, *, expected: str = "a list") -> list[Node]:
        """The nodes of a sequence; nothing is an empty one."""
        if self.value is None:
            return []
        if not isinstance(self.value, list):
            self.wrong(expected)
        return list(self.value)

    def string(self, *, expected: str = "a string") -> str:
        """A string; a number or a boolean is none (see `text`)."""
        if not isinstance(self.value, str):
            self.wrong(expected)
        return self.value

    def text(self, *, expected: str = "a text") -> str:
        """A string, or a number, boolean or date exactly as it was written."""
        if self.value is None or isinstance(self.value, dict | list):
            self.wrong(expected)
        return self.value if isinstance(self.value, str) else self.written

    def plain(self) -> Any:
        """The data without the places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def nearest(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the known name that is most like `name`; empty if none is."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""


def read_yaml(path: Path) -> Node:
    """The document in a YAML file. Blocking; call it in a thread.

    Raises:
        SpecError: it cannot be read, or is no YAML, or more than plain data; with line and column.
    """
    return parse_yaml(_read(path), path)


def parse_yaml(data: bytes, path: Path | str | None = None) -> Node:
    """The one document in `data`, which is UTF-8.

    Args:
        data: the text; at most 1 MiB.
        path: for the errors.

    Raises:
        SpecError: see `read_yaml`.
    """
    text = _decode(data, path)
    control = _CONTROL.search(text)
    if control:
        line, column = _place(text, control.start())
        raise SpecError(f"the character {control[0]!r} is not allowed in YAML", path=path, line=line, column=column)
    return _Builder(path).build(text)


def read_json(path: Path) -> Any:
    """The data of a JSON file. Blocking; call it in a thread.

    Raises:
        SpecError: it cannot be read or is no JSON (NaN and duplicate keys are none); with line and column.
    """
    text = _decode(_read(path), path)
    for token in _JSON_TOKEN.finditer(text):
        if token["constant"]:
            line, column = _place(text, token.start())
            raise SpecError(f"{token['constant']} is not JSON", path=path, line=line, column=column)
    try:
        return json.loads(text, object_pairs_hook=functools.partial(_object, path))
    except json.JSONDecodeError as error:
        raise SpecError(f"not JSON: {error.msg}", path=path, line=error.lineno, column=error.colno) from error
    except RecursionError as error:
        raise SpecError("nested too deeply", path=path) from error
    except ValueError as error:
        raise SpecError(f"not JSON: {error}", path=path) from error


@dataclass(slots=True)
class _Open:
    """A mapping or sequence that has begun and not ended."""

    node: Node
    anchor: str | None
    key: Node | None = None
    merged: list[Node] = field(default_factory=list)


class _Builder:
    """Makes nodes of the events of one document."""

    def __init__(self, path: Path | str | None) -> None:
        self.path = path
        self.open: list[_Open] = []
        self.anchors: dict[str, Node] = {}
        self.root: Node | None = None
        self.merged = 0

    def build(self, text: str) -> Node:
        # Imported here: it costs more than all the rest of this module.
        import yaml

        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        try:
            while loader.check_event():
                event = loader.get_event()
                match event:
                    case yaml.DocumentStartEvent() if self.root is not None:
                        self.fail(event, "a second document begins here, one was expected")
                    case yaml.AliasEvent():
                        self.add(self.alias(event))
                    case yaml.ScalarEvent():
                        self.add(self.scalar(event, loader), event.anchor)
                    case yaml.MappingStartEvent():
                        self.begin(event, {}, "map")
                    case yaml.SequenceStartEvent():
                        self.begin(event, [], "seq")
                    case yaml.CollectionEndEvent():
                        self.end()
        except yaml.MarkedYAMLError as error:
            self.syntax_error(error, text)
        except yaml.YAMLError as error:
            raise SpecError(f"not YAML: {error}", path=self.path) from error
        finally:
            loader.dispose()
        return self.root or Node(None, "", "", self.path, 1, 1)

    def syntax_error(self, error: Any, text: str) -> NoReturn:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        lines = text.splitlines()
        near = "".join(lines[max(line - 2, 0) : line])
        hint = "; indent with spaces, a tab is no indentation in YAML" if "\t" in near else ""
        context = f" {error.context}" if error.context else ""
        message = f"not YAML: {error.problem}{context}{hint}"
        raise SpecError(message, path=self.path, line=line, column=column) from error

    def fail(self, event: Any, message: str) -> NoReturn:
        self.node(event, None, "").fail(message)

    def node(self, event: Any, value: Any, written: str) -> Node:
        mark = event.start_mark
        return Node(value, written, self.label(), self.path, mark.line + 1, mark.column + 1)

    def label(self) -> str:
        if not self.open:
            return ""
        parent = self.open[-1]
        label = parent.node.label
        if isinstance(parent.node.value, list):
            label = f"{label}[{len(parent.node.value)}]"
        elif parent.key is not None:
            label = f"{label}.{parent.key.written}".removeprefix(".")
        # Cut, because every value below carries it: long keys far up would multiply.
        return label if len(label) <= MAX_LABEL else "…" + label[-MAX_LABEL:]

    def begin(self, event: Any, value: Any, kind: str) -> None:
        if event.tag not in (None, "!", _TAG + kind):
            self.fail(event, f"the tag {event.tag!r} is not allowed, only plain data is")
        if len(self.open) == MAX_DEPTH:
            self.fail(event, f"nested more than {MAX_DEPTH} levels deep")
        self.open.append(_Open(self.node(event, value, ""), event.anchor))

    def end(self) -> None:
        ended = self.open.pop()
        for merged in ended.merged:
            for key, node in merged.value.items():
                ended.node.value.setdefault(key, node)
        values = ended.node.value.values() if isinstance(ended.node.value, dict) else ended.node.value
        weight = 1 + sum(node.weight for node in values)
        if weight > MAX_NODES:
            ended.node.fail(f"aliases included, this has more than {MAX_NODES} values")
        self.add(replace(ended.node, weight=weight), ended.anchor)

    def alias(self, event: Any) -> Node:
        if event.anchor not in self.anchors:
            self.fail(event, f"the alias *{event.anchor} stands before the end of what it names, or that is not there")
        return self.anchors[event.anchor]

    def scalar(self, event: Any, loader: Any) -> Node:
        import yaml

        bad = _NO_TEXT.search(event.value)
        if bad:
            self.fail(event, f"the text holds {bad[0]!r}, which no command, path or variable can")
        tag = event.tag
        if tag in (None, "!"):
            tag = loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        if self.is_key() and tag == _MERGE:
            return self.node(event, _MERGE, event.value)
        if tag not in _SCALARS and tag != _MERGE:
            self.fail(event, f"the tag {tag!r} is not allowed, only plain data is")
        if tag in _NUMBERS and len(event.value) > MAX_NUMBER_LENGTH:
            self.fail(event, f"a number of more than {MAX_NUMBER_LENGTH} characters")
        if tag == _MERGE:
            return self.node(event, event.value, event.value)
        try:
            value = loader.construct_object(yaml.ScalarNode(tag, event.value, event.start_mark, event.end_mark))
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            kind = tag.removeprefix(_TAG)
            self.node(event, None, "").fail(f"{_short(event.value)!r} is no valid {kind} ({error})")
        return self.node(event, value, event.value)

    def is_key(self) -> bool:
        return bool(self.open) and isinstance(self.open[-1].node.value, dict) and self.open[-1].key is None

    def add(self, node: Node, anchor: str | None = None) -> None:
        """Put a complete node where it belongs: the document, a sequence, or a mapping as key or value."""
        if anchor is not None:
            self.anchors[anchor] = node
        if not self.open:
            self.root = node
            return
        parent = self.open[-1]
        if isinstance(parent.node.value, list):
            parent.node.value.append(node)
        elif parent.key is None:
            self.add_key(parent, node)
        elif parent.key.value is _MERGE:
            self.merge(parent, node)
        else:
            parent.node.value[parent.key.written] = node
            parent.key = None

    def add_key(self, parent: _Open, key: Node) -> None:
        if key.value is None or isinstance(key.value, dict | list):
            key.wrong("a key")
        if key.value is not _MERGE and key.written in parent.node.value:
            key.fail(f"the key {_short(key.written)!r} is there twice")
        parent.key = key

    def merge(self, parent: _Open, node: Node) -> None:
        """``<<: *defaults``: of several, the first wins, and the mapping's own keys win over all."""
        nodes = node.value if isinstance(node.value, list) else [node]
        for merged in nodes:
            if not isinstance(merged.value, dict):
                merged.wrong("a mapping, or a list of mappings, to merge")
            self.merged += len(merged.value)
        if self.merged > MAX_NODES:
            node.fail(f"more than {MAX_NODES} values are merged in this document")
        parent.merged.extend(nodes)
        parent.key = None


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise SpecError(f"the key {key!r} is there twice", path=path)
        result[key] = value
    return result


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise SpecError("this is a folder, a file was expected", path=path)
        if path.exists() and not path.is_file():
            raise SpecError("not a regular file", path=path)
        with path.open("rb") as file:
            data = file.read(MAX_SIZE + 1)
    except FileNotFoundError as error:
        raise SpecError("there is no such file", path=path) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SpecError(f"cannot be read: {reason}", path=path) from error
    if len(data) > MAX_SIZE:
        raise SpecError(f"larger than {MAX_SIZE} bytes", path=path)
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
    """Line and column of a position, both counted from 1."""
    return text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


@functools.lru_cache(maxsize=1024)
def _warn_unknown(path: str, line: int, label: str, key: str, known: tuple[str, ...]) -> None:
    where = f" in {label}" if label else ""
    _log.warning(
        "%s, line %d: the key %r%s is unknown and has no effect%s", path, line, key, where, nearest(key, known)
    )
