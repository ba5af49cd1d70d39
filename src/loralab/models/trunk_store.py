"""Hidden states by token path: a file of rows, and a table from path to row.

Owns the layout of the cache's folder: rows of numbers, the path of each row, and a manifest that says how
much of them counts. A path is known by the 64-bit hash of its tokens that keys dropout too; token and depth are
kept beside it. N paths have a chance of N^2 / 2^65 that two of them share a hash (10 million: 3 in a million), and
then tokens and depths tell them apart in all but about one case of a vocabulary's size: that is an error here.
"""

import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loralab.run import write_json

MANIFEST = "manifest.json"
STATES, PATHS = "states.bin", "paths.bin"
Integers = npt.NDArray[np.int64]


class PathCollision(Exception):
    """Two different token paths have the same hash."""


class PathTable:
    """From path to row; rows are numbered as they come."""

    def __init__(self) -> None:
        self._hashes = np.zeros(0, dtype=np.int64)  # sorted
        self._rows = np.zeros(0, dtype=np.int64)
        self._marks = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, hashes: Integers) -> Integers | None:
        """Return the row of each path, or None where one is not there."""
        places, there = self._places(hashes)
        return self._rows[places] if there.all() else None

    def missing(self, hashes: Integers, marks: Integers) -> Integers:
        """Return the indices of the paths that are not there, each once.

        Args:
            hashes: of paths; one may occur several times.
            marks: what else is known of each path, equal for equal paths.

        Raises:
            PathCollision: two paths with one hash have different marks.
        """
        unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        places, there = self._places(unique)
        if (marks[first][inverse] != marks).any() or (self._marks[places[there]] != marks[first][there]).any():
            raise PathCollision
        return np.sort(first[~there]).astype(np.int64)

    def add(self, hashes: Integers, marks: Integers) -> None:
        """Give new paths the next rows, in order."""
        order = np.argsort(hashes)
        places = np.searchsorted(self._hashes, hashes[order])
        self._rows = np.insert(self._rows, places, len(self) + order)
        self._marks = np.insert(self._marks, places, marks[order])
        self._hashes = np.insert(self._hashes, places, hashes[order])

    def keep(self, rows: int) -> None:
        """Forget all rows from number `rows` on."""
        kept = self._rows < rows
        self._hashes, self._rows, self._marks = (each[kept] for each in (self._hashes, self._rows, self._marks))

    def _places(self, hashes: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
        if not len(self):
            return np.zeros(len(hashes), dtype=np.int64), np.zeros(len(hashes), dtype=np.bool_)
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self) - 1)
        return places, self._hashes[places] == hashes


class TrunkStore:
    """Rows of hidden states that are appended once and read often.

    Args:
        width: numbers of a row (D).
        dtype: their type.
        folder: where the rows lie; None keeps them in memory.
        key: what the rows depend on.
    """

    def __init__(
        self, *, width: int, dtype: torch.dtype, folder: Path | None = None, key: Mapping[str, Any] | None = None
    ) -> None:
        self.width, self.dtype, self.folder = width, dtype, folder
        self.key = dict(key or {})
        self._table = PathTable()
        self._row_bytes = width * dtype.itemsize
        self._memory = {STATES: io.BytesIO(), PATHS: io.BytesIO()}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def bytes(self) -> int:
        """Size of the rows."""
        return len(self) * self._row_bytes

    def find(self, hashes: Integers) -> Integers | None:
        """Return the row of each path, or None where one is not stored."""
        return self._table.find(hashes)

    def missing(self, hashes: Integers, marks: Integers) -> Integers:
        """Return the indices of the paths that are not stored, each once; arguments as `PathTable.missing`."""
        return self._table.missing(hashes, marks)

    def append(self, hashes: Integers, marks: Integers, states: Tensor) -> None:
        """Store new paths.

        Args:
            hashes: of the paths (M).
            marks: what else is known of each (M).
            states: their hidden states (M, D).

        Raises:
            OSError: they cannot be written; nothing was stored.
        """
        before = len(self)
        try:
            with self._opened(STATES) as stream:
                _write(stream, before * self._row_bytes, _as_bytes(states.to("cpu", self.dtype).contiguous()))
            with self._opened(PATHS) as stream:
                _write(stream, before * 16, np.stack([hashes, marks], axis=1).tobytes())
        except OSError:
            self._cut(before)
            raise
        self._table.add(hashes, marks)

    def read(self, rows: Integers) -> Tensor:
        """Return stored rows (M, D), in the order asked for."""
        found = torch.empty((len(rows), self.width), dtype=self.dtype)
        into = memoryview(_as_bytes(found).data)
        starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
        # Ordinary reads: pages of a map would count as this process's memory.
        with self._opened(STATES) as stream:
            for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
                stream.seek(int(rows[start]) * self._row_bytes)
                _read_whole(stream, into[start * self._row_bytes : end * self._row_bytes])
        return found

    def commit(self, **progress: Any) -> None:
        """Make what is stored so far count, whatever happens to this process.

        Args:
            **progress: how far the work is, for `resume`.
        """
        if self.folder is None:
            return
        for name in (STATES, PATHS):
            with self._opened(name) as stream:
                os.fsync(stream.fileno())
        write_json(self.folder / MANIFEST, {"key": self.key, "rows": len(self), "progress": progress})

    def resume(self) -> dict[str, Any] | None:
        """Take up what an earlier process committed under the same key, and drop all else.

        Returns:
            The progress that was committed, or None where nothing of this key was.
        """
        rows, progress = self._committed()
        self._cut(rows)
        if rows:
            with self._opened(PATHS) as stream:
                pairs = np.frombuffer(stream.read(rows * 16), dtype=np.int64).reshape(-1, 2)
            self._table.add(pairs[:, 0], pairs[:, 1])
        return progress

    def keep(self, rows: int) -> None:
        """Drop all rows from number `rows` on."""
        self._table.keep(rows)
        self._cut(rows)

    def clear(self) -> None:
        """Drop everything."""
        self.keep(0)
        if self.folder is not None:
            (self.folder / MANIFEST).unlink(missing_ok=True)

    def _committed(self) -> tuple[int, dict[str, Any] | None]:
        if self.folder is None:
            return 0, None
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            rows, progress = int(manifest["rows"]), dict(manifest["progress"])
            same = manifest["key"] == json.loads(json.dumps(self.key))
        except (OSError, ValueError, KeyError, TypeError):
            return 0, None
        sizes = []
        for name in (STATES, PATHS):
            with self._opened(name) as stream:
                sizes.append(stream.seek(0, os.SEEK_END))
        whole = sizes[0] >= rows * self._row_bytes and sizes[1] >= rows * 16
        return (rows, progress) if same and whole else (0, None)

    def _cut(self, rows: int) -> None:
        for name, size in ((STATES, self._row_bytes), (PATHS, 16)):
            with self._opened(name) as stream:
                stream.truncate(rows * size)

    @contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        """Open a file of the store for reading and writing; none stays open in between."""
        if self.folder is None:
            yield self._memory[name]
            return
        path = self.folder / name
        path.touch()
        with path.open("r+b", buffering=0) as stream:
            yield cast(BinaryIO, stream)


def _as_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    return tensor.view(torch.uint8).numpy().reshape(-1)


def _write(stream: BinaryIO, start: int, data: Any) -> None:
    stream.seek(start)
    view = memoryview(data).cast("B")
    while view:
        view = view[stream.write(view) :]


def _read_whole(stream: BinaryIO, into: memoryview) -> None:
    while into:
        count = stream.readinto(into)  # type: ignore[attr-defined]
        if not count:
            raise OSError(None, "the file of hidden states ends before its last row", STATES)
        into = into[count:]
