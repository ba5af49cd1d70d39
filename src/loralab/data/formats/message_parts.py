"""Content of a message: a text, or parts of text, pictures, reasoning and tool calls.

Owns the kinds of parts. A turn is reasoning, then text and pictures, then calls, because that is the
order in which every template writes it; parts in another order are refused rather than moved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loralab.data.example import ImagePart, ToolCall
from loralab.data.formats.fields import Fields, RowError, list_names, read_object, read_text, show
from loralab.data.formats.pictures import Gallery, Parts, read_picture
from loralab.data.formats.tool_calls import read_calls

_REASONING, _TEXT, _CALL, _IMAGE, _OTHER = "reasoning", "text", "tool_call", "image", "other"
_KINDS = {
    **dict.fromkeys(("text", "input_text", "output_text"), _TEXT),
    **dict.fromkeys(("reasoning", "thinking"), _REASONING),
    **dict.fromkeys(("tool_call", "function_call"), _CALL),
    **dict.fromkeys(("image", "image_url", "input_image"), _IMAGE),
    **dict.fromkeys(("video", "video_url", "audio", "audio_url", "input_audio"), _OTHER),
}
_ORDER = (_REASONING, _TEXT, _CALL)
# What services write beside a part's text, and no template reads.
_ABOUT = {"type", "id", "index", "annotations", "cache_control", "signature", "logprobs"}
_IMAGE_KEYS = ("image", "path", "url", "value", "image_url", "bytes")
_IMAGE_ABOUT = "detail"  # how much of a picture a service looks at


@dataclass(frozen=True, slots=True)
class Content:
    """What a message says.

    Attributes:
        text: its text parts, joined as they stand.
        reasoning: its reasoning parts, joined as they stand; "" where there are none.
        calls: its tool calls.
        parts: with pictures, its texts and pictures in order; else empty.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    parts: Parts = ()


def read_content(value: object, place: str, *, gallery: Gallery | None = None) -> Content:
    """Return what stands under a message's content: text, a part, or a list of parts.

    Args:
        value: of the content.
        place: where it stands, for messages.
        gallery: the row's pictures, which markers in the text and parts without a value take; None
            leaves text as it is.

    Raises:
        RowError: something else does, or the parts have no order in which a template could write them.
    """
    if isinstance(value, str):
        return _read_text(read_text(value, place), place, gallery)
    if isinstance(value, Mapping):
        return _join([_read_part(value, place, gallery)], place)
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{place} is {type(value).__name__}, neither a string nor a list of parts: {show(value)}")
    return _join([_read_part(part, f"{place}[{number}]", gallery) for number, part in enumerate(value)], place)


def _read_text(text: str, place: str, gallery: Gallery | None) -> Content:
    parts = gallery.split(text, place) if gallery is not None else ()
    return Content("".join(part for part in parts if isinstance(part, str)) if parts else text, parts=parts)


def _join(parts: Sequence[tuple[str, Content]], place: str) -> Content:
    last = _REASONING
    for number, (kind, content) in enumerate(parts):
        if content == Content():
            continue
        if _ORDER.index(kind) < _ORDER.index(last):
            raise RowError(f"{place}[{number}]: {kind} behind {last}; a turn is {', then '.join(_ORDER)}")
        last = kind
    contents = [content for _, content in parts]
    pieces = [piece for content in contents for piece in content.parts or (content.text,) if piece != ""]
    return Content(
        "".join(content.text for content in contents),
        "".join(content.reasoning for content in contents),
        tuple(call for content in contents for call in content.calls),
        tuple(pieces) if any(isinstance(piece, ImagePart) for piece in pieces) else (),
    )


def _read_part(value: object, place: str, gallery: Gallery | None) -> tuple[str, Content]:
    if isinstance(value, str):
        return _TEXT, _read_text(read_text(value, place), place, gallery)
    part = read_object(value, place)
    if "type" not in part:
        raise RowError(f"{place} has no 'type'; its keys: {list_names(part)}")
    name = read_text(part["type"], f"{place}.type")
    kind = _KINDS.get(name)
    if kind is None:
        raise RowError(f"{place}.type is {show(name)}, no known part: {', '.join(_KINDS)}")
    if kind == _OTHER:
        raise RowError(f"{place} is of type {name}: videos and sound are not read")
    if kind == _IMAGE:
        return _TEXT, Content(parts=(_read_image(part, place, gallery),))
    key, held = _only_value(part, place, (kind, name, "text", "value", "content"))
    if kind == _CALL:
        return kind, Content(calls=read_calls(held, f"{place}.{key}"))
    text = read_text(held, f"{place}.{key}")
    return kind, _read_text(text, f"{place}.{key}", gallery) if kind == _TEXT else Content(reasoning=text)


def _read_image(part: Fields, place: str, gallery: Gallery | None) -> ImagePart:
    """Return the picture of a part: its own, or the row's next one, or the row's `index`-th where it has none."""
    part = {key: held for key, held in part.items() if key != _IMAGE_ABOUT}
    if gallery is not None and all(key in _ABOUT or held == "" for key, held in part.items()):
        index = part.get("index")
        return gallery.take(place, number=index if type(index) is int else None)
    key, held = _only_value(part, place, _IMAGE_KEYS)
    return read_picture(held, f"{place}.{key}")


def _only_value(part: Fields, place: str, keys: Sequence[str]) -> tuple[str, object]:
    found = [key for key in dict.fromkeys(keys) if key in part]
    strange = [key for key in part if key not in _ABOUT and key not in found and part[key] not in ("", [], {}, ())]
    if len(found) == 1 and not strange:
        return found[0], part[found[0]]
    if not found:
        raise RowError(f"{place} has none of {', '.join(dict.fromkeys(keys))}; its keys: {list_names(part)}")
    raise RowError(f"{place} has values that would be lost: {list_names([*found[1:], *strange])}")
