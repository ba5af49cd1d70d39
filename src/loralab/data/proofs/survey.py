"""Figures of a split that need its tokens: lengths, coverage, duplicates, overlap, stop tokens.

Owns what can be counted from the store's arrays, in blocks, with flat memory: no row becomes an
object. Texts are `answer_survey.py`'s, layouts the workflow's.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from loralab.data.example import PlacedImage
from loralab.data.tokens.packing import Integers
from loralab.data.tokens.store import TokenStore

Hashes: TypeAlias = npt.NDArray[np.uint64]

_PERCENTILES = (0, 25, 50, 75, 90, 95, 99, 100)
_LENGTH_BINS, _COVERAGE_BINS = 16, 10
# Tokens that are hashed at a time.
_BLOCK_TOKENS = 2**20
LISTED_ROWS = 20
# One answer of so many is said; below so many rows or different answers it is nothing odd.
_REPEATED_SHARE, _REPEATED_ROWS, _REPEATED_ANSWERS = 0.2, 20, 20
_MULTIPLIER, _SALT = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)


@dataclass(frozen=True, slots=True)
class SplitHashes:
    """What tells the examples of a split apart.

    Attributes:
        rows: hash of all branches of each example.
        prompts: hash of each example's first prompt; 0 where it is one token, as before plain text.
        answers: hash of each example's first answer.
        stopped: branches that end with a stop token.
        branches: all branches.
    """

    rows: Hashes
    prompts: Hashes
    answers: Hashes
    stopped: int
    branches: int


def hash_split(store: TokenStore, *, stop_ids: Sequence[int]) -> SplitHashes:
    """Hash the examples of a split, and count how its answers end.

    Args:
        store: the split.
        stop_ids: tokens that generation stops on.
    """
    rows, prompts, answers = [], [], []
    stopped = branches = 0
    shown = _hash_pictures(store)
    for counts, table in store.branch_blocks():
        hashed = np.concatenate(
            [_hash_branches(store, part) for part in _parts(table)] or [np.zeros((0, 2), np.uint64)]
        )
        if shown is not None:
            hashed[:, 0] = _mix(hashed[:, 0] ^ shown[branches : branches + len(table)])
        first = np.cumsum(counts) - counts
        place = np.arange(len(table)) - np.repeat(first, counts)
        joined = _mix(hashed[:, 0] ^ _mix(hashed[:, 1] + _SALT)) * _powers(int(place.max(initial=0)) + 1)[place]
        rows.append(np.add.reduceat(joined, first))
        prompts.append(np.where(table[first, 1] > 1, hashed[first, 0], np.uint64(0)))
        answers.append(hashed[first, 1])
        last = store.tokens[table.sum(axis=1) - 1]
        stopped += int(np.isin(last, stop_ids).sum())
        branches += len(table)
    empty = np.zeros(0, dtype=np.uint64)
    parts = [np.concatenate([empty, *each]) for each in (rows, prompts, answers)]
    return SplitHashes(parts[0], parts[1], parts[2], stopped, branches)


def _hash_pictures(store: TokenStore) -> Hashes | None:
    """Return a hash of each branch's pictures, 0 where it has none: pictures of one size have the same ids."""
    if not store.has_images:
        return None
    found = [
        int.from_bytes(hashlib.blake2b(b"".join(_sign(image) for image in branch.images), digest_size=8).digest())
        if branch.images
        else 0
        for example in store
        for branch in example.branches
    ]
    return np.asarray(found, dtype=np.uint64)


def _sign(image: PlacedImage) -> bytes:
    return image.start.to_bytes(8) + bytes.fromhex(image.file.sha256)


def _parts(table: Integers) -> Iterator[Integers]:
    """Cut a table of branches into parts of about a million tokens."""
    ends = np.cumsum(table[:, 1] + table[:, 2])
    start = 0
    while start < len(table):
        before = ends[start - 1] if start else 0
        end = max(int(np.searchsorted(ends, before + _BLOCK_TOKENS, side="right")), start + 1)
        yield table[start:end]
        start = end


def _hash_branches(store: TokenStore, table: Integers) -> Hashes:
    """Return the hash of prompt and answer of each branch (branches, 2)."""
    lengths = table[:, 1:].reshape(-1)
    starts = np.stack([table[:, 0], table[:, 0] + table[:, 1]], axis=1).reshape(-1)
    first = np.cumsum(lengths) - lengths
    place = np.arange(int(lengths.sum())) - np.repeat(first, lengths)
    tokens = store.tokens[np.repeat(starts, lengths) + place].astype(np.uint64)
    terms = _mix(tokens + _SALT) * _powers(int(lengths.max()))[place]
    sums = np.zeros(len(lengths), dtype=np.uint64)
    some = np.flatnonzero(lengths)  # `reduceat` takes an empty piece for one term
    sums[some] = np.add.reduceat(terms, first[some])
    hashed: Hashes = _mix(sums + lengths.astype(np.uint64)).reshape(-1, 2)
    return hashed


def _powers(count: int) -> Hashes:
    """Return the powers of an odd number, modulo 2^64."""
    powers = np.full(count, _MULTIPLIER, dtype=np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _mix(values: Hashes) -> Hashes:
    """Scatter the bits of numbers.

    Source: Steele, Lea, Flood 2014, Fast Splittable Pseudorandom Number Generators (SplitMix64).
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def survey_split(store: TokenStore, hashes: SplitHashes, *, names: Sequence[str]) -> dict[str, Any]:
    """Return the figures of one split.

    Args:
        store: the split.
        hashes: of its examples.
        names: of the sources that the store's origins count.
    """
    lengths, supervised = store.lengths(), store.supervised()
    # Of turns that extend one another the longest branch has all tokens; of others, at least its own.
    coverage = np.minimum(supervised / np.maximum(lengths, 1), 1.0)
    return {
        "length_percentiles": {f"p{p}": int(np.percentile(lengths, p)) for p in _PERCENTILES} if len(lengths) else {},
        "length_histogram": _histogram(lengths, _length_edges(lengths)),
        "coverage_histogram": _histogram(coverage, np.linspace(0, 1, _COVERAGE_BINS + 1)),
        "coverage": round(float(supervised.sum() / max(int(lengths.sum()), 1)), 4),
        "answers": hashes.branches,
        "stop_token_share": round(hashes.stopped / max(hashes.branches, 1), 4),
        "duplicates": _duplicates(store, hashes, names),
    }


def _length_edges(lengths: Integers) -> npt.NDArray[np.float64]:
    """Return whole edges, evenly spaced but for the last, at most `_LENGTH_BINS` bins."""
    low, high = (int(lengths.min()), int(lengths.max()) + 1) if len(lengths) else (0, 1)
    width = max(-(-(high - low) // _LENGTH_BINS), 1)
    return np.asarray([*range(low, high, width), high], dtype=np.float64)


def _histogram(values: npt.NDArray[Any], edges: npt.NDArray[np.float64]) -> dict[str, list[float]]:
    counts, _ = np.histogram(values, bins=edges)
    return {"edges": [round(float(edge), 4) for edge in edges], "counts": [int(count) for count in counts]}


def _duplicates(store: TokenStore, hashes: SplitHashes, names: Sequence[str]) -> dict[str, Any]:
    again = _repeats(hashes.rows)
    # Same first prompt, and more than one answer to it.
    prompted = np.flatnonzero(hashes.prompts)
    _, group = np.unique(hashes.prompts[prompted], return_inverse=True)
    pairs = np.unique(np.stack([group.astype(np.uint64), hashes.answers[prompted]], axis=1), axis=0)
    differing = np.bincount(pairs[:, 0].astype(np.int64)) > 1 if len(pairs) else np.zeros(0, dtype=bool)
    other = prompted[differing[group]] if len(prompted) else prompted
    return {
        "same_row": {"count": len(again), "rows": list_rows(store, again, names)},
        "same_prompt_other_answer": {"count": len(other), "rows": list_rows(store, other, names)},
    }


def _repeats(values: Hashes) -> Integers:
    """Return the positions of values that are there before."""
    _, first = np.unique(values, return_index=True)
    again = np.ones(len(values), dtype=bool)
    again[first] = False
    return np.flatnonzero(again).astype(np.int64)


def list_rows(store: TokenStore, positions: Integers, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return source and number of the first of some rows."""
    origins = store.select(positions[:LISTED_ROWS]).origins.tolist()
    return [{"source": names[source], "row": row} for source, row in origins]


def find_repeated_answer(hashes: SplitHashes) -> tuple[int, int] | None:
    """Return an example with the answer that far too many have, and how many; None where there is none.

    A task of few answers, as yes or no, repeats each of them, and is nothing odd.
    """
    total = len(hashes.answers)
    values, first, counts = np.unique(hashes.answers, return_index=True, return_counts=True)
    if total < _REPEATED_ROWS or len(values) < _REPEATED_ANSWERS:
        return None
    most = int(counts.argmax())
    return (int(first[most]), int(counts[most])) if counts[most] > _REPEATED_SHARE * total else None


def find_overlaps(
    splits: Mapping[str, TokenStore], hashes: Mapping[str, SplitHashes], names: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Return what every two splits have in common.

    Args:
        splits: by name.
        hashes: of each split.
        names: of the sources of each split.

    Returns:
        For every two splits: rows of the later one that are in the earlier one, and such whose prompt is.
    """
    found = []
    for first, second in combinations(splits, 2):
        prompts = hashes[second].prompts
        entry: dict[str, Any] = {"splits": [first, second], "rows": len(splits[second])}
        for name, inside in (
            ("same_row", np.isin(hashes[second].rows, hashes[first].rows)),
            ("same_prompt", np.isin(prompts, hashes[first].prompts) & (prompts != 0)),
        ):
            places = np.flatnonzero(inside).astype(np.int64)
            entry[name] = {"count": len(places), "rows": list_rows(splits[second], places, names[second])}
        found.append(entry)
    return found
