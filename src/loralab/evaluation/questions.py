"""Questions from tokenized rows: what is asked, and which rows a bounded sample takes.

Owns which rows can be asked. Owns no answers: those are `generate.py`'s, `score.py`'s and `teacher_forced.py`'s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loralab.data.example import Branch, TokenizedExample
from loralab.data.prompts.prompter import Prompter
from loralab.data.tokens.store import TokenStore
from loralab.errors import DataError
from loralab.evaluation.answers import Question

# Plain text is predicted from its first token on, which stands where a prompt would.
_LEAST_PROMPT = 2
# Answers of at most so many tokens are decoded once, however many rows have them.
_SHORT_ANSWER = 8


class _StoredQuestion(Question):
    """A question whose ids and prompt are made when they are read, since a split may have many long prompts."""

    __slots__ = ("_branch", "_prompter")
    _branch: Branch
    _prompter: Prompter

    def __init__(self, unit: int, example: TokenizedExample, branch: Branch, prompter: Prompter) -> None:
        values = {
            "unit": unit,
            "row": example.row,
            "source": example.source,
            "reference": prompter.decode(branch.answer_ids.tolist()),
            "images": tuple(branch.images),
            "_branch": branch,
            "_prompter": prompter,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def with_unit(self, unit: int) -> "_StoredQuestion":
        other = object.__new__(_StoredQuestion)
        for name in ("row", "source", "reference", "images", "_branch", "_prompter"):
            object.__setattr__(other, name, getattr(self, name))
        object.__setattr__(other, "unit", unit)
        return other

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return tuple(self._branch.prompt_ids.tolist())

    @property
    def reference_ids(self) -> tuple[int, ...]:
        return tuple(self._branch.answer_ids.tolist())

    @property
    def prompt(self) -> str:
        # Not `decode`: a prompt may end with a stop token, that of the turn before.
        ids = self._prompter.fold(self._branch.prompt_ids.tolist(), self._branch.images)
        return str(self._prompter.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def __reduce__(self) -> tuple[Any, ...]:
        asked = self.prompt_ids, self.reference_ids, self.prompt, self.reference, self.images
        return Question, (self.unit, self.row, self.source, *asked)


def questions_of(
    examples: Sequence[TokenizedExample], prompter: Prompter, rows: Sequence[int] | None = None
) -> list[Question]:
    """Return one question for each trained turn of the rows that are measured.

    Args:
        examples: a split.
        prompter: decodes prompts and references.
        rows: indices of the rows that are measured, in order; None takes all.

    Raises:
        DataError: a row has no prompt of its own (plain text).
    """
    chosen = range(len(examples)) if rows is None else rows
    found: list[Question] = []
    for unit, example in enumerate(examples[index] for index in chosen):
        for branch in example.branches:
            if len(branch.prompt_ids) < _LEAST_PROMPT:
                raise _asks_nothing(len(branch.prompt_ids), example.row)
            found.append(_StoredQuestion(unit, example, branch, prompter))
    return found


def with_unit(question: Question, unit: int) -> Question:
    """Return the same question, its row under another number."""
    return question.with_unit(unit) if isinstance(question, _StoredQuestion) else replace(question, unit=unit)


def _asks_nothing(prompt: int, row: int) -> DataError:
    return DataError(
        f"a row with a prompt of {prompt} token: plain text (data.format: text) asks nothing that could be answered",
        where=f"row {row}",
        fix="choose metrics that are measured on losses (perplexity, token_accuracy, token_entropy), "
        "or data with prompts and answers",
    )


def answerable_rows(split: TokenStore, name: str) -> TokenStore:
    """Return the rows whose answers are whole: one that was cut at `data.max_length` is not what the data says.

    Args:
        split: the rows.
        name: of the split, for the message.

    Raises:
        DataError: a row has no prompt of its own, or the answers of all rows were cut.
    """
    longest_prompt(split)  # text may be cut too, but has no answers
    whole = np.ones(len(split), dtype=bool)
    whole[split.noted("truncated")] = False
    if len(split) and not whole.any():
        raise DataError(
            f"the answers of all {len(split)} rows were cut at data.max_length, so nothing says what is right",
            where=f"split {name}",
            fix="raise data.max_length, or choose metrics that are measured on losses "
            "(perplexity, token_accuracy, token_entropy)",
        )
    return split.select(np.flatnonzero(whole))


def longest_prompt(split: TokenStore) -> int:
    """Return the tokens of the longest prompt, 0 where there are no rows.

    Raises:
        DataError: a row has no prompt of its own (plain text).
    """
    longest, start = 0, 0
    for counts, branches in split.branch_blocks():
        prompts = branches[:, 1]
        texts = np.flatnonzero(prompts < _LEAST_PROMPT)
        if len(texts):
            index = start + int(np.searchsorted(np.cumsum(counts), texts[0], side="right"))
            raise _asks_nothing(int(prompts[texts[0]]), split[index].row)
        longest, start = max(longest, int(prompts.max(initial=0))), start + len(counts)
    return longest


def references_of(split: TokenStore, prompter: Prompter) -> Iterator[Question]:
    """Yield the questions of all rows with their references alone: no ids and no prompts, which take much memory.

    Args:
        split: the rows.
        prompter: decodes references.
    """
    known: dict[bytes, str] = {}
    for unit in range(len(split)):
        example = split[unit]
        for branch in example.branches:
            key = branch.answer_ids.tobytes() if len(branch.answer_ids) <= _SHORT_ANSWER else b""
            reference = known.get(key)
            if reference is None:
                reference = prompter.decode(branch.answer_ids.tolist())
                if key:
                    known[key] = reference
            yield Question(unit, example.row, example.source, (), (), "", reference)


def spread(count: int, limit: int | None) -> list[int]:
    """Return the indices of at most `limit` of `count` rows, evenly spread; None takes all.

    The same rows each time: figures of two steps, or of base and adapter, are of the same rows.
    """
    if limit is None or limit >= count:
        return list(range(count))
    return [(2 * place + 1) * count // (2 * limit) for place in range(limit)]


def as_example(question: Question, answers: Sequence[Sequence[int]]) -> TokenizedExample:
    """Return a question with answers behind its prompt, one branch for each.

    Args:
        question: gives the prompt and its pictures.
        answers: token ids of each answer; at least one token each.
    """
    prompt = np.asarray(question.prompt_ids, dtype=np.int32)
    branches = tuple(Branch(prompt, np.asarray(answer, dtype=np.int32), question.images) for answer in answers)
    return TokenizedExample(question.row, question.source, branches)
