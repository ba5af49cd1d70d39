"""Units as flat arrays: what worker processes hand back, and what goes into a store's files as it is.

Owns the columns of the arrays. One chunk of rows is one `PackedRows`: a few arrays cross from a
process in a hundredth of the time that thousands of small ones take.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from loralab.data.example import Branch, TokenIds
from loralab.data.tokens.tokenize import NOTES, Unit

Integers: TypeAlias = npt.NDArray[np.int64]
RowUnits: TypeAlias = tuple[int, list[Unit]]

# Columns of the arrays, by name; in a store all numbers count over the whole store.
EXAMPLE_COLUMNS = ("row", "source", "unit", "first_branch", "branches", "notes", "length", "supervised")
BRANCH_COLUMNS = ("start", "prompt", "answer")
DROP_COLUMNS = ("unit", "source", "row", "reason")
# One row for each picture in a prompt, in the order of branches. The hash of its bytes is four numbers; its path
# lies in an array of bytes of its own.
IMAGE_COLUMNS = (
    *("branch", "start", "length", "rows", "columns", "width", "height", "size_bytes", "modified_ns"),
    *("hash_1", "hash_2", "hash_3", "hash_4", "path_start", "path_bytes"),
)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The units of some rows of one source, in order.

    Attributes:
        rows: how many rows these are.
        units: how many units came of them, dropped ones counted.
        tokens: ids of all branches, prompts and answers, one behind the other.
        branches: `BRANCH_COLUMNS` of each branch; starts count from the first token here.
        examples: `EXAMPLE_COLUMNS` of each kept unit; units and branches count from the first here.
        drops: `DROP_COLUMNS` of each dropped unit; reasons by their place in `reasons`.
        reasons: why units were dropped.
        systems: kept units by system message, None for those without one, in order of appearance.
        images: `IMAGE_COLUMNS` of each picture; branches and bytes of paths count from the first here.
        paths: of these pictures, UTF-8, one behind the other.
    """

    rows: int
    units: int
    tokens: TokenIds
    branches: Integers
    examples: Integers
    drops: Integers
    reasons: tuple[str, ...]
    systems: dict[str | None, int]
    images: Integers
    paths: npt.NDArray[np.uint8]


def pack_rows(rows: Sequence[RowUnits]) -> PackedRows:
    """Return the units of some rows of one source as arrays; the source's number is left 0."""
    branches: list[tuple[int, int]] = []
    pieces: list[TokenIds] = []
    examples: list[tuple[int, ...]] = []
    drops: list[tuple[int, ...]] = []
    reasons: dict[str, int] = {}
    systems: Counter[str | None] = Counter()
    units = [(row, unit) for row, units_of_row in rows for unit in units_of_row]
    for number, (row, unit) in enumerate(units):
        if unit.dropped is not None:
            drops.append((number, 0, row, reasons.setdefault(unit.dropped, len(reasons))))
            continue
        sizes = [(len(branch.prompt_ids), len(branch.answer_ids)) for branch in unit.branches]
        length, supervised = max(map(sum, sizes)), sum(answer for _, answer in sizes)
        notes = _as_bits(unit.notes) if unit.notes else 0
        examples.append((row, 0, number, len(branches), len(sizes), notes, length, supervised))
        branches += sizes
        pieces += [ids for branch in unit.branches for ids in (branch.prompt_ids, branch.answer_ids)]
        systems[unit.system] += 1
    kept = [branch for _, unit in units if unit.dropped is None for branch in unit.branches]
    images, paths = _pack_images(kept)
    lengths = _table(branches, 2)
    starts = np.cumsum(lengths.sum(axis=1)) - lengths.sum(axis=1)
    return PackedRows(
        rows=len(rows),
        units=len(units),
        tokens=np.concatenate([np.zeros(0, dtype=np.int32), *pieces]),
        branches=np.column_stack([starts, lengths]),
        examples=_table(examples, len(EXAMPLE_COLUMNS)),
        drops=_table(drops, len(DROP_COLUMNS)),
        reasons=tuple(reasons),
        systems=dict(systems),
        images=images,
        paths=paths,
    )


def _pack_images(branches: Sequence[Branch]) -> tuple[Integers, npt.NDArray[np.uint8]]:
    """Return the pictures of branches, and their paths, each of which stands there once."""
    rows: list[tuple[int, ...]] = []
    places: dict[str, tuple[int, int]] = {}
    written = bytearray()
    for number, branch in enumerate(branches):
        for image in branch.images:
            file = image.file
            if file.path not in places:
                raw = os.fsencode(file.path)
                places[file.path] = len(written), len(raw)
                written += raw
            shape = number, image.start, image.length, image.rows, image.columns
            seen = file.width, file.height, file.size_bytes, file.modified_ns
            rows.append((*shape, *seen, *_hash_numbers(file.sha256), *places[file.path]))
    return _table(rows, len(IMAGE_COLUMNS)), np.frombuffer(bytes(written), dtype=np.uint8)


def _hash_numbers(sha256: str) -> tuple[int, ...]:
    return tuple(np.frombuffer(bytes.fromhex(sha256), dtype="<i8").tolist())


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> Integers:
    return np.asarray(rows, dtype=np.int64).reshape(-1, columns)


def _as_bits(notes: set[str]) -> int:
    return sum(note_bit(note) for note in notes)


def note_bit(note: str) -> int:
    """Return the bit that stands for a note of `NOTES` in the column `notes`."""
    return 1 << NOTES.index(note)
