"""Conversations to turns: the prompt text that serving sends, and the answer text behind it.

Owns which turns carry loss, where an answer begins and ends, and what rendering did to it. Works
on text; tokens are `tokenize.py`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from loralab.data.example import Conversation, ImageFile, Message
from loralab.data.prompts.prompter import Prompter
from loralab.errors import DataError, MaskError, TemplateError

TrainOn: TypeAlias = Literal["response", "last_response", "all"] | Sequence[str]
# Stands where the content of a turn begins; what is before it is the turn's header.
_CONTENT_MARK = "loralab-content-mark"


@dataclass(slots=True)
class Turn:
    """One trained turn as text.

    Attributes:
        prompt: what stands before it: for an assistant, the text of the serving call.
        answer: what carries loss, up to and including the stop token where the template writes one.
        answered: whether an assistant speaks, whose answer must end with a stop token.
        notes: what rendering did, by the names of `tokenize.NOTES`.
        images: pictures of the turns before it, in order.
    """

    prompt: str
    answer: str
    answered: bool = True
    notes: set[str] = field(default_factory=set)
    images: tuple[ImageFile, ...] = ()


def trained_turns(messages: Sequence[Message], train_on: TrainOn) -> list[int]:
    """Return the indices of the turns that carry loss.

    Args:
        messages: a conversation.
        train_on: `data.train_on`. Of `all`, the turn is the last answer; what is before it is then
            supervised with it.

    Raises:
        DataError: a turn says that it carries no loss, and `all` says that everything does.
    """
    if train_on == "all":
        left_out = next((number for number, message in enumerate(messages, 1) if not message.train), None)
        if left_out is not None:
            raise DataError(
                f"message {left_out} is not to be trained, but data.train_on is 'all'",
                where="key data.train_on",
                fix="set data.train_on: response, or a list of roles",
            )
    roles = ("assistant",) if isinstance(train_on, str) else tuple(train_on)
    turns = [index for index, message in enumerate(messages) if message.role in roles and message.train]
    # An assistant that speaks first answers no prompt that anybody could send.
    turns = [index for index in turns if index or messages[index].role != "assistant"]
    return turns[-1:] if train_on in ("last_response", "all") else turns


def split_turns(requests: Sequence[tuple[Conversation, int]], prompter: Prompter) -> list[Turn]:
    """Return the text of many turns, with few calls of the template engine.

    Args:
        requests: conversation and index of the turn in it.
        prompter: renders.

    Raises:
        TemplateError: the template refuses a conversation, or does not extend its own prompt.
        MaskError: what would carry loss is not the answer.
    """
    answers = [(c, turn) for c, turn in requests if c.messages[turn].role == "assistant"]
    heads = prompter.render_all([(c.messages[:turn], c.tools) for c, turn in answers], add_generation_prompt=True)
    wholes = prompter.render_all(
        [(c.messages[: turn + 1], c.tools) for c, turn in answers], add_generation_prompt=False
    )
    texts = iter(zip(heads, wholes, strict=True))
    return [
        _split_answer(conversation, turn, prompter, *next(texts))
        if conversation.messages[turn].role == "assistant"
        else _split_other(conversation, turn, prompter)
        for conversation, turn in requests
    ]


def _split_answer(conversation: Conversation, turn: int, prompter: Prompter, prompt: str, whole: str) -> Turn:
    message = conversation.messages[turn]
    if not whole.startswith(prompt):
        raise TemplateError(
            f"the template does not extend its own prompt at turn {turn + 1} ({message.role})",
            where="key data.template",
            fix="choose another data.template: with this one, training would not see what serving sends",
        )
    rest = whole[len(prompt) :]
    notes: set[str] = set()
    start, end = _find_content(rest, message.content, notes)
    _refuse_missing_prompt(rest[:start], turn, prompter)
    end = max(end, _check_calls(rest, message, turn, notes))
    if message.reasoning and message.reasoning.strip() not in rest:
        notes.add("reasoning_left_out")
    if not (message.content.strip() or message.reasoning or message.tool_calls):
        notes.add("empty_answer")  # told by the row: a template may write a blank before it
    notes |= _check_before(conversation, turn, prompt)
    stops = [rest.find(text, end) + len(text) for text in prompter.stop.texts if text in rest[end:]]
    answer = rest[: min(stops)] if stops else rest
    return Turn(prompt, answer, notes=notes, images=_images_of(conversation.messages[:turn]))


def _images_of(messages: Sequence[Message]) -> tuple[ImageFile, ...]:
    return tuple(part.file for message in messages for part in message.images if part.file is not None)


def _find_content(rest: str, content: str, notes: set[str]) -> tuple[int, int]:
    """Return where `content` begins and ends in what the template wrote of a turn (0, 0 where it is not there)."""
    if content in rest:
        at = rest.find(content)
        return at, at + len(content)
    notes.add("answer_altered")
    stripped = content.strip()
    if stripped in rest:
        at = rest.find(stripped)
        return at, at + len(stripped)
    return 0, 0


def _refuse_missing_prompt(lead: str, turn: int, prompter: Prompter) -> None:
    """Refuse a turn whose header would be trained as part of the answer, for want of a generation prompt."""
    if prompter.opens_answers or not lead.strip():
        return
    raise MaskError(
        f"the template writes no generation prompt: the answer of turn {turn + 1} would begin with {lead!r}",
        where="key data.template",
        fix="let the template write that where add_generation_prompt is set, or choose another data.template",
    )


def _check_calls(rest: str, message: Message, turn: int, notes: set[str]) -> int:
    """Return where the last tool call ends at the earliest; refuse a template that leaves a call out."""
    end = 0
    for call in message.tool_calls:
        if call.name not in rest:
            raise TemplateError(
                f"the template writes nothing of the tool call {call.name!r} of turn {turn + 1}",
                where="key data.template",
                fix="choose a template that writes tool calls, such as qwen, or set data.on_bad_row: drop",
            )
        end = max(end, rest.rfind(call.name) + len(call.name))
        if not isinstance(call.arguments, str) and not all(str(key) in rest for key in call.arguments):
            notes.add("answer_altered")
    return end


def _check_before(conversation: Conversation, turn: int, prompt: str) -> set[str]:
    """Return notes on what the prompt lacks of what the row says before its answer."""
    before = conversation.messages[:turn]
    notes = {
        "system_left_out" for message in before if message.role == "system" and message.content.strip() not in prompt
    }
    asked = next((message for message in reversed(before) if message.role == "user"), None)
    if asked is not None and any(text.strip() not in prompt for text in asked.texts):
        notes.add("question_altered")
    names = [_tool_name(tool) for tool in conversation.tools]
    if any(name and name not in prompt for name in names):
        notes.add("tools_left_out")
    return notes


def _tool_name(tool: object) -> str:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _split_other(conversation: Conversation, turn: int, prompter: Prompter) -> Turn:
    """Split the turn of a role that nobody prompts: its content carries loss, with a stop token right behind it."""
    message = conversation.messages[turn]
    if message.images:
        raise TemplateError(
            f"turn {turn + 1} ({message.role}) shows a picture, and would be trained whole",
            where="key data.train_on",
            fix=f"take {message.role!r} out of data.train_on: what carries loss is text alone",
        )
    before, tools = conversation.messages[:turn], conversation.tools
    marked = Message(message.role, _CONTENT_MARK + message.content, name=message.name, call_id=message.call_id)
    with_mark = prompter.render([*before, marked], add_generation_prompt=False, tools=tools)
    whole = prompter.render([*before, message], add_generation_prompt=False, tools=tools)
    head, found, _ = with_mark.rpartition(_CONTENT_MARK)
    content = next((text for text in (message.content, message.content.strip()) if whole.startswith(head + text)), None)
    if not found or content is None:
        raise TemplateError(
            f"cannot tell where the content of turn {turn + 1} ({message.role}) begins: the template rewrites it",
            where="key data.template",
            fix=f"take {message.role!r} out of data.train_on, or choose another data.template",
        )
    notes = set() if content == message.content else {"answer_altered"}
    behind = whole[len(head) + len(content) :]
    stop = next((text for text in prompter.stop.texts if behind.startswith(text)), "")
    return Turn(head, content + stop, answered=False, notes=notes, images=_images_of(before))
