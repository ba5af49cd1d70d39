"""Proofs of rows that no template touches: documents, segments, and tokens that were made elsewhere."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loralab.data.example import Document, Preformatted, Segment, Tokens
from loralab.data.proofs.prove import StoredRow
from unit.data.prompters import conversation
from unit.data.stored_rows import CHAT, changed, kinds, prove, stored

PLAIN = st.text(st.characters(exclude_categories=["Cs"]))


@given(text=PLAIN.filter(bool))
def test_documents_are_proven(text: str) -> None:
    assume("<|" not in text)
    row = stored(Document(text), CHAT, max_length=4)
    assert prove(row, max_length=4) == []


def test_documents_with_lost_tokens_are_not() -> None:
    row = stored(Document("one two three red blue green cat dog bird"), CHAT, max_length=4)
    lacking = StoredRow(row.source, row.row, row.example, (row.units[0], *row.units[2:]))
    assert kinds(prove(lacking, max_length=4)) == ["text_differs"]
    assert kinds(prove(StoredRow(row.source, row.row, row.example, row.units[:-1]), max_length=4)) == ["text_differs"]
    cut = stored(row.example, CHAT, max_length=4, long_text="truncate")
    assert kinds(prove(cut, max_length=4, long_text="truncate")) == ["cut"]


SEGMENTS = Preformatted(
    (
        Segment("Q: a\nA:", False),
        Segment(" b", True),
        Segment("<|stop|>", True),
        Segment(" Q: c\nA:", False),
        Segment(" d<|stop|>", True),
    )
)


def test_segments_are_proven() -> None:
    row = stored(SEGMENTS, CHAT)
    assert prove(row) == []
    first, second = row.branches
    assert kinds(
        prove(changed(row, (first.prompt_ids, first.answer_ids[:1]), (second.prompt_ids, second.answer_ids)))
    ) == ["answer_differs"]
    unended = Preformatted((Segment("Q: a\nA:", False), Segment(" b", True)))
    assert kinds(prove(stored(unended, CHAT))) == ["no_stop"]
    whole = Preformatted((Segment("Q: a\nA: b", True),))
    assert prove(stored(whole, CHAT)) == []


# --- tokens made elsewhere


def tokens_row(text: str, *, train: str, longest: int = 99, masked_end: int | None = None) -> StoredRow:
    """Return a row of tokens; in `train`, x stands under each character that carries loss."""
    encoding = CHAT.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    labels = [i if "x" in train[a:b] else -100 for i, (a, b) in zip(ids, encoding["offset_mapping"], strict=True)]
    row = stored(Tokens(tuple(ids), tuple(labels), masked_end=masked_end), CHAT)
    return StoredRow(row.source, row.row, row.example, row.units, longest=longest)


def masked(text: str, *parts: str) -> str:
    marks = [" "] * len(text)
    for part in parts:
        at = text.rindex(part)
        marks[at : at + len(part)] = "x" * len(part)
    return "".join(marks)


CHATTED = "<|start|>user\nred<|stop|>\n<|start|>assistant\nblue<|stop|>"


@pytest.mark.parametrize(
    ("text", "parts", "masked_end", "expected"),
    [
        (CHATTED, ["blue<|stop|>"], None, []),
        (CHATTED, ["blue<|stop|>"], 0, []),  # padded with the end token, as it should be
        (CHATTED, ["blue"], None, ["stop_masked"]),
        (CHATTED.removesuffix("<|stop|>"), ["blue"], 0, ["stop_masked"]),
        (CHATTED.removesuffix("<|stop|>"), ["blue"], 5, ["no_stop"]),
        (CHATTED.removesuffix("<|stop|>"), ["blue"], None, ["no_stop"]),
        (CHATTED, ["red<|stop|>", "blue<|stop|>"], None, []),  # nothing known of what was before a first turn
        (CHATTED * 2, ["red<|stop|>\n<|start|>assistant\nblue<|stop|>"], None, ["wrong_role"]),
        (CHATTED * 2, ["<|start|>user\nred<|stop|>\n<|start|>assistant\nblue<|stop|>"], None, ["wrong_role"]),
        (CHATTED, ["<|stop|>"], None, ["empty_answer"]),
    ],
)
def test_tokens_made_elsewhere(text: str, parts: list[str], masked_end: int | None, expected: list[str]) -> None:
    row = tokens_row(text, train=masked(text, *parts), masked_end=masked_end)
    found = prove(row, own=CHAT)
    if text == CHATTED and len(parts) == 2:
        expected = ["wrong_role"]
    assert kinds(found) == expected
    assert prove(tokens_row(CHATTED, train="x" * len(CHATTED)), own=CHAT) == []


def test_longest_rows_without_padding_were_cut() -> None:
    text = CHATTED.removesuffix("<|stop|>")
    length = len(CHAT.encode([text])[0])
    assert kinds(prove(tokens_row(text, train=masked(text, "blue"), longest=length), own=CHAT)) == ["cut"]


def test_tokens_beside_their_conversation_are_proven_in_full() -> None:
    twin = conversation("user: red", "assistant: blue")
    right = tokens_row(CHATTED, train=masked(CHATTED, "blue<|stop|>"))
    with_twin = StoredRow(right.source, right.row, right.example, right.units, twin=twin, longest=99)
    assert prove(with_twin, own=CHAT) == []
    other = StoredRow(
        right.source, right.row, right.example, right.units, twin=conversation("user: red", "assistant: cat")
    )
    assert kinds(prove(other, own=CHAT)) == ["answer_differs"]
    joined = CHATTED.replace("assistant\nblue", "assistant: blue")
    wrong = tokens_row(joined, train=masked(joined, "blue<|stop|>"))
    wrong = StoredRow(wrong.source, wrong.row, wrong.example, wrong.units, twin=twin)
    assert "prompt_differs" in kinds(prove(wrong, own=CHAT))
