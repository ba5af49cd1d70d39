"""Rows that no template touches: text, preformatted segments, and tokens made elsewhere.

Owns the checks that such rows agree with themselves: lengths, labels and attention mask.
"""

from itertools import pairwise

from loralab.data.example import Document, Example, Preformatted, Segment, Tokens
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

_LARGEST_ID = 2**31  # tokens are stored as int32
_FLAGS = ("train", "label")


def build_text(row: Fields) -> Example:
    """Build a document from `text`."""
    return Document(text_field(row, "text"))


def build_segments(row: Fields) -> Example:
    """Build preformatted text from `segments`: `text` and `train` (or `label`) of each, in order."""
    if row.get("segments") is None:
        raise missing(row, "segments")
    items = read_list(row["segments"], "field 'segments'")
    segments = tuple(_read_segment(item, f"segments[{number}]") for number, item in enumerate(items))
    if not any(segment.train and segment.text for segment in segments):
        raise RowError(f"none of the {len(segments)} segments has text to train on: set train: true on one")
    return Preformatted(segments)


def _read_segment(value: object, place: str) -> Segment:
    item = read_object(value, place)
    flags = [key for key in _FLAGS if key in item]
    if "text" not in item or len(flags) != 1 or len(item) != 2:
        raise RowError(f"{place} is not made of text and train (or label); its keys: {list_names(item)}")
    return Segment(read_text(item["text"], f"{place}.text"), read_flag(item[flags[0]], f"{place}.{flags[0]}"))


def build_tokenized(row: Fields) -> Example:
    """Build tokens from `input_ids`, optional `attention_mask`, and `labels`.

    Positions that the attention mask leaves out before and behind the row are padding and go,
    whatever their token is.
    """
    ids, labels = _integers(row, "input_ids"), _integers(row, "labels")
    mask = _integers(row, "attention_mask") if row.get("attention_mask") is not None else [1] * len(ids)
    if not len(ids) == len(labels) == len(mask):
        raise RowError(f"lengths differ: input_ids {len(ids)}, labels {len(labels)}, attention_mask {len(mask)}")
    strange = next((i for i in ids if not 0 <= i < _LARGEST_ID), None)
    if strange is not None:
        raise RowError(f"field 'input_ids' holds {show(strange)}, which is no token id")
    start, end = _kept(ids, labels, mask)
    for position in range(start, end):
        if labels[position] not in (-100, ids[position]):
            raise RowError(
                f"label {show(labels[position])} at position {position} is neither -100 nor that position's token "
                f"{ids[position]}"
            )
    return Tokens(tuple(ids[start:end]), tuple(labels[start:end]), masked_end=ids[end] if 0 < end < len(ids) else None)


def _kept(ids: list[int], labels: list[int], mask: list[int]) -> tuple[int, int]:
    """Return where the row begins and ends that the attention mask keeps.

    Raises:
        RowError: the mask holds something else than 0 and 1, keeps two parts, or leaves out what a
            label trains; padding that is told by a token's id does the last two to end tokens.
    """
    strange = next((value for value in mask if value not in (0, 1)), None)
    if strange is not None:
        raise RowError(f"field 'attention_mask' holds {show(strange)}; it may hold 0 and 1")
    trained = next((p for p, keep in enumerate(mask) if not keep and labels[p] != -100), None)
    if trained is not None:
        raise RowError(
            f"attention_mask leaves out position {trained} (token {ids[trained]}), which has a label: padding has "
            "label -100, a token to train has 1 in the mask"
        )
    starts = [p for p, (before, now) in enumerate(pairwise([0, *mask])) if now > before]
    if len(starts) > 1:
        hole = mask.index(0, starts[0])
        raise RowError(
            f"attention_mask leaves out position {hole} (token {ids[hole]}) between positions that it keeps; "
            "padding stands before or behind a row"
        )
    start = starts[0] if starts else len(ids)
    return (start, start + sum(mask)) if starts else (0, 0)


def _integers(row: Fields, name: str) -> list[int]:
    value = row.get(name)
    if value is None:
        raise missing(row, name)
    # A boolean is an int to Python, and no token id.
    if not isinstance(value, (list, tuple)) or not all(type(i) is int for i in value):
        raise RowError(f"field {name!r} is not a list of whole numbers: {show(value)}")
    return list(value)
