"""Writing a store so that a kill at any moment loses only the last seconds.

Owns the commit points. Arrays are only appended to; at a commit they are flushed to the disk, and
then a small progress file, put in place by rename, says how much of them counts. Whoever goes on
cuts them back to that.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from loralab.data.tokens.packing import EXAMPLE_COLUMNS, IMAGE_COLUMNS, PackedRows
from loralab.data.tokens.store import ARRAYS, MANIFEST, content_hash

PROGRESS = "progress.json"
_BUFFER_BYTES = 2**20
# How many different system messages the report counts by text.
_LISTED_SYSTEMS = 4


@dataclass(slots=True)
class Progress:
    """How far the writing of a store is.

    Attributes:
        source: number of the source that is read.
        source_rows: its rows that are done.
        rows: rows done in all sources.
        units: units that came of them, dropped ones counted.
        examples: kept units.
        branches: of these.
        tokens: of these, as they lie in the file.
        supervised_tokens: of these.
        path_bytes: of the paths of pictures, as they lie in the file.
        total_tokens: sum of the lengths of each example's longest branch.
        largest_id: the largest token id.
        reasons: why units were dropped, in order of appearance.
        systems: kept units for each of the first few different system messages.
        systems_without: kept units without one.
    """

    source: int = 0
    source_rows: int = 0
    rows: int = 0
    units: int = 0
    examples: int = 0
    branches: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    path_bytes: int = 0
    total_tokens: int = 0
    largest_id: int = 0
    reasons: list[str] = field(default_factory=list)
    systems: dict[str, int] = field(default_factory=dict)
    systems_without: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {name: getattr(self, name) for name in self.__slots__}


class StoreWriter:
    """Appends rows to the arrays in a folder, from the last commit point on where there is one.

    Args:
        folder: nobody else writes there meanwhile.

    Attributes:
        progress: how far the store is.
        restarted: why what was there was thrown away, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.progress = Progress()
        self.restarted: str | None = None
        folder.mkdir(exist_ok=True)
        self._files: dict[str, BinaryIO] = {}
        self._hashes: dict[str, Any] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        kept: dict[str, Any] = {}
        if (self.folder / PROGRESS).exists():
            try:
                self.progress, kept = _read_progress(self.folder / PROGRESS)
                self._hashes = {name: _hash_beginning(self.folder / name, kept[name]) for name in ARRAYS}
            except FileNotFoundError as error:
                self.progress, kept, self.restarted = Progress(), {}, f"{Path(error.filename).name} is gone"
            except ValueError as error:
                self.progress, kept, self.restarted = Progress(), {}, str(error)
        for name in ARRAYS:
            size = kept[name]["bytes"] if kept else 0
            path = self.folder / name
            path.touch()
            os.truncate(path, size)
            self._files[name] = path.open("ab", buffering=_BUFFER_BYTES)
            if not kept:
                self._hashes[name] = hashlib.sha256()

    def add(self, packed: PackedRows, source: int) -> None:
        """Append rows of the source with this number, which follow the last ones."""
        progress = self.progress
        if source != progress.source:
            progress.source, progress.source_rows = source, 0
        examples, branches, drops = packed.examples, packed.branches, packed.drops
        examples += np.asarray([0, source, progress.units, progress.branches, 0, 0, 0, 0])
        branches += np.asarray([progress.tokens, 0, 0])
        numbers = np.asarray([self._reason(reason) for reason in packed.reasons], dtype=np.int64)
        if len(drops):
            drops += np.asarray([progress.units, source, 0, 0])
            drops[:, 3] = numbers[drops[:, 3]]
        images = packed.images
        if len(images):
            images[:, IMAGE_COLUMNS.index("branch")] += progress.branches
            images[:, IMAGE_COLUMNS.index("path_start")] += progress.path_bytes
        arrays: tuple[npt.NDArray[Any], ...] = (packed.tokens, branches, examples, drops, images, packed.paths)
        for (name, (kind, _)), array in zip(ARRAYS.items(), arrays, strict=True):
            raw = np.ascontiguousarray(array, dtype=kind).data.cast("B") if array.size else b""
            self._files[name].write(raw)
            self._hashes[name].update(raw)
        self._count(packed)

    def _reason(self, reason: str) -> int:
        if reason not in self.progress.reasons:
            self.progress.reasons.append(reason)
        return self.progress.reasons.index(reason)

    def _count(self, packed: PackedRows) -> None:
        progress, examples = self.progress, packed.examples
        progress.source_rows += packed.rows
        progress.rows += packed.rows
        progress.units += packed.units
        progress.examples += len(examples)
        progress.branches += len(packed.branches)
        progress.tokens += len(packed.tokens)
        progress.path_bytes += len(packed.paths)
        progress.total_tokens += int(examples[:, EXAMPLE_COLUMNS.index("length")].sum())
        progress.supervised_tokens += int(examples[:, EXAMPLE_COLUMNS.index("supervised")].sum())
        progress.largest_id = max(progress.largest_id, int(packed.tokens.max(initial=0)))
        for system, count in packed.systems.items():
            if system is None:
                progress.systems_without += count
            elif system in progress.systems or len(progress.systems) < _LISTED_SYSTEMS:
                progress.systems[system] = progress.systems.get(system, 0) + count

    def commit(self) -> None:
        """Make sure that what was added so far survives whatever happens next."""
        for stream in self._files.values():
            stream.flush()
            os.fsync(stream.fileno())
        _write_json(self.folder / PROGRESS, {"progress": self.progress.as_dict(), "files": self._describe_files()})

    def finish(self, key: dict[str, str]) -> None:
        """Commit the last rows and write the manifest; the folder is then a whole store.

        Args:
            key: what decided on the tokens, by readable name.
        """
        self.commit()
        progress = self.progress.as_dict()
        report = {name: progress[name] for name in ("units", "rows", "systems", "systems_without", "reasons")}
        figures = {name: progress[name] for name in ("largest_id", "supervised_tokens", "total_tokens", "examples")}
        content = {"files": self._describe_files(), "figures": figures, "key": key, "report": report}
        _write_json(self.folder / MANIFEST, content)
        self.close()

    def close(self) -> None:
        """Let go of the files; what was not committed may be lost."""
        for stream in self._files.values():
            with contextlib.suppress(OSError):  # on a full disk closing fails too, and says nothing new
                stream.close()

    def _describe_files(self) -> dict[str, Any]:
        return {
            name: {"bytes": stream.tell(), "sha256": self._hashes[name].hexdigest()}
            for name, stream in self._files.items()
        }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with its hash, so that it is there whole or not at all."""
    beside = path.with_suffix(".new")
    with beside.open("w", encoding="utf-8") as stream:
        json.dump({"content": content, "sha256": content_hash(content)}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)


def _read_progress(path: Path) -> tuple[Progress, dict[str, Any]]:
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["sha256"] == content_hash(whole["content"]):
            return Progress(**whole["content"]["progress"]), dict(whole["content"]["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path.name} is damaged")


def _hash_beginning(path: Path, written: dict[str, Any]) -> Any:
    """Return the running hash of the part of a file that counts.

    Raises:
        ValueError: it is not what was written.
    """
    digest, left = hashlib.sha256(), int(written["bytes"])
    with path.open("rb", buffering=0) as stream:
        while left and (raw := stream.read(min(left, _BUFFER_BYTES))):
            digest.update(raw)
            left -= len(raw)
    if left or digest.hexdigest() != written["sha256"]:
        raise ValueError(f"{path.name} is not what was written")
    return digest
