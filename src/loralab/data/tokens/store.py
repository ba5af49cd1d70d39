"""Tokenized rows on disk, mapped into memory: reading, and telling a whole store from a damaged one.

Owns the layout of a store's folder: raw arrays, and a manifest with their sizes and hashes.
Writing is `store_writer.py`'s.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from loralab.data.example import Branch, ImageFile, PlacedImage, TokenIds, TokenizedExample
from loralab.data.tokens.packing import (
    BRANCH_COLUMNS,
    DROP_COLUMNS,
    EXAMPLE_COLUMNS,
    IMAGE_COLUMNS,
    Integers,
    note_bit,
)
from loralab.run import file_sha256

MANIFEST = "manifest.json"
# File: type of its numbers, columns.
ARRAYS: dict[str, tuple[str, int]] = {
    "tokens.bin": ("<i4", 1),
    "branches.bin": ("<i8", len(BRANCH_COLUMNS)),
    "examples.bin": ("<i8", len(EXAMPLE_COLUMNS)),
    "drops.bin": ("<i8", len(DROP_COLUMNS)),
    "images.bin": ("<i8", len(IMAGE_COLUMNS)),
    "paths.bin": ("u1", 1),
}
_ROW, _SOURCE, _UNIT, _FIRST, _COUNT, _NOTES, _LENGTH, _SUPERVISED = range(len(EXAMPLE_COLUMNS))
# Columns that tell pictures apart: by their bytes, and by the file that holds them and its state.
_HASH, _FILE = slice(9, 13), slice(7, len(IMAGE_COLUMNS))
# Columns of what training sees of a picture: its place and shape in the prompt, and its bytes.
_SHOWN = (1, 2, 3, 4, 9, 10, 11, 12)
# Hashing goes through the store in blocks of this many examples and bytes, whatever its size.
_BLOCK_EXAMPLES, _BLOCK_BYTES = 2**16, 2**20


class TokenStore(Sequence[TokenizedExample]):
    """The kept units of all sources, in order, read from a folder without copying it.

    Args:
        folder: written by `StoreWriter`.
        indices: which examples this view holds; None for all.
    """

    def __init__(self, folder: Path, indices: Integers | None = None) -> None:
        self.folder = folder
        self._arrays = _Arrays(folder)
        self._indices = np.arange(len(self._arrays.examples)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        values = self._arrays.examples[self._indices[index]].tolist()
        first, count = values[_FIRST], values[_COUNT]
        branches = tuple(self._branch(first + offset) for offset in range(count))
        return TokenizedExample(values[_ROW], values[_SOURCE], branches)

    def _branch(self, index: int) -> Branch:
        start, prompt, answer = self._arrays.branches[index].tolist()
        middle, tokens = start + prompt, self._arrays.tokens
        return Branch(tokens[start:middle], tokens[middle : middle + answer], self._arrays.images_of(index))

    @property
    def has_images(self) -> bool:
        """Whether any row of the whole store has a picture."""
        return bool(len(self._arrays.images))

    def images(self) -> list[ImageFile]:
        """Return the pictures of these examples, each once, in order of appearance; those of equal bytes are one."""
        return self._arrays.files_of(self._image_rows(), _HASH)

    def image_files(self) -> list[ImageFile]:
        """Return the files of the pictures of these examples, each state of each once, in order of appearance."""
        return self._arrays.files_of(self._image_rows(), _FILE)

    def image_uses(self) -> int:
        """Return how many times a picture stands in a prompt of these examples."""
        return len(self._image_rows())

    def image_tokens(self) -> Integers:
        """Return the tokens of each picture in a prompt of these examples, in order."""
        lengths: Integers = self._arrays.images[self._image_rows(), 2].astype(np.int64)
        return lengths

    def image_places(self) -> tuple[Integers, Integers]:
        """Return where pictures stand: position in this view of the example, and number of the picture, of each.

        Pictures of equal bytes have one number, from 0.
        """
        rows = self._image_rows()
        if not len(rows):
            return rows, rows
        owners = np.repeat(np.arange(len(self)), self._column(_COUNT))
        examples = np.repeat(owners, self._pictures_of_branches())
        return examples, self._arrays.numbers_of(rows)

    def _pictures_of_branches(self) -> Integers:
        """Return how many pictures each branch of these examples has."""
        branches = _ranges(self._column(_FIRST), self._column(_COUNT))
        ends = np.searchsorted(self._arrays.image_branches, branches, side="right")
        counts: Integers = ends - np.searchsorted(self._arrays.image_branches, branches)
        return counts

    def _image_rows(self) -> Integers:
        """Return which rows of the table of pictures belong to these examples, in their order."""
        if not self.has_images:
            return np.zeros(0, dtype=np.int64)
        firsts, counts = self._column(_FIRST), self._column(_COUNT)
        starts = np.searchsorted(self._arrays.image_branches, firsts)
        return _ranges(starts, np.searchsorted(self._arrays.image_branches, firsts + counts) - starts)

    @property
    def units(self) -> Integers:
        """Number of each example among all units, dropped ones counted."""
        return self._column(_UNIT)

    @property
    def origins(self) -> Integers:
        """Source and row of each example (examples, 2)."""
        return np.column_stack([self._column(_SOURCE), self._column(_ROW)])

    @property
    def largest_id(self) -> int:
        """The largest token id of the whole store."""
        return int(read_manifest(self.folder)["figures"]["largest_id"])

    def count(self, note: str) -> int:
        """Return the number of examples with a note of `tokenize.NOTES`."""
        return len(self.noted(note))

    def noted(self, note: str) -> Integers:
        """Return the positions in this view of the examples with a note of `tokenize.NOTES`."""
        return np.flatnonzero(self._notes & note_bit(note)).astype(np.int64)

    @functools.cached_property
    def _notes(self) -> npt.NDArray[np.uint32]:
        """Notes of each example as bits, read once: a report asks for every note."""
        return self._column(_NOTES).astype(np.uint32)

    def lengths(self) -> Integers:
        """Return the length of each example's longest branch, in tokens."""
        return self._column(_LENGTH)

    def supervised(self) -> Integers:
        """Return the number of supervised tokens of each example."""
        return self._column(_SUPERVISED)

    def _column(self, column: int) -> Integers:
        # Ordinary reads: all that is read through the map counts as this process's memory.
        whole = np.empty(len(self._arrays.examples), dtype=np.int64)
        with (self.folder / "examples.bin").open("rb", buffering=0) as stream:
            for start in range(0, len(whole), _BLOCK_EXAMPLES):
                block = np.fromfile(stream, dtype="<i8", count=_BLOCK_EXAMPLES * len(EXAMPLE_COLUMNS))
                whole[start : start + _BLOCK_EXAMPLES] = block.reshape(-1, len(EXAMPLE_COLUMNS))[:, column]
        return whole[self._indices]

    def content_sha256(self) -> str:
        """Return a hash over ids, branch borders and order of the examples: everything that training sees of them."""
        digest = hashlib.sha256(self._column(_COUNT).tobytes())
        for _, branches in self.branch_blocks():
            digest.update(np.ascontiguousarray(branches[:, 1:]).tobytes())
        with (self.folder / "tokens.bin").open("rb", buffering=0) as stream:
            for _, branches in self.branch_blocks():
                starts, ends = branches[:, 0], branches.sum(axis=1)
                # Branches that lie one behind the other are read in one piece.
                breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
                pieces = zip(starts[[0, *breaks]].tolist(), ends[[*(breaks - 1), -1]].tolist(), strict=True)
                for start, end in pieces:
                    _hash_tokens(digest, stream, start, end)
        self._hash_images(digest)
        return digest.hexdigest()

    def _hash_images(self, digest: "hashlib._Hash") -> None:
        """Hash which pictures stand where; nothing where there are none."""
        rows = self._image_rows()
        if not len(rows):
            return
        digest.update(self._pictures_of_branches().astype("<i8").tobytes())
        for start in range(0, len(rows), _BLOCK_EXAMPLES):
            block = self._arrays.images[rows[start : start + _BLOCK_EXAMPLES]]
            digest.update(np.ascontiguousarray(block[:, _SHOWN]).tobytes())

    @property
    def tokens(self) -> TokenIds:
        """Ids of the whole store, mapped: prompt and answer of each branch, one branch behind the other."""
        return self._arrays.tokens

    def branch_blocks(self) -> Iterator[tuple[Integers, Integers]]:
        """Yield blocks of examples: branches of each; start in `tokens`, prompt and answer length of each branch."""
        firsts, counts = self._column(_FIRST), self._column(_COUNT)
        for start in range(0, len(self), _BLOCK_EXAMPLES):
            first, count = firsts[start : start + _BLOCK_EXAMPLES], counts[start : start + _BLOCK_EXAMPLES]
            yield count, self._arrays.branches[_ranges(first, count)]

    def tokens_alone(self) -> Integers:
        """Return the tokens that go through the model for each example by itself: all of a branch but its last."""
        tokens = [
            np.add.reduceat(branches[:, 1:].sum(axis=1) - 1, np.cumsum(count) - count)
            for count, branches in self.branch_blocks()
        ]
        return np.concatenate(tokens)

    def select(self, positions: Integers) -> "TokenStore":
        """Return a view of the examples at `positions` of this view."""
        view = TokenStore.__new__(TokenStore)
        # The same maps: what several of them map counts several times.
        view.folder, view._arrays, view._indices = self.folder, self._arrays, self._indices[positions]
        return view

    def __getstate__(self) -> tuple[Path, Integers]:
        return self.folder, self._indices

    def __setstate__(self, state: tuple[Path, Integers]) -> None:
        self.__init__(*state)  # type: ignore[misc]


class _Arrays:
    """The files of a store, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.tokens = _open_array(folder, "tokens.bin").reshape(-1)
        self.branches = _open_array(folder, "branches.bin")
        self.examples = _open_array(folder, "examples.bin")
        self.images = _open_array(folder, "images.bin")
        self._paths = _open_array(folder, "paths.bin").reshape(-1)
        self.image_branches = np.ascontiguousarray(self.images[:, 0])

    def images_of(self, branch: int) -> tuple[PlacedImage, ...]:
        """Return the pictures in a branch's prompt."""
        if not len(self.images):
            return ()
        first, last = np.searchsorted(self.image_branches, (branch, branch + 1)).tolist()
        return tuple(self._image(row) for row in self.images[first:last])

    def _told_by(self, rows: Integers, columns: slice) -> npt.NDArray[np.void]:
        """Return some columns of some rows of the table of pictures, those of a row as one value."""
        told = np.ascontiguousarray(self.images[rows, columns])
        return told.view(f"V{told.itemsize * told.shape[1]}")

    def numbers_of(self, rows: Integers) -> Integers:
        """Return a number for the picture in each of some rows of the table, the same for equal bytes."""
        numbers = np.unique(self._told_by(rows, _HASH), return_inverse=True)[1]
        found: Integers = numbers.reshape(-1).astype(np.int64)
        return found

    def files_of(self, rows: Integers, columns: slice) -> list[ImageFile]:
        """Return the files in some rows of the table of pictures, once each where these columns are equal, in order."""
        if not len(rows):
            return []
        first = np.unique(self._told_by(rows, columns), return_index=True)[1]
        # A path stands there once for each chunk of rows that was packed together.
        return list(dict.fromkeys(self._file(self.images[row]) for row in rows[np.sort(first)]))

    def _image(self, row: Integers) -> PlacedImage:
        _, start, length, rows, columns = row[:5].tolist()
        return PlacedImage(self._file(row), start, length, rows, columns)

    def _file(self, row: Integers) -> ImageFile:
        *seen, where, long = row[[5, 6, 7, 8, 13, 14]].tolist()
        path = os.fsdecode(self._paths[where : where + long].tobytes())
        return ImageFile(path, np.ascontiguousarray(row[_HASH]).tobytes().hex(), *seen)


def _ranges(starts: Integers, lengths: Integers) -> Integers:
    """Return start, start + 1, ... of each range, one range behind the other."""
    steps = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    whole: Integers = np.repeat(starts, lengths) + steps
    return whole


def _open_array(folder: Path, name: str) -> npt.NDArray[Any]:
    path, (kind, columns) = folder / name, ARRAYS[name]
    if not path.stat().st_size:  # nothing to map
        return np.zeros((0, columns), dtype=kind)
    # A plain array over the map: slices of `np.memmap` carry a dictionary each.
    return np.asarray(np.memmap(path, dtype=kind, mode="r")).reshape(-1, columns)


def _hash_tokens(digest: "hashlib._Hash", stream: BinaryIO | Any, start: int, end: int) -> None:
    position, last = 4 * start, 4 * end
    stream.seek(position)
    while position < last:
        raw = stream.read(min(_BLOCK_BYTES, last - position))
        if not raw:
            raise OSError(None, "the file of tokens ends before its last token", str(stream.name))
        digest.update(raw)
        position += len(raw)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a store.

    Returns:
        files (bytes and SHA-256 of each), figures (largest_id, supervised_tokens, total_tokens),
        key (what decided on the tokens, by name) and report.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
        content = whole["content"]
        if whole["sha256"] == content_hash(content) and all(content[part] is not None for part in _MANIFEST_PARTS):
            return dict(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{MANIFEST} is damaged")


_MANIFEST_PARTS = ("files", "figures", "key", "report")


def content_hash(content: object) -> str:
    """Return the hash of a JSON value, which a file holds beside it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_damage(folder: Path) -> str | None:
    """Read a whole store and return what is wrong with it, or None.

    Raises:
        PermissionError: somebody else keeps it from being read. Writing it anew would fail too,
            with a reason that misleads.
    """
    try:
        files: Mapping[str, Any] = read_manifest(folder)["files"]
        for name in ARRAYS:
            size = (folder / name).stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size:,} bytes, {files[name]['bytes']:,} were written"
        changed = [name for name in ARRAYS if file_sha256(folder / name) != files[name]["sha256"]]
        return f"{changed[0]} is not what was written" if changed else None
    except PermissionError:
        raise
    except OSError as error:
        return f"{Path(str(error.filename or folder)).name}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError) as error:
        return str(error)


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a whole store, its dropped units as [unit, source index, row, reason]."""
    report = dict(read_manifest(folder)["report"])
    reasons = report.pop("reasons")
    drops = np.fromfile(folder / "drops.bin", dtype=ARRAYS["drops.bin"][0]).reshape(-1, len(DROP_COLUMNS))
    report["dropped"] = [[unit, source, row, reasons[reason]] for unit, source, row, reason in drops.tolist()]
    return report
