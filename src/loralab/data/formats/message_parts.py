"""Content of a message: a text, or parts of text, reasoning and tool calls.

Owns the kinds of parts. A turn is reasoning, then text, then calls, because that is the order in
which every template writes it; parts in another order are refused rather than moved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loralab.data.example import ToolCall
from loralab.data.formats.fields import Fields, RowError, list_names, read_object, read_text, show
from loralab.data.formats.tool_calls import read_calls

_REASONING, _TEXT, _CALL, _IMAGE = "reasoning", "text", "tool_call", "image"
_KINDS = {
    **dict.fromkeys(("text", "input_text", "output_text"), _TEXT),
    **dict.fromkeys(("reasoning", "thinking"), _REASONING),
    **dict.fromkeys(("tool_call", "function_call"), _CALL),
    **dict.fromkeys(("image", "image_url", "input_image", "video", "video_url"), _IMAGE),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), _IMAGE),
}
_ORDER = (_REASONING, _TEXT, _CALL)
# What services write beside a part's text, and no template reads.
_ABOUT = {"type", "id", "index", "annotations", "cache_control", "signature", "logprobs"}


@dataclass(frozen=True, slots=True)
class Content:
    """What a message says.

    Attributes:
        text: its text parts, joined as they stand.
        reasoning: its reasoning parts, joined as they stand; "" where there are none.
        calls: its tool calls.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


def read_content(value: object, place: str) -> Content:
    """Return what stands under a message's content: text, a part, or a list of parts.

    Raises:
        RowError: something else does, or the parts have no order in which a template could write them.
    """
    if isinstance(value, str):
        return Content(read_text(value, place))
    if isinstance(value, Mapping):
        return _join([_read_part(value, place)], place)
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{place} is {type(value).__name__}, neither a string nor a list of parts: {show(value)}")
    return _join([_read_part(part, f"{place}[{number}]") for number, part in enumerate(value)], place)


def _join(parts: Sequence[tuple[str, Content]], place: str) -> Content:
    last = _REASONING
    for number, (kind, content) in enumerate(parts):
        if content == Content():
            continue
        if _ORDER.index(kind) < _ORDER.index(last):
            raise RowError(f"{place}[{number}]: {kind} behind {last}; a turn is {', then '.join(_ORDER)}")
        last = kind
    contents = [content for _, content in parts]
    return Content(
        "".join(content.text for content in contents),
        "".join(content.reasoning for content in contents),
        tuple(call for content in contents for call in content.calls),
    )


def _read_part(value: object, place: str) -> tuple[str, Content]:
    if isinstance(value, str):
        return _TEXT, Content(read_text(value, place))
    part = read_object(value, place)
    if "type" not in part:
        raise RowError(f"{place} has no 'type'; its keys: {list_names(part)}")
    name = read_text(part["type"], f"{place}.type")
    kind = _KINDS.get(name)
    if kind is None:
        raise RowError(f"{place}.type is {show(name)}, no known part: {', '.join(_KINDS)}")
    if kind == _IMAGE:
        raise RowError(f"{place} is of type {name}: this version trains on text, vision is not in it")
    key, held = _only_value(part, place, (kind, name, "text", "value", "content"))
    if kind == _CALL:
        return kind, Content(calls=read_calls(held, f"{place}.{key}"))
    text = read_text(held, f"{place}.{key}")
    return kind, Content(text) if kind == _TEXT else Content(reasoning=text)


def _only_value(part: Fields, place: str, keys: Sequence[str]) -> tuple[str, object]:
    found = [key for key in dict.fromkeys(keys) if key in part]
    strange = [key for key in part if key not in _ABOUT and key not in found and part[key] not in ("", [], {}, ())]
    if len(found) == 1 and not strange:
        return found[0], part[found[0]]
    if not found:
        raise RowError(f"{place} has none of {', '.join(dict.fromkeys(keys))}; its keys: {list_names(part)}")
    raise RowError(f"{place} has values that would be lost: {list_names([*found[1:], *strange])}")
