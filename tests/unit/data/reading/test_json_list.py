"""A JSON list through a window gives what the whole text gives, wherever it is cut; errors and places too."""

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loralab.data.reading import json_list
from loralab.data.reading.json_list import JsonText, json_values, parse_json
from loralab.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def read(text: str | bytes, block: int) -> list[object]:
    before, json_list.BLOCK_BYTES = json_list.BLOCK_BYTES, block
    try:
        raw = text.encode() if isinstance(text, str) else text
        return [value for value, _ in json_values(JsonText(io.BytesIO(raw), "a.json"))]
    finally:
        json_list.BLOCK_BYTES = before


def outcome(action: Any) -> tuple[str, str]:
    """Return where and what, or two empty texts where nothing is wrong."""
    try:
        action()
    except DataError as error:
        return error.problems[0].where, error.problems[0].what
    return "", ""


@given(
    values=st.lists(VALUES, max_size=6),
    block=st.integers(1, 40),
    escape=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_any_list_is_read_whatever_the_window(values: list[Any], block: int, escape: bool, indent: int | None) -> None:
    assert read(json.dumps(values, ensure_ascii=escape, indent=indent), block) == values


@settings(max_examples=300)
@given(
    values=st.lists(VALUES, min_size=1, max_size=4),
    block=st.integers(1, 40),
    place=st.floats(0, 1),
    character=st.sampled_from('[]{}",:\\ x1\n\x01e-.'),
    indent=st.sampled_from([None, 1]),
)
def test_a_broken_list_is_refused_where_the_whole_text_would_be(
    values: list[Any], block: int, place: float, character: str, indent: int | None
) -> None:
    text = json.dumps(values, indent=indent)
    at = int(place * (len(text) - 1))
    broken = text[:at] + character + text[at + 1 :]
    whole = outcome(lambda: parse_json(broken, "a.json"))
    if broken.lstrip().startswith("["):
        assert outcome(lambda: read(broken, block)) == whole


@pytest.mark.parametrize("block", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ('[{"a": 1},\n{"b" 2}]', "a.json line 2 column 6", "Expecting ':' delimiter, got '2}]'"),
        ('[\n\n{"a": "long, never ended}]', "a.json line 3 column 7", "Unterminated string starting at"),
        ("[1, 2\n 3]", "a.json line 2 column 2", "Expecting ',' delimiter, got '3]'"),
        ("[1, 2", "a.json line 1 column 6", "Expecting ',' delimiter, got the end"),
        ("[1, 2,", "a.json line 1 column 7", "Expecting value, got the end"),
        ("[", "a.json line 1 column 2", "Expecting value, got the end"),
        ("[]\n[]", "a.json line 2 column 1", "Extra data, got '[]'"),
        ('["\\u12g4"]', "a.json line 1 column 4", "Invalid \\\\uXXXX escape"),
        ("[nul]", "a.json line 1 column 2", "Expecting value, got 'nul]'"),
    ],
)
def test_messages(text: str, where: str, what: str, block: int) -> None:
    found_where, found_what = outcome(lambda: read(text, block))
    assert found_where == where
    assert found_what.startswith(f"invalid JSON: {what.encode().decode('unicode_escape')}")


@pytest.mark.parametrize("block", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("raw", "where"),
    [
        (b'["\xff"]', "a.json line 1 byte 3"),
        (b'[\n"\xc3\xa9\xe4", 1]', "a.json line 2 byte 4"),
        (b'["caf\xc3', "a.json line 1 byte 6"),
        (b"\xff\xfe[\0", "a.json line 1 byte 1"),
    ],
)
def test_bytes_that_are_no_text(raw: bytes, where: str, block: int) -> None:
    with pytest.raises(DataError, match="text is ") as caught:
        read(raw, block)
    assert caught.value.problems[0].where == where


def test_a_mistake_is_found_without_reading_on() -> None:
    stream = io.BytesIO(b'[{"a" 1}' + b', {"a": 1}' * 500_000 + b"]")
    with pytest.raises(DataError):
        list(json_values(JsonText(stream, "a.json")))
    assert stream.tell() < 3 * json_list.BLOCK_BYTES


def test_surrogate_escapes_are_told_by_element() -> None:
    text = JsonText(io.BytesIO(b'["plain", "\\ud83d\\ude00", "x"]'), "a.json")
    assert [escapes for _, escapes in json_values(text)] == [False, True, False]
