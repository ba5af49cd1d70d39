"""A row and where it stands, and the lines of a file that rows come from.

Owns text encoding (UTF-8, with or without a byte-order mark) and what a line is.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loralab.errors import DataError

_EXCERPT_CHARACTERS = 60
_BOM = b"\xef\xbb\xbf"
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
        return (raw.removeprefix(_BOM) if line == 1 else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        kind = "UTF-16" if line == 1 and raw.startswith(_UTF16_BOMS) else "not UTF-8"
        before = error.object[: error.start]
        bad_line, bad_byte = line + before.count(b"\n"), error.start - before.rfind(b"\n")
        raise DataError(
            f"text is {kind}: byte 0x{error.object[error.start]:02x} ({error.reason})",
            where=f"{name} line {bad_line} byte {bad_byte}",
            fix="save the file as UTF-8",
        ) from None


def excerpt(value: object) -> str:
    """Return `value` as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _EXCERPT_CHARACTERS else f"{text[:_EXCERPT_CHARACTERS]}..."
