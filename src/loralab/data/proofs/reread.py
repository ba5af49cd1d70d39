"""Stored rows beside what their sources say: read again, for proofs that hold one against the other.

Owns the second pass over the sources and which stored units belong to which row.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from loralab.data.dataset import PreparedData
from loralab.data.example import Branch, Conversation, Tokens
from loralab.data.formats.fields import Fields, RowError
from loralab.data.formats.table import FORMATS, build_example
from loralab.data.pools import Pool
from loralab.data.proofs.prove import StoredRow
from loralab.data.reading.json_rows import parse_row
from loralab.data.reading.rows import UnparsedRow
from loralab.data.reading.sources import Source
from loralab.data.tokens.packing import Integers
from loralab.data.tokens.pipeline import RowTokenizer
from loralab.data.tokens.store import TokenStore

CHUNK_ROWS = 256
# Formats that may stand beside tokens in one row, so that these can be proven.
_TEXT_FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion")


def count_stored_rows(data: PreparedData) -> int:
    """Return how many rows of the sources have something stored of them."""
    return sum(len(_Stored(pool, data.splits).rows) for pool in data.pools)


def read_stored_rows(data: PreparedData, *, limit: int | None = None) -> Iterator[list[StoredRow]]:
    """Yield all stored rows in chunks, in the order of their sources.

    Args:
        data: prepared rows.
        limit: how many rows to take, evenly spread over all; None for all.

    Raises:
        DataError: a source cannot be read any more.
    """
    total = count_stored_rows(data)
    step = 1.0 if limit is None else max(total / max(limit, 1), 1.0)
    done = 0
    for pool in data.pools:
        stored = _Stored(pool, data.splits)
        places = np.arange(done, done + len(stored.rows))
        # A row is taken where the multiple of the step changes.
        chosen = np.floor(places / step) != np.floor((places - 1) / step)
        done += len(stored.rows)
        for index, (source, worker) in enumerate(zip(pool.sources, pool.workers, strict=True)):
            rows = _read(source, stored.places(index, chosen), worker, stored)
            while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
                yield chunk


def _read(source: Source, places: Integers, worker: RowTokenizer, stored: "_Stored") -> Iterator[StoredRow]:
    longest = stored.longest(int(places[0])) if len(places) else 0
    picked = source.pick(stored.rows[places, 1].tolist())
    for place, unparsed in zip(places.tolist(), picked, strict=True):
        yield _stored_row(unparsed, worker, stored.units(place), longest)


def _stored_row(
    unparsed: UnparsedRow, worker: RowTokenizer, units: tuple[tuple[Branch, ...], ...], longest: int
) -> StoredRow:
    row = parse_row(unparsed)
    example, lost = build_example(worker.format, row.fields, worker.columns), None
    try:
        example = worker.images.open_all(example)
    except RowError as error:  # it could be read when the row was stored
        lost = str(error)
    twin = find_twin(row.fields) if isinstance(example, Tokens) else None
    return StoredRow(row.source, row.number, example, units, twin=twin, longest=longest, lost=lost)


def find_twin(fields: Fields) -> Conversation | None:
    """Return the conversation that a row with tokens also holds, or None."""
    for name in _TEXT_FORMATS:
        if not all(field in fields for field in FORMATS[name].required):
            continue
        try:
            example = build_example(name, fields, {})
        except RowError:
            continue
        if isinstance(example, Conversation):
            return example
    return None


class _Stored:
    """What is stored of a pool's rows, over all splits that come of it."""

    def __init__(self, pool: Pool, splits: Mapping[str, TokenStore]) -> None:
        self._stores: Sequence[TokenStore] = [splits[part] for part in pool.parts if part in splits]
        sizes = [len(store) for store in self._stores]
        part = np.repeat(np.arange(len(sizes)), sizes)
        place = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.zeros(0, dtype=np.int64)
        units = np.concatenate([store.units for store in self._stores])
        order = np.argsort(units, kind="stable")
        self._part, self._place = part[order], place[order]
        origins = np.concatenate([store.origins for store in self._stores])[order]
        new = np.ones(len(origins), dtype=bool)
        new[1:] = (origins[1:] != origins[:-1]).any(axis=1)
        self._first = np.append(np.flatnonzero(new), len(origins))
        self.rows: Integers = origins[new]

    def places(self, source: int, chosen: npt.NDArray[np.bool_]) -> Integers:
        """Return the places in `rows` of a source's rows, as far as they are chosen."""
        return np.flatnonzero((self.rows[:, 0] == source) & chosen).astype(np.int64)

    def units(self, place: int) -> tuple[tuple[Branch, ...], ...]:
        """Return the branches of each unit of a row."""
        units = range(int(self._first[place]), int(self._first[place + 1]))
        return tuple(self._stores[self._part[unit]][int(self._place[unit])].branches for unit in units)

    def longest(self, place: int) -> int:
        """Return the length of the longest stored row of a row's source, in tokens."""
        source = self.rows[place, 0]
        lengths = [store.lengths()[store.origins[:, 0] == source] for store in self._stores]
        return max((int(each.max()) for each in lengths if len(each)), default=0)
