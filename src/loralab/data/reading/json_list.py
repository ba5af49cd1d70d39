"""JSON text to values: whole, or a list element by element through a window that moves over the file.

Owns the window and the wording of JSON errors. Knows nothing of rows.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator

from loralab.data.reading.rows import BOM, encoding_error, excerpt
from loralab.errors import DataError

BLOCK_BYTES = 2**20
_BLANK = re.compile(r"[ \t\r\n]*")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_DECODER = json.JSONDecoder()
_EXCERPT_CHARACTERS = 30
# The longest piece of JSON but a string that makes no sense when it is cut: an escape, a literal, a number's end.
_LONGEST_PIECE = 16
_MEND = "mend it there: .jsonl has one object per line, .json one list of objects"


class JsonText:
    """The text of a file, through a window that moves forward.

    Args:
        stream: the file, from its beginning.
        name: the file, for messages.
    """

    def __init__(self, stream: io.BufferedIOBase, name: str) -> None:
        self.name = name
        self.text = ""  # the window
        self.at = 0  # what comes next in it
        self.ended = False  # whether nothing comes behind the window
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._at_start = True
        self._raw_place = (1, 1)  # line and byte of the first byte that the decoder has not taken
        self._place = (1, 1)  # line and column of the window's first character

    def more(self) -> None:
        """Take another block into the window, as long as what is in it, and let go of what was read.

        Raises:
            DataError: it is not UTF-8.
        """
        pending = self._decoder.getstate()[0]
        raw = self._stream.read(max(BLOCK_BYTES, len(self.text) - self.at))
        if self._at_start:
            raw, self._at_start = raw.removeprefix(BOM), False
        self.ended = not raw
        try:
            text = self._decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            line, byte = self._raw_place
            raise encoding_error(error, self.name, line=line, byte=byte) from None
        taken = pending + raw
        taken = taken[: len(taken) - len(self._decoder.getstate()[0])]
        self._raw_place = _advance(self._raw_place, taken.count(b"\n"), len(taken), taken.rfind(b"\n"))
        self._place = self.place(self.at)
        self.text, self.at = self.text[self.at :] + text, 0

    def place(self, position: int) -> tuple[int, int]:
        """Return line and column of a position in the window, from 1."""
        newlines, last = self.text.count("\n", 0, position), self.text.rfind("\n", 0, position)
        return _advance(self._place, newlines, position, last)

    def peek(self) -> str:
        """Skip blanks and return the next character, which stays; empty at the end of the file."""
        while True:
            found = _BLANK.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.more()

    def fail(self, message: str, position: int) -> DataError:
        """Return the error for what stands at a position in the window, at or behind what comes next."""
        while len(self.text) - position < _EXCERPT_CHARACTERS and not self.ended:
            position -= self.at
            self.more()
        line, column = self.place(position)
        shown = self.text[position : position + _EXCERPT_CHARACTERS]
        found = excerpt(shown) if shown else "the end"
        return invalid_json(f"{message}, got {found}", where=f"{self.name} line {line} column {column}")


def _advance(place: tuple[int, int], newlines: int, length: int, last: int) -> tuple[int, int]:
    """Return the place `length` characters behind `place`, with the last of `newlines` at index `last` of them."""
    line, column = place
    return (line + newlines, length - last) if newlines else (line, column + length)


def json_values(text: JsonText) -> Iterator[tuple[object, bool]]:
    """Yield the elements of a list, and whether the text of each may hold halves of surrogate pairs.

    Raises:
        DataError: the list is no JSON, or something stands behind it.
    """
    if text.peek() != "[":
        raise text.fail("Expecting a list", text.at)
    text.at += 1
    if text.peek() == "]":
        text.at += 1
    else:
        while True:
            yield _next_value(text)
            separator = text.peek()
            if separator not in ("]", ","):
                raise text.fail("Expecting ',' delimiter", text.at)
            text.at += 1
            if separator == "]":
                break
            text.peek()
    if text.peek():
        raise text.fail("Extra data", text.at)


def _next_value(text: JsonText) -> tuple[object, bool]:
    while True:
        try:
            value, end = _DECODER.raw_decode(text.text, text.at)
            # A number that is cut is a shorter one.
            if text.ended or end + _LONGEST_PIECE < len(text.text) or not isinstance(value, int | float):
                escapes = _SURROGATE_ESCAPE.search(text.text, text.at, end) is not None
                text.at = end
                return value, escapes
        except json.JSONDecodeError as error:
            if text.ended or not _may_be_cut(error, text.text):
                raise text.fail(error.msg, error.pos) from None
        except (ValueError, RecursionError) as error:
            line, _ = text.place(text.at)
            raise _not_taken(error, f"{text.name} line {line}") from None
        text.more()


def _may_be_cut(error: json.JSONDecodeError, window: str) -> bool:
    return error.pos > len(window) - _LONGEST_PIECE or error.msg.startswith("Unterminated string")


def parse_json(text: str, name: str, *, line: int = 1) -> object:
    """Return the value of a whole text.

    Args:
        text: JSON.
        name: its file, for messages.
        line: the line on which it begins.

    Raises:
        DataError: it is no JSON, or more than Python takes.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = excerpt(text[error.pos : error.pos + _EXCERPT_CHARACTERS]) if error.pos < len(text) else "the end"
        place = f"{name} line {line + error.lineno - 1} column {error.colno}"
        raise invalid_json(f"{error.msg}, got {found}", where=place) from None
    except (ValueError, RecursionError) as error:
        raise _not_taken(error, f"{name} line {line}") from None


def _not_taken(error: ValueError | RecursionError, where: str) -> DataError:
    if isinstance(error, RecursionError):
        return invalid_json("nested too deeply", where=where, fix="flatten the row")
    # A number of more digits than Python converts.
    return invalid_json(str(error), where=where, fix="write the number as a string")


def invalid_json(reason: str, *, where: str, fix: str = _MEND) -> DataError:
    """Return the error for text that is no JSON, or none that can be a row."""
    return DataError(f"invalid JSON: {reason}", where=where, fix=fix)
