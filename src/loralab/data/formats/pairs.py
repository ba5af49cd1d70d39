"""Rows of one question and one answer in columns of their own: alpaca, prompt and completion, yes or no.

Owns how columns join to the text of a user turn.
"""

from loralab.data.example import Example, Message
from loralab.data.formats.chat import build_conversation
from loralab.data.formats.fields import Fields, RowError, missing, read_list, read_text, show, text_field
from loralab.data.formats.pictures import refuse_media

# Between instruction and input in an Alpaca user turn; the alpaca template looks for it.
ALPACA_INPUT_MARK = "\n\n### Input:\n"
_BLANK_LINE = "\n\n"

_WORDS = {"yes": "yes", "true": "yes", "no": "no", "false": "no", "maybe": "maybe"}
# What a CSV file makes of 1 and 0; no word, so a format is not recognised by it.
_DIGITS = {"1": "yes", "0": "no"}


def build_alpaca(row: Fields) -> Example:
    """Build a conversation from `instruction`, optional `input`, and `output`; before them `system` and `history`.

    Source: Taori et al. 2023, Stanford Alpaca, data format.
    """
    refuse_media(row)
    instruction, context = text_field(row, "instruction"), text_field(row, "input", default="")
    question = f"{instruction}{ALPACA_INPUT_MARK}{context}" if context else instruction
    messages = [*_read_history(row), Message("user", question), Message("assistant", text_field(row, "output"))]
    return build_conversation(row, messages)


def _read_history(row: Fields) -> list[Message]:
    value = row.get("history")
    if value is None or value == "":
        return []
    messages = []
    for number, item in enumerate(read_list(value, "field 'history'")):
        place = f"history[{number}]"
        pair = item if isinstance(item, (list, tuple)) else ()
        if len(pair) != 2:
            raise RowError(f"{place} is no pair of question and answer: {show(item)}")
        messages.append(Message("user", read_text(pair[0], f"{place}[0]")))
        messages.append(Message("assistant", read_text(pair[1], f"{place}[1]")))
    return messages


def build_prompt_completion(row: Fields) -> Example:
    """Build a conversation of two turns from `prompt` and `completion`, used as they stand."""
    refuse_media(row)
    for name in ("prompt", "completion"):
        if isinstance(row.get(name), (list, dict)):
            raise RowError(f"field {name!r} holds messages: set data.format: conversational_prompt_completion")
    prompt, completion = text_field(row, "prompt"), text_field(row, "completion")
    return build_conversation(row, [Message("user", prompt), Message("assistant", completion)])


def build_question_answer(row: Fields) -> Example:
    """Build a conversation from `question`, optional `context` and `system`, and `answer`."""
    refuse_media(row)
    context, question = text_field(row, "context", default=""), text_field(row, "question")
    messages = [Message("user", join_context(context, question)), Message("assistant", text_field(row, "answer"))]
    return build_conversation(row, messages)


def build_yes_no(row: Fields) -> Example:
    """Build a conversation from `question`, optional `passage` and `system`, and `answer`, trained as one word."""
    refuse_media(row)
    passage, question = text_field(row, "passage", default=""), text_field(row, "question")
    messages = [Message("user", join_context(passage, question)), Message("assistant", _read_yes_no(row))]
    return build_conversation(row, messages)


def join_context(passage: str, question: str) -> str:
    """Return the user turn: the passage, a blank line, and the question; both as they stand."""
    return f"{passage}{_BLANK_LINE}{question}" if passage else question


def _read_yes_no(row: Fields) -> str:
    if "answer" not in row:
        raise missing(row, "answer")
    answer = row["answer"]
    word = yes_no_word(answer) or (_DIGITS.get(answer.strip()) if isinstance(answer, str) else None)
    if word is None:
        raise RowError(
            f"field 'answer' is {show(answer)}: not true, false, 1, 0, yes, no or maybe "
            "(free answers are format question_answer)"
        )
    return word


def yes_no_word(value: object) -> str | None:
    """Return "yes", "no" or "maybe" for a truth value, 1 or 0, or a word that says so; None for anything else."""
    if isinstance(value, (bool, int, float)):
        return ("no", "yes")[int(value)] if value in (0, 1) else None
    if isinstance(value, str):
        return _WORDS.get(value.strip().removesuffix(".").rstrip().lower())
    return None
