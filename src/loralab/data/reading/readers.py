"""Data files to rows, by suffix: JSON, JSON lines, CSV, TSV, Parquet and text.

Owns the table of suffixes, gzip, CSV and Parquet. Does not own how a name becomes a file
(`sources.py`), JSON (`json_rows.py`), nor what the columns mean (`formats.py`).
"""

import csv
import functools
import gzip
import io
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from loralab.data.reading.json_rows import read_json, read_json_lines
from loralab.data.reading.rows import Row, UnparsedRow, decode_text, excerpt, text_lines
from loralab.errors import DataError

# csv's own limit is 131,072 characters, less than one long document.
MAX_CSV_FIELD_CHARACTERS = 2**28
PARQUET_BATCH_ROWS = 1024

# Stream, name of the file, rows to leave out.
Reader = Callable[[io.BufferedIOBase, str, int], Iterator[UnparsedRow]]


def data_suffix(name: str) -> str:
    """Return the suffix that decides how a file is read: `.jsonl` or `.jsonl.gz`, in lower case."""
    lower = name.lower()
    packed = ".gz" if lower.endswith(".gz") else ""
    return Path(lower.removesuffix(packed)).suffix + packed


def read_rows(path: Path, name: str, start: int = 0, *, numbered: bool = False) -> Iterator[UnparsedRow]:
    """Yield the rows of a file with a suffix of `READERS`, streaming where its format allows it.

    Args:
        path: the file.
        name: the file as the user named it, for messages.
        start: rows to leave out at the beginning.
        numbered: whether columns go by number, as in a file of `NUMBERED` without a header.

    Raises:
        DataError: the file cannot be read, holds something else than its suffix says, or no row.
    """
    suffix, empty = data_suffix(path.name), not start
    try:
        with gzip.open(path, "rb") if suffix.endswith(".gz") else path.open("rb") as stream:
            for row in (NUMBERED if numbered else READERS)[suffix](stream, name, start):
                empty = False
                yield row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"damaged gzip file: {error}", where=name, fix="copy or download it again; `gzip -t` checks a file"
        ) from error
    except OSError as error:
        raise unreadable(error, name=name) from error
    if empty:
        raise DataError(f"no rows in {name!r}", where=name, fix="give a file with at least one row")


def unreadable(error: OSError, *, name: str, where: str | None = None) -> DataError:
    """Return the error for a file or folder that the operating system does not give."""
    fix = f"allow yourself to read it: chmod u+r {name}" if isinstance(error, PermissionError) else "check the path"
    return DataError(f"cannot read {excerpt(name)}: {error.strerror or error}", where=where or name, fix=fix)


def read_csv(
    stream: io.BufferedIOBase, name: str, start: int = 0, *, delimiter: str = ",", header: bool = True
) -> Iterator[Row]:
    """Yield one row per record below the header; every value is a string.

    Raises the field limit of Python's csv module for the whole process, which knows no other.

    Args:
        stream: the file.
        name: the file, for messages.
        start: rows to leave out at the beginning.
        delimiter: what stands between fields.
        header: whether the first record names the columns; else they are "1", "2", ...

    Raises:
        DataError: the file is no UTF-8, a quote is out of place, or header and records do not fit.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CSV_FIELD_CHARACTERS))
    records = _csv_records(stream, name, delimiter)
    line, columns = next(records, (1, []))
    if header:
        _check_header(columns, f"{name} line {line}")
    else:
        records = itertools.chain([(line, columns)] if columns else [], records)
        columns = [str(number) for number in range(1, len(columns) + 1)]
    for number, (line, values) in enumerate(records, 1):
        if len(values) != len(columns):
            raise DataError(
                f"{len(values)} fields where the {'header' if header else 'first record'} has {len(columns)}: "
                f"{excerpt(values)}",
                where=Row({}, number, name, line).describe(),
                fix="put a field that holds the separator or a line break between double quotes",
            )
        if number > start:
            yield Row(dict(zip(columns, values, strict=True)), number, name, line)


def _csv_records(stream: io.BufferedIOBase, name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield first line and fields of every record that is not blank."""
    # strict: otherwise a quote that is never closed swallows the rest of the file
    reader = csv.reader((text for _, text in text_lines(stream, name)), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "a carriage return that ends no line" if "new-line" in str(error) else str(error)
            raise DataError(
                f"invalid CSV: {reason}",
                where=f"{name} line {line}",
                fix='quote fields with line breaks; a field that begins with " must end with ", and a " in it is ""',
            ) from None
        if values:
            yield line, values


def _check_header(header: Sequence[str], place: str) -> None:
    nameless = [number for number, column in enumerate(header, 1) if not column.strip()]
    if nameless:
        raise DataError(
            f"column {nameless[0]} of {len(header)} has no name: {excerpt(list(header))}",
            where=place,
            fix="name every column; from pandas, write with to_csv(index=False)",
        )
    _check_unique(header, place)


def _check_unique(columns: Sequence[str], place: str) -> None:
    twice = [column for column, times in Counter(columns).items() if times > 1]
    if twice:
        raise DataError(f"two columns have the name {twice[0]!r}", where=place, fix="rename one of them")


def read_parquet(stream: io.BufferedIOBase, name: str, start: int = 0) -> Iterator[Row]:
    """Yield the rows of a Parquet file, batch by batch.

    Args:
        stream: the file.
        name: the file, for messages.
        start: rows to leave out at the beginning; whole groups of them are not read.

    Raises:
        DataError: the file is damaged, or two columns have one name.
    """
    try:
        with pyarrow.parquet.ParquetFile(stream) as file:
            _check_unique(file.schema_arrow.names, name)
            number, groups = _groups_behind(file.metadata, start)
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, row_groups=groups):
                skipped = min(max(start - number, 0), len(batch))
                number += skipped
                for fields in batch.slice(skipped).to_pylist():
                    number += 1
                    yield Row(fields, number, name)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"not a readable Parquet file: {reason}", where=name, fix="write or download the file again"
        ) from error


def _groups_behind(metadata: pyarrow.parquet.FileMetaData, start: int) -> tuple[int, list[int]]:
    """Return the rows before the group that holds row `start` (from 0), and that group and all behind it."""
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    ends = list(itertools.accumulate(rows))
    groups = [group for group, end in enumerate(ends) if end > start]
    return ends[groups[0]] - rows[groups[0]] if groups else start, groups


def read_text(stream: io.BufferedIOBase, name: str, start: int = 0) -> Iterator[Row]:
    """Yield the whole file as one row with the field `text`; Windows line ends become plain ones.

    Args:
        stream: the file.
        name: the file, for messages.
        start: 1 leaves the row out.

    Raises:
        DataError: the file is no UTF-8.
    """
    text = "" if start else decode_text(stream.read(), name).replace("\r\n", "\n")
    if text.strip():
        yield Row({"text": text}, 1, name)


_PLAIN_READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".tsv": functools.partial(read_csv, delimiter="\t"),
    ".txt": read_text,
    ".text": read_text,
    ".md": read_text,
}
# Parquet compresses its own columns and is read from its end, so it does not come gzipped.
READERS: dict[str, Reader] = {
    **_PLAIN_READERS,
    **{f"{suffix}.gz": reader for suffix, reader in _PLAIN_READERS.items()},
    ".parquet": read_parquet,
}
# The same files without a header line: their columns are "1", "2", ...
_BARE_CSV = functools.partial(read_csv, header=False)
_BARE_TSV = functools.partial(read_csv, header=False, delimiter="\t")
NUMBERED: dict[str, Reader] = {".csv": _BARE_CSV, ".csv.gz": _BARE_CSV, ".tsv": _BARE_TSV, ".tsv.gz": _BARE_TSV}
