"""Questions from tokenized rows: what is asked, and which rows a bounded sample takes.

Owns no answers: those are `generate.py`'s, `score.py`'s and `teacher_forced.py`'s.
"""

from collections.abc import Sequence

import numpy as np

from loralab.data.example import Branch, TokenizedExample
from loralab.data.prompts.prompter import Prompter
from loralab.errors import DataError
from loralab.evaluation.answers import Question


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
    return [
        _question(unit, example, branch, prompter)
        for unit, example in enumerate(examples[index] for index in chosen)
        for branch in example.branches
    ]


def _question(unit: int, example: TokenizedExample, branch: Branch, prompter: Prompter) -> Question:
    prompt, reference = branch.prompt_ids.tolist(), branch.answer_ids.tolist()
    # Plain text is predicted from its first token on, which stands where a prompt would.
    if len(prompt) < 2:
        raise DataError(
            f"a row with a prompt of {len(prompt)} token: plain text (data.format: text) asks nothing that could be "
            "answered",
            where=f"row {example.row}",
            fix="choose metrics that are measured on losses (perplexity, token_accuracy, token_entropy), "
            "or data with prompts and answers",
        )
    return Question(
        unit=unit,
        row=example.row,
        source=example.source,
        prompt_ids=tuple(prompt),
        reference_ids=tuple(reference),
        # Not `decode`: a prompt may end with a stop token, that of the turn before.
        prompt=str(prompter.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)),
        reference=prompter.decode(reference),
    )


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
        question: gives the prompt.
        answers: token ids of each answer; at least one token each.
    """
    prompt = np.asarray(question.prompt_ids, dtype=np.int32)
    branches = tuple(Branch(prompt, np.asarray(answer, dtype=np.int32)) for answer in answers)
    return TokenizedExample(question.row, question.source, branches)
