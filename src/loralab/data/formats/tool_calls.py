"""Tools and calls of tools, as rows spell them.

Owns the accepted forms: OpenAI's (`{"type": "function", "function": {...}}`) and the flat one
(`{"name": ..., "arguments": ...}`), as objects or as JSON text.
"""

from collections.abc import Mapping
from typing import Any

from loralab.data.example import ToolCall
from loralab.data.formats.fields import (
    Fields,
    RowError,
    check_json,
    list_names,
    parse_json,
    read_list,
    read_object,
    read_text,
    show,
)

_ENVELOPE = {"id", "type", "function", "index"}
_BODY = {"name", "arguments"}


def read_tools(row: Fields) -> tuple[Mapping[str, Any], ...]:
    """Return the tools of a row, each as it stands; the column may hold a list, JSON text or nothing.

    Raises:
        RowError: it holds something else, or a tool has no name.
    """
    value = row.get("tools")
    if isinstance(value, str) and value.strip() in ("", "null"):
        return ()
    tools = [] if value is None else read_list(value, "field 'tools'")
    for number, tool in enumerate(tools):
        place = f"tools[{number}]"
        # Only the check goes without nulls: `default: null` of a parameter says something.
        outer = read_object(tool, place)
        inner = read_object(outer["function"], f"{place}.function") if "function" in outer else outer
        if not isinstance(inner.get("name"), str):
            raise RowError(f"{place} has no name; its keys: {list_names(outer)}")
        check_json(tool, place)
    return tuple(tools)


def read_calls(value: object, place: str) -> tuple[ToolCall, ...]:
    """Return the calls in a list of calls, in one call, or in JSON text that holds either.

    Raises:
        RowError: it is no JSON, or holds something else than calls.
    """
    if isinstance(value, str):
        value = parse_json(value, place)
    if isinstance(value, (list, tuple)):
        return tuple(_read_call(call, f"{place}[{number}]") for number, call in enumerate(value))
    return (_read_call(value, place),)


def _read_call(value: object, place: str) -> ToolCall:
    call = read_object(value, place)
    envelope = call if "function" in call else {key: call.pop(key) for key in _ENVELOPE & call.keys()}
    body = read_object(call["function"], f"{place}.function") if "function" in call else call
    if envelope.get("type", "function") != "function":
        raise RowError(f"{place}.type is {show(envelope['type'])}; only calls of functions are known")
    strange = [key for key in envelope if key not in _ENVELOPE] + [key for key in body if key not in _BODY]
    if strange:
        raise RowError(f"{place} has keys that no call of a function has: {list_names(strange)}")
    if "name" not in body:
        raise RowError(f"{place} has no name; its keys: {list_names(body)}")
    identity = read_text(envelope["id"], f"{place}.id") if "id" in envelope else None
    return ToolCall(read_text(body["name"], f"{place}.name"), _read_arguments(body, f"{place}.arguments"), identity)


def _read_arguments(body: Fields, place: str) -> Mapping[str, Any] | str:
    value = body.get("arguments")
    if value is None or (isinstance(value, str) and not value.strip()):  # a call without arguments
        return {}
    if isinstance(value, str):
        try:
            parsed = parse_json(value, place)
        except RowError:
            return read_text(value, place)
        return parsed if isinstance(parsed, dict) else value
    if not isinstance(value, Mapping):
        raise RowError(f"{place} is {type(value).__name__}, neither an object nor text")
    check_json(value, place)
    return value
