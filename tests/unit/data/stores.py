"""Stores of given units, and what is in packed rows and stores as plain values."""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from loralab.data.example import Branch, TokenizedExample
from loralab.data.tokens.packing import PackedRows, pack_rows
from loralab.data.tokens.store import TokenStore
from loralab.data.tokens.store_writer import StoreWriter
from loralab.data.tokens.tokenize import NOTES, Unit

# Source index, row and unit.
Placed = tuple[int, int, Unit]
Plain = tuple[int, int, list[tuple[list[int], list[int]]]]


def branch(prompt: list[int], answer: list[int]) -> Branch:
    return Branch(np.asarray(prompt, dtype=np.int32), np.asarray(answer, dtype=np.int32))


def pack(units: Iterable[Placed]) -> list[tuple[int, PackedRows]]:
    """Return the packed rows of each run of units of one source, with its number."""
    packed = []
    for source, of_source in groupby(units, key=lambda placed: placed[0]):
        rows = [
            (row, [unit for _, _, unit in of_row]) for row, of_row in groupby(of_source, key=lambda placed: placed[1])
        ]
        packed.append((source, pack_rows(rows)))
    return packed


def write_units(folder: Path, units: Iterable[Placed], *, key: dict[str, str] | None = None) -> TokenStore:
    """Write a whole store of these units and open it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    writer = StoreWriter(folder)
    for source, packed in pack(units):
        writer.add(packed, source)
    writer.finish(key or {})
    return TokenStore(folder)


def plain(example: TokenizedExample) -> Plain:
    """Return source, row and ids of an example."""
    pairs = [(b.prompt_ids.tolist(), b.answer_ids.tolist()) for b in example.branches]
    return example.source, example.row, pairs


def unpack(packed: PackedRows) -> list[tuple[Any, ...]]:
    """Return of each unit: its number, its row, why it was dropped, its notes, its ids."""
    units: list[tuple[Any, ...]] = []
    for unit, _, row, reason in packed.drops.tolist():
        units.append((unit, row, packed.reasons[reason], [], []))
    for row, _, unit, first, count, bits, _, _ in packed.examples.tolist():
        ids = []
        for start, prompt, answer in packed.branches[first : first + count].tolist():
            middle = start + prompt
            ids.append((packed.tokens[start:middle].tolist(), packed.tokens[middle : middle + answer].tolist()))
        units.append((unit, row, None, [note for i, note in enumerate(NOTES) if bits >> i & 1], ids))
    return sorted(units)
