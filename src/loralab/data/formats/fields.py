"""Values of a row, read with their types checked.

Owns `RowError` and the wording of what a value is and should be. Does not know which fields a
format has (`formats.py` and the modules it names).
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

Fields = Mapping[str, Any]

MAX_DEPTH = 100  # far deeper than any JSON schema; what is deeper would end in a stack overflow elsewhere
MAX_INTEGER_BITS = 4096  # Python writes no number of more than 4300 digits
_SHOWN_CHARACTERS = 60
_SHOWN_NAMES = 20


class RowError(Exception):
    """A row that its format cannot use; the message says which field and what it held."""


def text_field(row: Fields, name: str, *, default: str | None = None) -> str:
    """Return a string field; a missing or null one is `default`, where there is one.

    Raises:
        RowError: it is missing (and has no default), not a string, or no valid Unicode.
    """
    value = row.get(name)
    if value is None and default is not None:
        return default
    if value is None and name not in row:
        raise missing(row, name)
    return read_text(value, f"field {name!r}")


def missing(row: Fields, name: str) -> RowError:
    """Return the error for a field that the row does not have."""
    return RowError(f"missing field {name!r}; the row has: {list_names(row)}")


def read_text(value: object, place: str) -> str:
    """Return a string.

    Args:
        value: anything.
        place: where it stands in the row, for the message.

    Raises:
        RowError: it is no string, or holds half of a surrogate pair, which no tokenizer can encode.
    """
    if not isinstance(value, str):
        raise RowError(f"{place} is {type(value).__name__}, not a string: {show(value)}")
    if not value.isascii():
        _refuse_half_characters(value, place)
    return value


def _refuse_half_characters(value: str, place: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ord(value[error.start])
        raise RowError(f"{place} holds \\u{half:04x}, half of a surrogate pair, at character {error.start}") from None


def read_list(value: object, place: str) -> list[Any]:
    """Return a list, or the list that JSON text holds (a CSV file has no lists).

    Raises:
        RowError: it is neither.
    """
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            raise RowError(f"{place} is text, not a list: {show(value)}")
        value = parse_json(value, place)
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{place} is {type(value).__name__}, not a list: {show(value)}")
    return list(value)


def read_object(value: object, place: str) -> dict[str, Any]:
    """Return an object without its null values, which are how Arrow writes keys that are not there.

    Raises:
        RowError: it is no object, or a key is no string.
    """
    if not isinstance(value, Mapping):
        raise RowError(f"{place} is {type(value).__name__}, not an object: {show(value)}")
    strange = next((key for key in value if not isinstance(key, str)), None)
    if strange is not None:
        raise RowError(f"{place} has a key that is no string: {show(strange)}")
    return {key: held for key, held in value.items() if held is not None}


def read_flag(value: object, place: str) -> bool:
    """Return whether true, false, 0 or 1 stands there.

    Raises:
        RowError: something else does.
    """
    if isinstance(value, (bool, int, float)):
        if value in (0, 1):
            return bool(value)
        if 0 < value < 1:
            raise RowError(f"{place} is {show(value)}: weights between 0 and 1 are not supported; write 0 or 1")
    raise RowError(f"{place} is {show(value)}, neither true or false nor 1 or 0")


def parse_json(text: str, place: str) -> Any:
    """Return the value that JSON text holds.

    Raises:
        RowError: it is no JSON, names a key twice (one value would be lost), or `check_json` refuses it.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise RowError(f"{place} is JSON nested too deeply") from None
    except ValueError as error:  # of json, of `_unique_keys`, of a number with more digits than Python converts
        raise RowError(f"{place} is no JSON ({error}): {show(text)}") from None
    check_json(value, place)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def check_json(value: object, place: str, *, depth: int = 0) -> None:
    """Refuse what templates could not write as JSON.

    Raises:
        RowError: a value that JSON does not have, half of a surrogate pair, or more than
            `MAX_DEPTH` levels.
    """
    if depth > MAX_DEPTH:
        raise RowError(f"{place} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        for key, held in value.items():
            read_text(key, f"a key of {place}")
            check_json(held, place, depth=depth + 1)
    elif isinstance(value, (list, tuple)):
        for held in value:
            check_json(held, place, depth=depth + 1)
    else:
        _check_scalar(value, place)


def _check_scalar(value: object, place: str) -> None:
    if isinstance(value, str):
        read_text(value, place)
    elif isinstance(value, int):
        if value.bit_length() > MAX_INTEGER_BITS:
            raise RowError(f"{place} holds a whole number of {value.bit_length():,} bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise RowError(f"{place} holds {value}, which is no JSON number")
    elif value is not None:
        raise RowError(f"{place} holds {type(value).__name__}, which JSON does not have: {show(value)}")


def list_names(names: Iterable[object]) -> str:
    """Return names for a message, cut where there are many."""
    every = list(names)
    shown = [_printable(" ".join(str(name).split())[:_SHOWN_CHARACTERS]) for name in every[:_SHOWN_NAMES]]
    more = f" and {len(every) - len(shown)} more" if len(every) > len(shown) else ""
    return (", ".join(shown) or "nothing") + more


def show(value: object) -> str:
    """Return a value for a message as Python writes it, cut where it is long."""
    try:
        text = _printable(repr(value))
    except (RecursionError, ValueError):  # nested too deeply; a number of too many digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
