"""Questions about pictures: picture, question and answer in columns of their own.

Owns which of several people's answers is trained.
"""

from collections import Counter
from collections.abc import Mapping

from loralab.data.example import Example, Message
from loralab.data.formats.chat import build_conversation
from loralab.data.formats.fields import Fields, RowError, missing, read_object, read_text, text_field
from loralab.data.formats.pairs import join_context
from loralab.data.formats.pictures import open_gallery

PICTURE_FIELD = "image"
PICTURE_ALIASES = ("images", "image_path", "img", "image_file", "picture")


def build_vqa(row: Fields) -> Example:
    """Build a conversation from `image` (one or a list), `question` and `answer`; optional `context` and `system`.

    Pictures stand before the text of the user turn, unless it has an `<image>` for each of them.
    """
    gallery = open_gallery(row)
    if not gallery.pictures:
        name = next((name for name in (*PICTURE_ALIASES, PICTURE_FIELD) if name in row), None)
        raise missing(row, PICTURE_FIELD) if name is None else RowError(f"field {name!r} is null or empty: no picture")
    context, question = text_field(row, "context", default=""), text_field(row, "question")
    text = join_context(context, question)
    parts = gallery.split(text, "field 'question'")
    said = "".join(part for part in parts if isinstance(part, str)) if parts else text
    messages = [Message("user", said, parts=parts), Message("assistant", _read_answer(row))]
    return build_conversation(row, gallery.settle(messages))


def _read_answer(row: Fields) -> str:
    """Return the answer; of a list, as of several annotators, the most frequent one, of equals the first."""
    value = row.get("answer")
    if not isinstance(value, (list, tuple)):
        return text_field(row, "answer")
    if not value:
        raise RowError("field 'answer' is an empty list")
    answers = [_read_one(item, f"answer[{number}]") for number, item in enumerate(value)]
    return Counter(answers).most_common(1)[0][0]


def _read_one(value: object, place: str) -> str:
    if not isinstance(value, Mapping):
        return read_text(value, place)
    item = read_object(value, place)
    if "answer" not in item:
        raise RowError(f"{place} has no 'answer'")
    return read_text(item["answer"], f"{place}.answer")
