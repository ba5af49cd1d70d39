"""A row and where it stands, and the lines of a file that rows come from.

Owns text encoding (UTF-8, with or without a byte-order mark) and what a line is.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from loralab.errors import DataError

_EXCERPT_CHARACTERS = 60
BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        fields: value of each column.
        number: number of the row in its source, from 1; blank lines do not count.
        source: path or Hub id, for messages.
        line: line of the file where the row begins, from 1, where the format has lines.
    """

    fields: Mapping[str, object]
    number: int
    source: str
    line: int | None = None

    def describe(self) -> str:
        """Return where the row stands, for a message."""
        line = "" if self.line is None else f" (line {self.line})"
        return f"{self.source} row {self.number}{line}"


class JsonLine(NamedTuple):
    """A row that nobody has parsed yet: a line of a JSON lines file.

    Parsing is then the work of whoever needs the fields, as a rule another process. A tuple,
    because that crosses to it in a third of the time.

    Attributes:
        raw: the line, its end included.
        number: number of the row in its source, from 1; blank lines do not count.
        source: path of the file, for messages.
        line: line of the file, from 1.
    """

    raw: bytes
    number: int
    source: str
    line: int


UnparsedRow: TypeAlias = Row | JsonLine


def text_lines(stream: io.BufferedIOBase, name: str) -> Iterator[tuple[int, str]]:
    r"""Yield number and text of each line, its end included; only \n ends a line.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, raw in enumerate(stream, 1):
        yield number, decode_text(raw, name, line=number)


def decode_text(raw: bytes, name: str, *, line: int = 1) -> str:
    """Return UTF-8 bytes as text, without the byte-order mark at the start of a file.

    Args:
        raw: one line, or a whole file.
        name: the file, for messages.
        line: the line on which `raw` begins.

    Raises:
        DataError: `raw` is not UTF-8.
    """
    try:
        return (raw.removeprefix(BOM) if line == 1 else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise encoding_error(error, name, line=line) from None


def encoding_error(error: UnicodeDecodeError, name: str, *, line: int = 1, byte: int = 1) -> DataError:
    """Return the error for bytes that are not UTF-8.

    Args:
        error: what decoding them raised.
        name: the file, for messages.
        line: the line on which the bytes begin.
        byte: their place on that line, from 1.
    """
    kind = "UTF-16" if line == byte == 1 and error.object.startswith(_UTF16_BOMS) else "not UTF-8"
    before = error.object[: error.start]
    newline = before.rfind(b"\n")
    bad_line = line + before.count(b"\n")
    bad_byte = error.start + byte if newline < 0 else error.start - newline
    return DataError(
        f"text is {kind}: byte 0x{error.object[error.start]:02x} ({error.reason})",
        where=f"{name} line {bad_line} byte {bad_byte}",
        fix="save the file as UTF-8",
    )


def excerpt(value: object) -> str:
    """Return `value` as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _EXCERPT_CHARACTERS else f"{text[:_EXCERPT_CHARACTERS]}..."
