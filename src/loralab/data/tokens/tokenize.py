"""From `Example` to tokens: turns become branches of prompt and answer.

Owns what is supervised, truncation and text windows. Knows the tokenizer (through the
`Prompter`) and no column names.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from loralab.data.example import (
    Branch,
    Conversation,
    Document,
    Example,
    Message,
    PlacedImage,
    Preformatted,
    Tokens,
)
from loralab.data.prompts.prompter import Prompter, adds_bos
from loralab.data.prompts.turns import TrainOn, Turn, split_turns, trained_turns
from loralab.errors import DataError, MaskError, TemplateError

IGNORED = -100

# What a row may have been through, by name. The cache keeps one bit for each, in this order: append only.
NOTES = (
    "truncated",  # an answer or text was cut at max_length, and does not learn to stop
    "turns_dropped",  # oldest turns left out of a prompt, to fit max_length
    "empty_answer",  # an answer holds nothing but its stop token
    "answer_altered",  # the template trimmed or rewrote an answer
    "reasoning_left_out",  # the template writes nothing of an answer's reasoning
    "no_stop",  # an answer that was not cut ends without a stop token
    "system_left_out",  # the template writes nothing of a system message
    "question_altered",  # the question before an answer is not in its prompt as the row has it
    "tools_left_out",  # the template writes nothing of the tools that may be called
    "turns_cut",  # a turn whose prompt fills max_length is left out, and those behind it
    "end_left_out",  # of train_on: all, messages behind the last answer
)
# Of a long conversation, so many turns are rendered at a time: those behind one that does not fit are not needed.
_TURNS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class TokenizeSettings:
    """The part of the data section that decides on tokens.

    Attributes:
        train_on: which turns carry loss: response, last_response, all, or roles.
        max_length: longest branch, in tokens.
        truncation: what happens to a longer conversation.
        long_text: what happens to longer text.
        system: system message put before conversations that have none, or None.
    """

    train_on: TrainOn
    max_length: int
    truncation: Literal["right", "left", "drop", "error"]
    long_text: Literal["split", "truncate"]
    system: str | None = None


@dataclass(slots=True)
class Unit:
    """One training row to be: its branches, or the reason why there are none.

    Attributes:
        branches: prompts and answers; empty when dropped.
        dropped: why the unit was left out, or None.
        notes: what it has been through, of `NOTES`.
        system: system message that the conversation begins with, or None.
    """

    branches: list[Branch] = field(default_factory=list)
    dropped: str | None = None
    notes: set[str] = field(default_factory=set)
    system: str | None = None


def tokenize_examples(
    examples: Sequence[Example], *, prompter: Prompter, settings: TokenizeSettings
) -> Iterator[list[Unit]]:
    """Yield the units of each example: one for a conversation, one per window for text.

    All texts go through the tokenizer in one call.

    Raises:
        DataError: the template fails, or an example is too long and `truncation` is "error".
        MaskError: what would carry loss is not the answer.
    """
    examples = [_with_system(example, settings) for example in examples]
    places = [
        trained_turns(example.messages, settings.train_on) if isinstance(example, Conversation) else []
        for example in examples
    ]
    requests = [
        (example, place)
        for example, own in zip(examples, places, strict=True)
        if isinstance(example, Conversation)
        for place in own[:_TURNS_AT_ONCE]
    ]
    documents = iter(prompter.encode([example.text for example in examples if isinstance(example, Document)]))
    encoded = iter(_encode(split_turns(requests, prompter), prompter))
    for example, own in zip(examples, places, strict=True):
        if isinstance(example, Conversation):
            first = list(itertools.islice(encoded, min(len(own), _TURNS_AT_ONCE)))
            yield [_conversation_unit(_Talk(example, own, first), prompter, settings)]
        elif isinstance(example, Document):
            yield _document_units(next(documents), prompter, settings)
        elif isinstance(example, Preformatted):
            yield [_preformatted_unit(example, prompter, settings)]
        else:
            yield [_tokens_unit(example, prompter, settings)]


def _with_system(example: Example, settings: TokenizeSettings) -> Example:
    if settings.system is None or not isinstance(example, Conversation):
        return example
    if any(message.role == "system" for message in example.messages):
        return example
    return Conversation((Message("system", settings.system), *example.messages), example.tools)


@dataclass(slots=True)
class _Encoded:
    """A turn as tokens."""

    turn: Turn
    prompt: list[int]
    answer: list[int]
    images: tuple[PlacedImage, ...] = ()


def _encode(turns: Sequence[Turn], prompter: Prompter) -> list[_Encoded]:
    prompts = prompter.encode([turn.prompt for turn in turns])
    answers = prompter.encode_answers([turn.answer for turn in turns])
    encoded = []
    for turn, prompt, answer in zip(turns, prompts, answers, strict=True):
        placed, images = prompter.place(prompt, turn.images)
        _refuse_marker(answer, prompter)
        encoded.append(_Encoded(turn, placed, answer, images))
    return encoded


def _refuse_marker(answer: Sequence[int], prompter: Prompter) -> None:
    """Refuse text that holds the token of pictures, which would take a feature where there is none."""
    if prompter.pictures is not None and prompter.pictures.token in answer:
        raise TemplateError(
            f"a text holds {prompter.pictures.marker}, which stands for a picture",
            where="the row's text",
            fix="take that token out of the text, or set data.on_bad_row: drop",
        )


@dataclass(frozen=True, slots=True)
class _Talk:
    """A conversation with its trained turns, the first of which are tokens already."""

    example: Conversation
    places: Sequence[int]
    first: Sequence[_Encoded]


def _conversation_unit(talk: _Talk, prompter: Prompter, settings: TokenizeSettings) -> Unit:
    messages, unit = talk.example.messages, Unit()
    if not talk.places:
        return Unit(dropped="no_assistant_turn" if isinstance(settings.train_on, str) else "no_trained_turn")
    if messages[0].role == "system":
        unit.system = messages[0].content
    if settings.train_on == "all" and talk.places[-1] < len(messages) - 1:
        unit.notes.add("end_left_out")
    turns = _newest_parts(talk, prompter, settings) if settings.truncation == "left" else _whole_turns(talk, prompter)
    for encoded, shortened in turns:
        dropped = _add_turn(unit, encoded, prompter, settings)
        if dropped == "prompt_too_long" and unit.branches:
            unit.notes.add("turns_cut")
            break
        if dropped is not None:
            return Unit(dropped=dropped)
        if shortened:
            unit.notes.add("turns_dropped")
    return unit


def _whole_turns(talk: _Talk, prompter: Prompter) -> Iterator[tuple[_Encoded, bool]]:
    """Yield each turn behind everything that was said before it."""
    yield from ((encoded, False) for encoded in talk.first)
    for start in range(len(talk.first), len(talk.places), _TURNS_AT_ONCE):
        requests = [(talk.example, place) for place in talk.places[start : start + _TURNS_AT_ONCE]]
        yield from ((encoded, False) for encoded in _encode(split_turns(requests, prompter), prompter))


def _newest_parts(talk: _Talk, prompter: Prompter, settings: TokenizeSettings) -> Iterator[tuple[_Encoded, bool]]:
    """Yield each turn behind as much of what was said before it as fits, and whether something was left out."""
    start = 0  # what had no room before an earlier turn has none before a later one
    for number, place in enumerate(talk.places):
        if not start and number < len(talk.first):
            encoded = talk.first[number]
        else:
            encoded = _encode_from(talk.example, start, place, prompter)
        if _length(encoded, prompter) > settings.max_length:
            encoded, start = _drop_oldest(talk.example, start, place, prompter, settings.max_length) or (encoded, start)
        yield encoded, start > 0


def _encode_from(example: Conversation, start: int, place: int, prompter: Prompter) -> _Encoded:
    """Return a turn without the messages before `start`, but for system messages."""
    messages = example.messages
    kept = (*(m for m in messages[:start] if m.role == "system"), *messages[start : place + 1])
    (turn,) = split_turns([(Conversation(kept, example.tools), len(kept) - 1)], prompter)
    (encoded,) = _encode([turn], prompter)
    return encoded


def _ended(encoded: _Encoded, stops: Sequence[int]) -> list[int]:
    """Return the ids of an answer with its stop token, whether the template wrote one or not."""
    answer = encoded.answer
    return answer if not encoded.turn.answered or (answer and answer[-1] in stops) else [*answer, stops[0]]


def _length(encoded: _Encoded, prompter: Prompter) -> int:
    return len(encoded.prompt) + len(_ended(encoded, prompter.stop.ids))


def _drop_oldest(
    example: Conversation, start: int, place: int, prompter: Prompter, max_length: int
) -> tuple[_Encoded, int] | None:
    """Return a turn behind as many of the newest whole exchanges as fit, and where they begin; None if none does.

    By halving, since fewer exchanges are shorter: a long conversation has too many starts to render each.
    """
    messages = example.messages
    starts = [
        index
        for index in range(start + 1, place)
        if messages[index].role == "user" and any(message.role != "system" for message in messages[:index])
    ]
    fitting: tuple[_Encoded, int] | None = None
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        encoded = _encode_from(example, starts[middle], place, prompter)
        if _length(encoded, prompter) <= max_length:
            fitting, high = (encoded, starts[middle]), middle
        else:
            low = middle + 1
    return fitting


def _add_turn(unit: Unit, encoded: _Encoded, prompter: Prompter, settings: TokenizeSettings) -> str | None:
    """Add a turn's branch to `unit`; return why the row must be dropped, or None."""
    stops, prompt, answer = prompter.stop.ids, encoded.prompt, _ended(encoded, prompter.stop.ids)
    ends = len(answer) - 1 if answer and answer[-1] in stops else len(answer)
    if any(token in stops for token in answer[:ends]):
        return "stop_token_inside_answer"
    if not prompt:
        return "empty_prompt"
    if not answer:  # the content of another role than the assistant's
        return "empty_turn"
    notes = set(encoded.turn.notes)
    length = len(prompt) + len(answer)
    if settings.train_on == "all":
        if encoded.images:
            raise DataError(
                "a row with a picture under data.train_on 'all': there is no label for what stands for a picture",
                where="key data.train_on",
                fix="set data.train_on: response, or a list of roles",
            )
        prompt, answer = prompt[:1], [*prompt[1:], *answer]
    if length > settings.max_length:
        dropped = _refuse_long(len(prompt), length, settings)
        if dropped is not None:
            return dropped
        answer = answer[: settings.max_length - len(prompt)]
        notes.add("truncated")
    _refuse_doubled_bos([*prompt[:2], *answer[:1]], prompter)  # of `all`, the prompt is one token
    unit.branches.append(_branch(prompt, answer, encoded.images))
    unit.notes |= notes  # not before: a turn that is left out leaves no trace
    return None


def _refuse_doubled_bos(ids: Sequence[int], prompter: Prompter) -> None:
    bos = prompter.tokenizer.bos_token_id
    # Where the end token is the bos token, two of them may be an end and a beginning.
    if bos is None or bos in prompter.stop.ids or list(ids[:2]) != [bos, bos]:
        return
    raise MaskError(
        f"the row begins with two bos tokens ({prompter.tokenizer.bos_token!r} twice), which no model has learned",
        where="key data.template",
        fix="take bos_token out of the template, or the text of that token out of the row",
    )


def _refuse_long(prompt_length: int, length: int, settings: TokenizeSettings) -> str | None:
    if settings.truncation == "error":
        raise DataError(
            f"{length} tokens, but data.max_length is {settings.max_length}",
            where="key data.truncation (error)",
            fix="raise data.max_length, or set data.truncation: right, left or drop",
        )
    if settings.truncation in ("drop", "left"):
        return "too_long"
    return "prompt_too_long" if prompt_length >= settings.max_length else None


def _document_units(ids: list[int], prompter: Prompter, settings: TokenizeSettings) -> list[Unit]:
    if not ids:
        return [Unit(dropped="empty_text")]
    _refuse_marker(ids, prompter)
    bos = prompter.tokenizer.bos_token_id if adds_bos(prompter.tokenizer) else None
    ids = [*([] if bos is None else [bos]), *ids, prompter.stop.ids[0]]
    # Each window begins with the last token of the one before, so every token is predicted once.
    step = settings.max_length - 1
    if step < 1:
        return [Unit(dropped="max_length_below_2")]
    windows = [ids[start : start + settings.max_length] for start in range(0, len(ids) - 1, step)]
    if settings.long_text == "truncate":
        notes = {"truncated"} if len(windows) > 1 else set()
        return [Unit([_branch(windows[0][:1], windows[0][1:])], notes=notes)]
    return [Unit([_branch(window[:1], window[1:])]) for window in windows]


def _preformatted_unit(example: Preformatted, prompter: Prompter, settings: TokenizeSettings) -> Unit:
    first, *others = [segment.text for segment in example.segments]
    pieces = [*prompter.encode([first]), *prompter.encode_answers(others)]
    ids = [token for piece in pieces for token in piece]
    trained = [
        segment.train for segment, piece in zip(example.segments, pieces, strict=True) for _ in range(len(piece))
    ]
    labels = [token if train else IGNORED for token, train in zip(ids, trained, strict=True)]
    return _tokens_unit(Tokens(tuple(ids), tuple(labels)), prompter, settings)


def _tokens_unit(example: Tokens, prompter: Prompter, settings: TokenizeSettings) -> Unit:
    length = len(example.input_ids)
    if length > settings.max_length and settings.truncation != "right":
        dropped = _refuse_long(0, length, settings)
        if dropped is not None:
            return Unit(dropped=dropped)
    ids, labels = example.input_ids[: settings.max_length], example.labels[: settings.max_length]
    # The first position has nothing before it that could predict it.
    spans = _supervised_spans([IGNORED, *labels[1:]])
    if not spans:
        return Unit(dropped="no_supervised_tokens")
    _refuse_doubled_bos(ids, prompter)
    _refuse_marker(ids, prompter)
    cut = length > settings.max_length
    notes = {"truncated"} if cut else set()
    # Text of which all carries loss need not end; an answer behind a prompt must.
    ends = [end for _, end in spans if not (cut and end == len(ids))] if spans != [(1, len(ids))] else []
    if any(ids[end - 1] not in prompter.stop.ids for end in ends):
        notes.add("no_stop")
    return Unit([_branch(ids[:start], ids[start:end]) for start, end in spans], notes=notes)


def _supervised_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    on = np.concatenate([[False], np.asarray(labels) != IGNORED, [False]])
    edges = np.flatnonzero(on[1:] != on[:-1])
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _branch(prompt: Sequence[int], answer: Sequence[int], images: Sequence[PlacedImage] = ()) -> Branch:
    return Branch(np.asarray(prompt, dtype=np.int32), np.asarray(answer, dtype=np.int32), images)
