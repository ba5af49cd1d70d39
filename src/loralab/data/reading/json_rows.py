"""JSON and JSON lines to rows.

Owns which shapes of JSON hold rows and what a row may be. Reading a long list piece by piece is
`json_list.py`'s.
"""

import io
import json
import re
from collections.abc import Iterator

from loralab.data.reading.json_list import JsonText, invalid_json, json_values, parse_json
from loralab.data.reading.rows import BOM, JsonLine, Row, UnparsedRow, decode_text, excerpt
from loralab.errors import DataError

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_TYPES = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
_SHAPES = 'write a list of objects, [{"prompt": ...}, ...], or one object per line in a .jsonl file'
_BLANK = b" \t\r\n"


def read_json(stream: io.BufferedIOBase, name: str, start: int = 0) -> Iterator[UnparsedRow]:
    """Yield the objects of a JSON list; of the one list in a JSON object; or of JSON lines, told by the content.

    A list and lines are read piece by piece; an object that wraps a list is read whole.

    Args:
        stream: the file.
        name: the file, for messages.
        start: rows to leave out at the beginning.

    Raises:
        DataError: the file is no UTF-8, no JSON, or holds something else than objects.
    """
    text = JsonText(stream, name)
    first = text.peek()
    if first == "[":
        values = json_values(text)
    elif first == "{" and _holds_json_lines(stream, name):
        stream.seek(0)
        yield from read_json_lines(stream, name, start)
        return
    elif first:
        stream.seek(0)
        whole = decode_text(stream.read(), name)
        escapes = _SURROGATE_ESCAPE.search(whole) is not None
        values = ((value, escapes) for value in _list_of_rows(parse_json(whole, name), name))
        del whole  # as large as the file
    else:
        return
    for number, (value, has_escapes) in enumerate(values, 1):
        if number > start:
            yield _object_row(value, Row({}, number, name), escapes=has_escapes)


def read_json_lines(stream: io.BufferedIOBase, name: str, start: int = 0) -> Iterator[JsonLine]:
    """Yield one row per line that is not blank, not parsed yet; lines that are left out cost next to nothing.

    Args:
        stream: the file.
        name: the file, for messages.
        start: rows to leave out at the beginning.
    """
    number = 0
    for line, raw in enumerate(stream, 1):
        if not (raw.removeprefix(BOM) if line == 1 else raw).strip(_BLANK):
            continue
        number += 1
        if number > start:
            yield JsonLine(raw, number, name, line)


def parse_row(row: UnparsedRow) -> Row:
    """Return a row with its fields, parsed where nobody has.

    Raises:
        DataError: it is no UTF-8, no JSON, or no object.
    """
    if isinstance(row, Row):
        return row
    text = decode_text(row.raw, row.source, line=row.line)
    value = parse_json(text.rstrip("\r\n"), row.source, line=row.line)
    escapes = _SURROGATE_ESCAPE.search(text) is not None
    return _object_row(value, Row({}, row.number, row.source, row.line), escapes=escapes)


def _holds_json_lines(stream: io.BufferedIOBase, name: str) -> bool:
    """Return whether the first line that is not blank is an object, and another one follows."""
    stream.seek(0)
    lines = read_json_lines(stream, name)
    first = next(lines, None)
    if first is None or next(lines, None) is None:
        return False
    try:
        return isinstance(json.loads(decode_text(first.raw, name, line=first.line)), dict)
    except (ValueError, RecursionError):
        return False


def _list_of_rows(value: object, name: str) -> list[object]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(f"the file holds {_type_name(value)}, not a list of objects", where=name, fix=_SHAPES)
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)}
    if len(lists) == 1:
        return next(iter(lists.values()))
    keys = f"under {excerpt(list(lists))}" if lists else f"its keys: {excerpt(list(value))}"
    raise DataError(f"the file holds one object with {len(lists)} lists of objects, {keys}", where=name, fix=_SHAPES)


def _object_row(value: object, place: Row, *, escapes: bool) -> Row:
    """Return `place` with the fields in `value`, which may hold halves of surrogate pairs where it has `escapes`."""
    if not isinstance(value, dict):
        raise DataError(
            f"row {place.number} is {_type_name(value)}, not an object: {excerpt(value)}",
            where=place.describe(),
            fix='make every row an object, {"column": value, ...}',
        )
    if escapes:
        _refuse_half_characters(value, place)
    return Row(value, place.number, place.source, place.line)


def _refuse_half_characters(value: dict[str, object], place: Row) -> None:
    # JSON can escape what UTF-8, and with it every tokenizer, cannot encode.
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"row {place.number} holds \\u{ord(error.object[error.start]):04x}, half of a surrogate pair",
            where=place.describe(),
            fix="write the whole character, or remove it",
        ) from None
    except RecursionError:
        raise invalid_json("nested too deeply", where=place.describe(), fix="flatten the row") from None


def _type_name(value: object) -> str:
    return _TYPES.get(type(value), "null")
