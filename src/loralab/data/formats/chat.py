"""Conversations: lists of messages, in the spellings that data sets have.

Owns roles, the keys of a message and its content parts. A row's turns are kept as they are, also
two of one role in a row; which of them carry loss, `data.train_on` and a message's `train` say.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loralab.data.example import Conversation, Example, Message, ToolCall
from loralab.data.formats.fields import (
    Fields,
    RowError,
    list_names,
    missing,
    read_flag,
    read_list,
    read_object,
    read_text,
    show,
    text_field,
)
from loralab.data.formats.message_parts import Content, read_content
from loralab.data.formats.pictures import Gallery, open_gallery
from loralab.data.formats.tool_calls import read_calls, read_tools

_CALL = "function_call"  # an assistant turn whose whole content is a call
ROLE_NAMES: dict[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys((_CALL, "tool_call"), _CALL),
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FLAGS = ("train", "loss_weight", "weight", "loss", "training", "trainable")
_CALLS = ("tool_calls", "function_call")
_KEYS = {*_REASONING, *_FLAGS, *_CALLS, "name", "tool_call_id"}
# Text about a message that is no part of it.
_ABOUT = {
    *("id", "message_id", "parent_id", "uuid", "turn_id", "turn_identifier", "conversation_id", "request_id"),
    *("timestamp", "time", "date", "created", "created_at", "create_time", "updated_at"),
    *("lang", "language", "country", "header", "state", "hashed_ip", "status", "finish_reason", "stop_reason"),
    *("model", "model_name", "source", "dataset", "category", "topic", "author", "annotator"),
    *("metadata", "meta", "annotations", "labels", "emojis", "detoxify", "scores", "usage"),
}
# A number or truth value under another name than `_FLAGS` that may be meant to decide on loss.
_ON_TRAINING = re.compile(r"train|loss|mask|weight|learn|ignore|supervis|prefix", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a format calls the two keys that every message has.

    Attributes:
        format: its name, for messages.
        role: key of the role.
        content: key of the text.
    """

    format: str
    role: str
    content: str


MESSAGES = Spelling("messages", "role", "content")
SHAREGPT = Spelling("sharegpt", "from", "value")


def build_messages(row: Fields) -> Example:
    """Build a conversation from `messages` (role, content), optional `system`, `tools` and `images`."""
    return _build(row, "messages", MESSAGES)


def build_sharegpt(row: Fields) -> Example:
    """Build a conversation from `conversations` (from, value), optional `system`, `tools` and `images`."""
    return _build(row, "conversations", SHAREGPT)


def _build(row: Fields, name: str, spelling: Spelling) -> Example:
    if row.get(name) is None:
        raise missing(row, name)
    gallery = open_gallery(row)
    return build_conversation(row, gallery.settle(read_messages(row[name], name, spelling=spelling, gallery=gallery)))


def build_conversational_prompt_completion(row: Fields) -> Example:
    """Build a conversation from the messages of `prompt` and of `completion`; only the latter are trained."""
    gallery = open_gallery(row)
    prompt = [replace(message, train=False) for message in _side(row, "prompt", role="user", gallery=gallery)]
    messages = [*prompt, *_side(row, "completion", role="assistant", gallery=gallery)]
    return build_conversation(row, gallery.settle(messages))


def _side(row: Fields, name: str, *, role: str, gallery: Gallery) -> list[Message]:
    value = row.get(name)
    if value is None:
        raise missing(row, name)
    if isinstance(value, str):
        content = read_content(value, f"field {name!r}", gallery=gallery if role == "user" else None)
        return [Message(role, content.text, parts=content.parts)]
    if isinstance(value, Mapping):
        return [_read_message(value, name, spelling=MESSAGES, gallery=gallery)]
    return read_messages(value, name, spelling=MESSAGES, gallery=gallery)


def build_conversation(row: Fields, messages: Sequence[Message]) -> Conversation:
    """Return a conversation with the row's `system` text, where it has one, and its `tools`.

    Raises:
        RowError: there are two system messages, or the tools cannot be read.
    """
    system = text_field(row, "system", default="")
    if system and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    elif system and messages[0].content != system:
        raise RowError(f"two system messages: field 'system' holds {show(system)}, the first turn another")
    return Conversation(tuple(messages), read_tools(row))


def read_messages(value: object, place: str, *, spelling: Spelling, gallery: Gallery | None = None) -> list[Message]:
    """Return the messages in a list, or in JSON text of one.

    Args:
        value: of the field.
        place: the field's name.
        spelling: what the keys are called.
        gallery: the row's pictures, which turns take; whoever gives them settles them.

    Raises:
        RowError: there is no message, or one cannot be read.
    """
    items = read_list(value, f"field {place!r}")
    if not items:
        raise RowError(f"field {place!r} holds no message")
    return [
        _read_message(item, f"{place}[{number}]", spelling=spelling, gallery=gallery)
        for number, item in enumerate(items)
    ]


def first_message(value: object) -> tuple[Mapping[str, Any] | None, str]:
    """Return the first message of a field, or None, and what was seen there, for the choice of a format."""
    try:
        items = read_list(value, "it")
    except RowError as error:
        return None, str(error)
    if not items:
        return None, "it is an empty list"
    if not isinstance(items[0], Mapping):
        return None, f"its first item is {type(items[0]).__name__}, not an object"
    return items[0], f"the keys of its first message are {list_names(items[0])}"


def _read_message(value: object, place: str, *, spelling: Spelling, gallery: Gallery | None) -> Message:
    item = read_object(value, place)
    _refuse_strange_keys(item, place, spelling)
    name = _read_role(item, place, spelling)
    role = "assistant" if name == _CALL else name
    if role == "assistant" and gallery is not None and not gallery.pictures:
        gallery = None  # a model that writes about markers; next to pictures, one is a mistake
    content = Content()
    if name == _CALL:
        content = _read_call_turn(item.get(spelling.content), f"{place}.{spelling.content}")
    elif spelling.content in item:
        content = read_content(item[spelling.content], f"{place}.{spelling.content}", gallery=gallery)
    content = _add_keys(content, item, place)
    if spelling.content not in item and content == Content():
        raise RowError(f"{place}.{spelling.content} is missing or null")
    if role != "assistant" and (content.reasoning or content.calls):
        what = "tool calls" if content.calls else "reasoning"
        raise RowError(f"{place} has {what}, but its role is {role}")
    return Message(
        role,
        content.text,
        reasoning=content.reasoning or None,
        tool_calls=content.calls,
        name=read_text(item["name"], f"{place}.name") if "name" in item else None,
        call_id=read_text(item["tool_call_id"], f"{place}.tool_call_id") if "tool_call_id" in item else None,
        train=_read_train(item, place),
        parts=content.parts,
    )


def _read_call_turn(value: object, place: str) -> Content:
    calls = () if value is None else read_calls(value, place)
    if not calls:
        raise RowError(f"{place} holds no tool call")
    return Content(calls=calls)


def _read_role(item: Fields, place: str, spelling: Spelling) -> str:
    value = item.get(spelling.role)
    if value is None:
        raise RowError(f"{place} has no {spelling.role!r}; its keys: {list_names(item)}")
    name = read_text(value, f"{place}.{spelling.role}")
    role = ROLE_NAMES.get(name.strip().lower())
    if role is None:
        raise RowError(f"{place}.{spelling.role} is {show(name)}, no known role: {', '.join(ROLE_NAMES)}")
    return role


def _add_keys(content: Content, item: Fields, place: str) -> Content:
    """Return `content` with the reasoning and the calls that stand under keys of their own."""
    thoughts = {read_text(item[key], f"{place}.{key}") for key in _REASONING if key in item} - {""}
    found = [read_calls(item[key], f"{place}.{key}") for key in _CALLS if item.get(key) not in (None, [], {}, (), "")]
    if len(thoughts | ({content.reasoning} - {""})) > 1:
        raise RowError(f"{place} has two reasonings that differ")
    if len(found) + bool(content.calls) > 1:
        raise RowError(f"{place} has tool calls in two places")
    return replace(content, reasoning=content.reasoning or "".join(thoughts), calls=content.calls or _joined(found))


def _joined(found: Sequence[tuple[ToolCall, ...]]) -> tuple[ToolCall, ...]:
    return tuple(call for calls in found for call in calls)


def _read_train(item: Fields, place: str) -> bool:
    flags = {key: read_flag(item[key], f"{place}.{key}") for key in _FLAGS if key in item}
    if len(set(flags.values())) > 1:
        raise RowError(f"{place}: {' and '.join(flags)} do not agree")
    return all(flags.values())


def _refuse_strange_keys(item: Fields, place: str, spelling: Spelling) -> None:
    """Refuse a key whose value would be lost: text or a structure, or a number that may decide on loss."""
    for key, value in item.items():
        if key in _KEYS or key in _ABOUT or key in (spelling.role, spelling.content):
            continue
        if isinstance(value, (str, bytes, Mapping, list, tuple)):
            if not value:
                continue
            known = ", ".join((spelling.role, spelling.content, *sorted(_KEYS)))
            other = SHAREGPT if spelling is MESSAGES else MESSAGES
            if {other.role, other.content} <= item.keys():
                known += f"; {other.role} and {other.content} are of format {other.format}"
            raise RowError(f"{place} has the key {show(key)}, whose value would be lost; known keys: {known}")
        if _ON_TRAINING.search(key):
            raise RowError(f"{place} has the key {show(key)}; write `train: true` or `train: false` instead")
