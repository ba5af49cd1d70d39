"""JSON and JSON lines to rows.

Owns which shapes of JSON hold rows and the wording of JSON errors.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator

from loralab.data.rows import Row, decode_text, excerpt, text_lines
from loralab.errors import DataError

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_TYPES = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
_SHAPES = 'write a list of objects, [{"prompt": ...}, ...], or one object per line in a .jsonl file'


def read_json(stream: io.BufferedIOBase, name: str) -> Iterator[Row]:
    """Yield the objects of a JSON list; of the one list in a JSON object; or of JSON lines, told by the content.

    Raises:
        DataError: the file is no UTF-8, no JSON, or holds something else than objects.
    """
    text = decode_text(stream.read(), name)
    if not text.strip():
        return
    if _holds_json_lines(text):
        yield from _rows_of_lines(enumerate(text.split("\n"), 1), name)
        return
    values = _list_of_rows(_parse(text, name), name)
    escapes = _SURROGATE_ESCAPE.search(text) is not None
    del text  # as large as the file
    for number, value in enumerate(values, 1):
        yield _object_row(value, Row({}, number, name), escapes=escapes)


def read_json_lines(stream: io.BufferedIOBase, name: str) -> Iterator[Row]:
    """Yield one row per line that is not blank.

    Raises:
        DataError: a line is no UTF-8, no JSON, or no object.
    """
    yield from _rows_of_lines(text_lines(stream, name), name)


def _rows_of_lines(lines: Iterable[tuple[int, str]], name: str) -> Iterator[Row]:
    number = 0
    for line, text in lines:
        if not text.strip(" \t\r\n"):
            continue
        number += 1
        value = _parse(text.rstrip("\r\n"), name, line=line)
        escapes = _SURROGATE_ESCAPE.search(text) is not None
        yield _object_row(value, Row({}, number, name, line), escapes=escapes)


def _holds_json_lines(text: str) -> bool:
    if not text.lstrip().startswith("{"):
        return False
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
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


def _parse(text: str, name: str, *, line: int = 1) -> object:
    place, fix = f"{name} line {line}", "mend it there: .jsonl has one object per line, .json one list of objects"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = excerpt(text[error.pos : error.pos + 30]) if error.pos < len(text) else "the end"
        place = f"{name} line {line + error.lineno - 1} column {error.colno}"
        raise DataError(f"invalid JSON: {error.msg}, got {found}", where=place, fix=fix) from None
    except ValueError as error:  # a number of more digits than Python converts
        raise DataError(f"invalid JSON: {error}", where=place, fix="write the number as a string") from None
    except RecursionError:
        raise DataError("invalid JSON: nested too deeply", where=place, fix="flatten the row") from None


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
        raise DataError("invalid JSON: nested too deeply", where=place.describe(), fix="flatten the row") from None


def _type_name(value: object) -> str:
    return _TYPES.get(type(value), "null")
