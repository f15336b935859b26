"""Reading YAML and JSON: what is accepted, and what a mistake's message says."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlfleet._text.documents import nearest, parse_yaml, read_json, read_yaml
from mlfleet.errors import SpecError


def test_plain_data_has_the_types_of_yaml_and_dates_as_they_were_written() -> None:
    document = parse_yaml(b"a: [1, 0.10, yes, ~, 2024-05-06, 'x', 1e-3]\nb: {c: d}\n").plain()
    assert document == {"a": [1, 0.1, True, None, "2024-05-06", "x", "1e-3"], "b": {"c": "d"}}


def test_text_values_keep_their_spelling() -> None:
    fields = parse_yaml(b"python: 3.10\nquoted: '3.10'\nflag: yes\nday: 2024-05-06").mapping()
    assert [node.text() for node in fields.values()] == ["3.10", "3.10", "yes", "2024-05-06"]


def test_keys_are_text() -> None:
    assert list(parse_yaml(b"1: a\nyes: b\n0.10: c\n").mapping()) == ["1", "yes", "0.10"]


@pytest.mark.parametrize("data", [b"", b"\n", b"# nothing\n", b"---\n", b"\xef\xbb\xbf", b"~"])
def test_an_empty_file_is_an_empty_mapping_and_list(data: bytes) -> None:
    document = parse_yaml(data)
    assert document.is_null
    assert document.mapping() == {}
    assert document.sequence() == []


def test_byte_order_mark_and_crlf_are_fine() -> None:
    assert parse_yaml(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n").plain() == {"a": 1, "b": 2}


def test_anchors_and_merge_keys() -> None:
    text = b"base: &base {x: 1, y: 2}\nother: &other {y: 3, z: 4}\nthird:\n  <<: [*base, *other]\n  x: 0\n"
    assert parse_yaml(text).plain()["third"] == {"x": 0, "y": 2, "z": 4}


def test_positions_match_the_file() -> None:
    node = parse_yaml("ä:\n  - ü: [1, oops]\n".encode()).mapping()["ä"].sequence()[0].mapping()["ü"].sequence()[1]
    assert (node.line, node.column, node.label) == (2, 12, "ä[0].ü[1]")


@pytest.mark.parametrize(
    ("data", "place", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", (3, 1), "the key 'a' is there twice"),
        (b"a:\n\tb: 1\n", (2, 1), "indent with spaces"),
        (b"a: b: c\n", (1, 5), "mapping values are not allowed"),
        (b"a: [1\n", (2, 1), "did not find expected"),
        (b"a: *nobody\n", (1, 4), "the alias *nobody"),
        (b"a: &a [*a]\n", (1, 8), "the alias *a"),
        (b"a: !!python/object:os.system x\n", (1, 4), "python/object:os.system' is not allowed"),
        (b"a: !!python/object/apply:os.system [x]\n", (1, 4), "is not allowed"),
        (b"a: !mine x\n", (1, 4), "the tag '!mine' is not allowed"),
        (b"a: 2024-13-45\n", (1, 4), "'2024-13-45' is not a valid timestamp"),
        (b"a: !!int seven\n", (1, 4), "'seven' is not a valid int"),
        (b"a: !!bool seven\n", (1, 4), "'seven' is not a valid bool"),
        (b"a: 1\n---\nb: 1\n", (2, 1), "a second document begins here"),
        (b"a: b\nc: \xff\n", (2, 4), "not UTF-8: the byte 0xff"),
        (b"a: b\nc: \x00\n", (2, 4), r"'\x00' is not allowed"),
        (b'a: "x\\0y"\n', (1, 4), r"the text holds '\x00'"),
        (b"? [a, b]\n: c\n", (1, 3), "expected a key, found a list"),
        (b"<<: 3\n", (1, 5), "to merge, found the number 3"),
        (b"a: " + b"9" * 5000, (1, 4), "a number of more than"),
        (b"[" * 500, (1, 65), "nested more than 64 levels"),
        (b"- " * 200_000, (1, 129), "nested more than 64 levels"),
    ],
)
def test_unsupported_yaml_is_refused_with_its_position(data: bytes, place: tuple[int, int], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_yaml(data, "MLproject")
    assert message in str(caught.value)
    assert (caught.value.line, caught.value.column) == place
    assert str(caught.value).startswith(f"MLproject, line {place[0]}, column {place[1]}: ")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_brackets_without_end_are_refused() -> None:
    # Newer versions of libyaml have a limit of their own, which they reach before the first bracket is reported.
    with pytest.raises(
        SpecError, match=r"MLproject, line 1, column .*(nested more than|exceeded maximum nesting depth)"
    ):
        parse_yaml(b"[" * 200_000, "MLproject")


def test_an_alias_bomb_is_refused_without_expanding_it() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(SpecError, match="aliases included, this has more than 100000 values"):
        parse_yaml("\n".join(lines).encode())


def test_a_merge_bomb_is_refused() -> None:
    keys = "\n".join(f"  k{i}: 1" for i in range(2000))
    users = "\n".join(["- <<: *a"] * 20_000)
    with pytest.raises(SpecError, match="more than 100000 values are merged"):
        parse_yaml(f"a: &a\n{keys}\nb:\n{users}\n".encode())


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("mapping", "expected a mapping, found a list"),
        ("string", "expected a string, found a list"),
        ("text", "expected a text, found a list"),
    ],
)
def test_a_wrong_type_says_what_was_expected_and_found(call: str, found: str) -> None:
    node = parse_yaml(b"entry_points:\n  main: [1]\n", "MLproject").mapping()["entry_points"].mapping()["main"]
    with pytest.raises(SpecError) as caught:
        getattr(node, call)()
    assert str(caught.value) == f"MLproject, line 2, column 9: entry_points.main: {found}"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("yes", "the boolean yes"),
        ("0.10", "the number 0.10"),
        ("abc", "the string 'abc'"),
        ("2024-01-02", "the date 2024-01-02"),
        ("", "nothing"),
        ("{}", "a mapping"),
        ("x" * 500, "the string '" + "x" * 57 + "...'"),
    ],
)
def test_types_have_readable_names(text: str, kind: str) -> None:
    assert parse_yaml(f"a: {text}".encode()).mapping()["a"].kind == kind


def test_unknown_keys_are_kept_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        fields = parse_yaml(b"nmae: x\n", "once/MLproject").mapping({"name", "entry_points"})
    assert list(fields) == ["nmae"]
    assert [record.getMessage() for record in caplog.records] == [
        "once/MLproject: keys that are unknown and have no effect: 'nmae' (line 1, did you mean 'name'?)"
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no such file"):
        read_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(SpecError, match="this is a folder"):
        read_yaml(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SpecError, match="not a regular file"):
        read_yaml(tmp_path / "pipe")
    with pytest.raises(SpecError, match="null byte"):
        read_yaml(Path("a\0b"))
    (tmp_path / "large").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(SpecError, match="larger than 1048576 bytes"):
        read_yaml(tmp_path / "large")
    (tmp_path / "wide").write_text("a: 1", "utf-16")
    with pytest.raises(SpecError, match="UTF-16: save it as UTF-8"):
        read_yaml(tmp_path / "wide")


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "backend.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, null, "NaN and Infinity"], "b": {"\\"": -Infinity}}')
    with pytest.raises(SpecError, match="-Infinity is not JSON"):
        read_json(path)
    path.write_text('{"a": [1, null, "NaN"]}')
    assert read_json(path) == {"a": [1, None, "NaN"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": }', "line 2, column 7: not JSON: Expecting value"),
        ('{"a": 1,\n "b": NaN}', "line 2, column 7: NaN is not JSON"),
        ("", "line 1, column 1: not JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("[" * 200_000, "nested more than 64 levels deep"),
        ("[" * 65 + "]" * 65, "nested more than 64 levels deep"),
        ("9" * 5000, "not JSON"),
        ("{'a': 1}", "line 1, column 2: not JSON"),
    ],
)
def test_json_mistakes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "backend.json"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_json(path)
    assert message in str(caught.value)


def test_a_missing_json_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no such file"):
        read_json(tmp_path / "backend.json")


def test_nearest() -> None:
    assert nearest("entry_point", ["entry_points", "name"]) == ", did you mean 'entry_points'?"
    assert nearest("zzz", ["entry_points", "name"]) == ""


PIECES = st.sampled_from(
    [*"abc:-?[]{}&*!|>'\"%@`#,\n\t 019.~<=\\", "&a", "*a", "<<: ", "!!int ", "- ", "\n  ", "\r", "é"]
)


@settings(deadline=None, database=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=60).map(lambda parts: "".join(parts).encode())))
def test_any_document_raises_only_spec_errors(data: bytes) -> None:
    with contextlib.suppress(SpecError):
        parse_yaml(data).plain()
