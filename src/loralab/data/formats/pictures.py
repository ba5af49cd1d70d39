"""Pictures in rows: the values that name them, the columns that hold them, the places they go to.

Owns picture columns, `<image>` markers and what a picture's value may be. Opens no file:
`data/images/files.py` does.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from loralab.data.example import ImagePart, Message
from loralab.data.formats.fields import Fields, RowError, list_names, read_list, read_object, read_text, show

MARKER = "<image>"
COLUMNS = ("images", "image")
Parts = tuple[str | ImagePart, ...]
_OTHER_MEDIA = ("videos", "video", "audios", "audio")
_NOTHING: tuple[object, ...] = (None, "", "[]", [], ())
_DATA_URL = re.compile(r"data:(?P<kind>[^,]*),", re.IGNORECASE)
_SCHEME = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+)://", re.IGNORECASE)
# One line break that sets a marker apart from text goes with it.
_MARKER = re.compile(rf"(?:\r?\n)?{re.escape(MARKER)}(?:\r?\n)?")
_VALUE_KEYS = ("bytes", "path", "url")


def read_picture(value: object, place: str) -> ImagePart:
    """Return a picture: a path, the bytes of a file, or an object with `bytes`, `path` or `url`, in that order.

    A `data:` URL in base64 becomes bytes. Nothing is fetched.

    Args:
        value: what stands in the row.
        place: where, for messages.

    Raises:
        RowError: it is empty, on the network, or nothing of these.
    """
    if isinstance(value, Mapping):
        item = read_object(value, place)
        key = next((key for key in _VALUE_KEYS if item.get(key) not in (None, "", b"")), None)
        if key is None:
            raise RowError(f"{place} holds no picture: none of {', '.join(_VALUE_KEYS)}; its keys: {list_names(item)}")
        value, place = item[key], f"{place}.{key}"
    if value in (None, "", b""):
        raise RowError(f"{place} is {'null' if value is None else 'empty'}: no picture")
    if isinstance(value, (bytes, bytearray)):
        return ImagePart(bytes(value))
    if not isinstance(value, str):
        raise RowError(f"{place} is {type(value).__name__}, neither a path nor the bytes of a picture: {show(value)}")
    return ImagePart(_read_source(read_text(value, place), place))


def _read_source(text: str, place: str) -> str | bytes:
    found = _DATA_URL.match(text)
    if found is not None:
        return _decode_data_url(text[found.end() :], found["kind"].lower(), place)
    if not text.strip():
        raise RowError(f"{place} is empty: no picture")
    scheme = _SCHEME.match(text)
    if scheme is not None and scheme["scheme"].lower() != "file":
        raise RowError(f"{place} is {show(text)}: pictures are not fetched: download them beside the data")
    return text


def _decode_data_url(text: str, kind: str, place: str) -> bytes:
    if not kind.endswith(";base64"):
        raise RowError(f"{place} is a data: URL without base64: {show(kind)}")
    try:
        data = base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"{place} is a data: URL that is no base64 ({error})") from None
    if not data:
        raise RowError(f"{place} is a data: URL without data: no picture")
    return data


def read_pictures(value: object, place: str) -> list[ImagePart]:
    """Return the pictures of a field that holds one or a list of them; a list may be JSON text.

    Raises:
        RowError: one of them is no picture.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = read_list(value, place)
    if isinstance(value, (list, tuple)):
        return [read_picture(item, f"{place}[{number}]") for number, item in enumerate(value)]
    return [read_picture(value, place)]


def refuse_other_media(row: Fields) -> None:
    """Refuse a row that has a video or sound beside its text.

    Raises:
        RowError: it has.
    """
    for name in _OTHER_MEDIA:
        if row.get(name) not in _NOTHING:
            raise RowError(
                f"field {name!r} holds {show(row[name])}: videos and sound are not read "
                "(drop the column if the text stands without it)"
            )


def refuse_media(row: Fields) -> None:
    """Refuse a row that has a picture, video or sound, in a format whose turns hold text only.

    Raises:
        RowError: it has.
    """
    refuse_other_media(row)
    for name in COLUMNS:
        if row.get(name) not in _NOTHING:
            raise RowError(
                f"field {name!r} holds {show(row[name])}: this format holds text only; use format vqa or messages "
                "for pictures (drop the column if the text stands without it)"
            )


@dataclass(slots=True)
class Gallery:
    """The pictures in a row's column, and which of them its turns have asked for.

    Attributes:
        pictures: of the column, in order.
        column: its name, for messages; "" where the row has none.
        marked: whether `<image>` in a text stands for a picture: where the row has a column of them, even if
            it is empty. Where there is none, the word is text as any other.
    """

    pictures: Sequence[ImagePart] = ()
    column: str = ""
    marked: bool = False
    _asked: list[int] = field(default_factory=list)
    _next: int = 0

    def take(self, place: str, *, number: int | None = None) -> ImagePart:
        """Return the next picture, or the one of a number from 0.

        More may be asked for than there are; `settle` then says so, with both numbers.

        Raises:
            RowError: there is none of this number.
        """
        if number is None:
            number, self._next = self._next, self._next + 1
        elif not 0 <= number < len(self.pictures):
            raise RowError(f"{place} asks for picture {number} of the row, which has {len(self.pictures)}, from 0")
        self._asked.append(number)
        return self.pictures[number] if number < len(self.pictures) else ImagePart("")

    def split(self, text: str, place: str) -> Parts:
        r"""Return a text as parts, with a picture for every `<image>` in it; empty where there is none.

        One line break (\n or \r\n) directly before a marker and one directly behind it are taken
        away with it, since they only set it apart; every other character stays.
        """
        if not self.marked or MARKER not in text:
            return ()
        pieces = _MARKER.split(text)
        parts: list[str | ImagePart] = [pieces[0]]
        for piece in pieces[1:]:
            parts += [self.take(place), piece]
        return tuple(part for part in parts if part != "")

    def settle(self, messages: Sequence[Message]) -> list[Message]:
        """Return the turns, with pictures that no turn asked for in front of the first user turn.

        Raises:
            RowError: turns ask for more or fewer pictures than there are, an assistant turn has one, or
                pictures stand both in the turns and, beside them, in the column.
        """
        said = next((message for message in messages if message.images and message.role == "assistant"), None)
        if said is not None:
            raise RowError(f"an assistant turn has a picture, which no model writes: {show(said.content)}")
        given = len(self.pictures)
        if self._asked and set(self._asked) != set(range(given)):
            held = f"field {self.column!r} holds {given}" if self.column else "the row has no column of pictures"
            raise RowError(f"the turns ask for {len(self._asked)} pictures ({MARKER} or parts without a value); {held}")
        if self._asked or not given:
            return list(messages)
        if any(message.images for message in messages):
            raise RowError(
                f"pictures stand in the messages, and {given} more in field {self.column!r}: keep one of them"
            )
        first = next((number for number, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise RowError(f"field {self.column!r} holds {given} pictures, but no user turn is there to take them")
        return [*messages[:first], _put_before(messages[first], self.pictures), *messages[first + 1 :]]


def _put_before(message: Message, pictures: Sequence[ImagePart]) -> Message:
    texts = (message.content,) if message.content else ()
    return replace(message, parts=(*pictures, *texts))


def open_gallery(row: Fields) -> Gallery:
    """Return the pictures of a row's `images` or `image` column.

    Raises:
        RowError: both hold pictures that differ, one is none, or the row has a video or sound.
    """
    refuse_other_media(row)
    names = [name for name in row if name in COLUMNS]
    if len(names) > 1 and row[names[0]] is row[names[1]]:  # one column, and behind it the field's own name for it
        names = names[:1]
    held = [name for name in names if row[name] not in _NOTHING]
    if not held:
        # A column of nothing is a row without pictures: its markers, if any, are too many.
        return Gallery(column=names[0] if names else "", marked=bool(names))
    pictures, *others = [read_pictures(row[name], f"field {name!r}") for name in held]
    if any(other != pictures for other in others):
        raise RowError(f"two fields hold pictures that differ, {' and '.join(held)}: keep one of them")
    return Gallery(pictures, held[0], marked=True)
