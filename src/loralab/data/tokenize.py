"""From `Example` to tokens: turns become branches of prompt and answer.

Owns what is supervised, truncation and text windows. Knows the tokenizer (through the
`Prompter`) and no column names.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from loralab.data.example import Branch, Conversation, Document, Example, Tokens
from loralab.data.prompter import Prompter, adds_bos
from loralab.errors import DataError

IGNORED = -100


@dataclass(frozen=True, slots=True)
class TokenizeSettings:
    """The part of the data section that decides on tokens.

    Attributes:
        train_on: which answers carry loss.
        max_length: longest branch, in tokens.
        truncation: what happens to a longer conversation.
        long_text: what happens to longer text.
    """

    train_on: Literal["response", "last_response", "all"]
    max_length: int
    truncation: Literal["right", "drop", "error"]
    long_text: Literal["split", "truncate"]


@dataclass(slots=True)
class Unit:
    """One training row to be: its branches, or the reason why there are none.

    Attributes:
        branches: prompts and answers; empty when dropped.
        dropped: why the unit was left out, or None.
        truncated: whether an answer or text was cut.
        empty_answer: whether an answer holds nothing but its stop token.
    """

    branches: list[Branch] = field(default_factory=list)
    dropped: str | None = None
    truncated: bool = False
    empty_answer: bool = False


def tokenize_examples(
    examples: Sequence[Example], *, prompter: Prompter, settings: TokenizeSettings
) -> Iterator[list[Unit]]:
    """Yield the units of each example: one for a conversation, one per window for text.

    All texts go through the tokenizer in one call.

    Raises:
        DataError: the template fails, or an example is too long and `truncation` is "error".
    """
    prompts: list[str] = []
    answers: list[str] = []
    documents: list[str] = []
    turns = []
    for example in examples:
        texts = _turn_texts(example, prompter, settings) if isinstance(example, Conversation) else []
        turns.append(len(texts))
        prompts += [prompt for prompt, _ in texts]
        answers += [answer for _, answer in texts]
        documents += [example.text] if isinstance(example, Document) else []
    pairs = zip(prompter.encode(prompts), prompter.encode_answers(answers), strict=True)
    texts_ids = iter(prompter.encode(documents))
    for example, count in zip(examples, turns, strict=True):
        if isinstance(example, Conversation):
            yield [_conversation_unit(list(itertools.islice(pairs, count)), prompter, settings)]
        elif isinstance(example, Document):
            yield _document_units(next(texts_ids), prompter, settings)
        else:
            yield [_tokens_unit(example, settings)]


def _trained_turns(example: Conversation, settings: TokenizeSettings) -> list[int]:
    turns = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
    return turns if settings.train_on == "response" else turns[-1:]


def _turn_texts(example: Conversation, prompter: Prompter, settings: TokenizeSettings) -> list[tuple[str, str]]:
    return [prompter.split_turn(example.messages, turn) for turn in _trained_turns(example, settings)]


def _conversation_unit(
    turns: Sequence[tuple[list[int], list[int]]], prompter: Prompter, settings: TokenizeSettings
) -> Unit:
    unit = Unit()
    if not turns:
        return Unit(dropped="no_assistant_turn")
    for prompt, answer in turns:
        dropped = _add_turn(unit, prompt, answer, stops=prompter.stop.ids, settings=settings)
        if dropped is not None:
            return Unit(dropped=dropped)
    return unit


def _add_turn(
    unit: Unit, prompt: list[int], answer: list[int], *, stops: Sequence[int], settings: TokenizeSettings
) -> str | None:
    """Add a turn's branch to `unit`; return why the row must be dropped, or None."""
    ended = answer if answer and answer[-1] in stops else [*answer, stops[0]]
    if any(token in stops for token in ended[:-1]):
        return "stop_token_inside_answer"
    if not prompt:
        return "empty_prompt"
    unit.empty_answer |= len(ended) == 1
    length = len(prompt) + len(ended)
    if settings.train_on == "all":
        prompt, ended = prompt[:1], [*prompt[1:], *ended]
    if length > settings.max_length:
        dropped = _refuse_long(len(prompt), length, settings)
        if dropped is not None:
            return dropped
        ended, unit.truncated = ended[: settings.max_length - len(prompt)], True
    unit.branches.append(_branch(prompt, ended))
    return None


def _refuse_long(prompt_length: int, length: int, settings: TokenizeSettings) -> str | None:
    if settings.truncation == "error":
        raise DataError(
            f"{length} tokens, but data.max_length is {settings.max_length}",
            where="key data.truncation (error)",
            fix="raise data.max_length, or set data.truncation: right or drop",
        )
    if settings.truncation == "drop":
        return "too_long"
    return "prompt_too_long" if prompt_length >= settings.max_length else None


def _document_units(ids: list[int], prompter: Prompter, settings: TokenizeSettings) -> list[Unit]:
    if not ids:
        return [Unit(dropped="empty_text")]
    bos = prompter.tokenizer.bos_token_id if adds_bos(prompter.tokenizer) else None
    ids = [*([] if bos is None else [bos]), *ids, prompter.stop.ids[0]]
    # Each window begins with the last token of the one before, so every token is predicted once.
    step = settings.max_length - 1
    if step < 1:
        return [Unit(dropped="max_length_below_2")]
    windows = [ids[start : start + settings.max_length] for start in range(0, len(ids) - 1, step)]
    if settings.long_text == "truncate":
        truncated = len(windows) > 1
        return [Unit([_branch(windows[0][:1], windows[0][1:])], truncated=truncated)]
    return [Unit([_branch(window[:1], window[1:])]) for window in windows]


def _tokens_unit(example: Tokens, settings: TokenizeSettings) -> Unit:
    if len(example.input_ids) > settings.max_length and settings.truncation != "right":
        dropped = _refuse_long(0, len(example.input_ids), settings)
        if dropped is not None:
            return Unit(dropped=dropped)
    ids, labels = example.input_ids[: settings.max_length], example.labels[: settings.max_length]
    truncated = len(example.input_ids) > settings.max_length
    # The first position has nothing before it that could predict it.
    spans = _supervised_spans([IGNORED, *labels[1:]])
    if not spans:
        return Unit(dropped="no_supervised_tokens")
    return Unit([_branch(ids[:start], ids[start:end]) for start, end in spans], truncated=truncated)


def _supervised_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    on = np.concatenate([[False], np.asarray(labels) != IGNORED, [False]])
    edges = np.flatnonzero(on[1:] != on[:-1])
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _branch(prompt: Sequence[int], answer: Sequence[int]) -> Branch:
    return Branch(np.asarray(prompt, dtype=np.int32), np.asarray(answer, dtype=np.int32))
