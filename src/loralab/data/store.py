"""Tokenized rows on disk: flat arrays, mapped into memory, complete or absent.

Owns the cache's layout. A store is written into a temporary folder and renamed, so a killed
run leaves no half store; one that does not match its own manifest is rebuilt.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from loralab.data.example import Branch, TokenizedExample
from loralab.data.staging import staging_folder
from loralab.data.tokenize import Unit

# examples: row, source, unit, first branch, number of branches, flags; branches: start, prompt, answer.
_EXAMPLE_COLUMNS = 6
_BRANCH_COLUMNS = 3
_TRUNCATED, _EMPTY_ANSWER = 1, 2
_MANIFEST = "manifest.json"
_ARRAYS = ("tokens.npy", "branches.npy", "examples.npy")


class TokenStore(Sequence[TokenizedExample]):
    """The kept units of all sources, in order, read from a folder without copying it.

    Args:
        folder: written by `write_store`.
        indices: which examples this view holds; None for all.
    """

    def __init__(self, folder: Path, indices: npt.NDArray[np.int64] | None = None) -> None:
        self.folder = folder
        self._tokens = _open_array(folder / "tokens.npy")
        self._branches = _open_array(folder / "branches.npy")
        self._examples = _open_array(folder / "examples.npy")
        self._indices = np.arange(len(self._examples)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row, source, _, first, count, _ = (int(v) for v in self._examples[self._indices[index]])
        branches = tuple(self._branch(first + offset) for offset in range(count))
        return TokenizedExample(row, source, branches)

    def _branch(self, index: int) -> Branch:
        start, prompt, answer = (int(v) for v in self._branches[index])
        middle = start + prompt
        return Branch(self._tokens[start:middle], self._tokens[middle : middle + answer])

    @property
    def units(self) -> npt.NDArray[np.int64]:
        """Number of each example among all units, dropped ones counted."""
        units: npt.NDArray[np.int64] = self._examples[self._indices, 2]
        return units

    @property
    def origins(self) -> npt.NDArray[np.int64]:
        """Source and row of each example (examples, 2)."""
        origins: npt.NDArray[np.int64] = self._examples[self._indices][:, [1, 0]]
        return origins

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples."""
        return int(self._tokens.max()) if len(self._tokens) else 0

    @property
    def truncated(self) -> int:
        """Number of examples whose answer or text was cut."""
        return int((self._examples[self._indices, 5] & _TRUNCATED > 0).sum())

    @property
    def empty_answers(self) -> int:
        """Number of examples with an answer that is nothing but its stop token."""
        return int((self._examples[self._indices, 5] & _EMPTY_ANSWER > 0).sum())

    def content_sha256(self) -> str:
        """Return a hash over ids, branch borders and order of the examples: everything that training sees of them."""
        counts = self._examples[self._indices, 4]
        first = self._examples[self._indices, 3]
        # The branches of all examples, in order: first, first + 1, ... for each example.
        steps = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        branches = self._branches[np.repeat(first, counts) + steps]
        digest = hashlib.sha256(np.ascontiguousarray(counts).tobytes())
        digest.update(np.ascontiguousarray(branches[:, 1:]).tobytes())
        starts, ends = branches[:, 0], branches.sum(axis=1)
        # Branches that lie one behind the other go into the hash in one piece.
        breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
        for start, end in zip(starts[[0, *breaks]], ends[[*(breaks - 1), -1]], strict=True) if len(branches) else ():
            digest.update(self._tokens[start:end])  # as it lies in the file: no copy
        return digest.hexdigest()

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the length of each example's longest branch, in tokens."""
        chosen = self._examples[self._indices]
        longest = self._branches[:, 1] + self._branches[:, 2]
        first, count = chosen[:, 3], chosen[:, 4]
        return np.asarray([longest[f : f + c].max() for f, c in zip(first, count, strict=True)], dtype=np.int64)

    def supervised(self) -> npt.NDArray[np.int64]:
        """Return the number of supervised tokens of each example."""
        totals = np.concatenate([[0], np.cumsum(self._branches[:, 2])])
        chosen = self._examples[self._indices]
        counts: npt.NDArray[np.int64] = totals[chosen[:, 3] + chosen[:, 4]] - totals[chosen[:, 3]]
        return counts

    def select(self, positions: npt.NDArray[np.int64]) -> "TokenStore":
        """Return a view of the examples at `positions` of this view."""
        return TokenStore(self.folder, self._indices[positions])

    def __getstate__(self) -> tuple[Path, npt.NDArray[np.int64]]:
        return self.folder, self._indices

    def __setstate__(self, state: tuple[Path, npt.NDArray[np.int64]]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def _open_array(path: Path) -> Any:
    array = np.load(path, allow_pickle=False, mmap_mode="r")
    return array


def write_store(folder: Path, units: Iterable[tuple[int, int, Unit]], *, report: dict[str, Any]) -> None:
    """Write a store.

    Args:
        folder: where it will be; an older one there is replaced.
        units: source index, row number and unit, in order; dropped units count but are not kept.
        report: filled by the caller while `units` is consumed; stored beside the arrays.
    """
    with staging_folder(folder.parent) as staging:
        _write_arrays(staging, units)
        sizes = {name: (staging / name).stat().st_size for name in _ARRAYS}
        (staging / _MANIFEST).write_text(json.dumps({"sizes": sizes, "report": report}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(staging, folder)
        except OSError:
            if read_store_report(folder) is None:  # else another process wrote the same content first
                raise


def _write_arrays(staging: Path, units: Iterable[tuple[int, int, Unit]]) -> None:
    examples: list[tuple[int, ...]] = []
    branches: list[tuple[int, int, int]] = []
    position, raw = 0, staging / "tokens.raw"
    with raw.open("wb") as stream:
        for number, (source, row, unit) in enumerate(units):
            if unit.dropped is not None:
                continue
            flags = _TRUNCATED * unit.truncated + _EMPTY_ANSWER * unit.empty_answer
            examples.append((row, source, number, len(branches), len(unit.branches), flags))
            for branch in unit.branches:
                branches.append((position, len(branch.prompt_ids), len(branch.answer_ids)))
                stream.write(branch.prompt_ids.tobytes() + branch.answer_ids.tobytes())
                position += len(branch.prompt_ids) + len(branch.answer_ids)
    tokens: npt.NDArray[np.int32] = (
        np.memmap(raw, dtype=np.int32, mode="r") if position else np.zeros(0, dtype=np.int32)
    )
    np.save(staging / "tokens.npy", tokens)
    raw.unlink()
    np.save(staging / "branches.npy", np.asarray(branches, dtype=np.int64).reshape(-1, _BRANCH_COLUMNS))
    np.save(staging / "examples.npy", np.asarray(examples, dtype=np.int64).reshape(-1, _EXAMPLE_COLUMNS))


def read_store_report(folder: Path) -> dict[str, Any] | None:
    """Return the report of a complete store, or None where there is none or it is damaged.

    Raises:
        PermissionError: there is one that somebody else keeps from being read.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in _ARRAYS}
        return dict(manifest["report"]) if manifest["sizes"] == sizes else None
    except PermissionError:
        raise  # writing it anew would fail too, with a reason that misleads
    except (OSError, ValueError, KeyError, TypeError):
        return None
