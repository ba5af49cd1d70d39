"""Features of pictures on disk: one file for each picture, checked when it is read, bounded in all.

Owns the files. What the features are a function of is the name of the folder: pictures, processor and weights.
"""

import contextlib
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loralab.data.example import ImageFile
from loralab.errors import DataError

_CHECK_BYTES = 16  # of the hash behind the numbers


@dataclass(frozen=True, slots=True)
class FeatureStore:
    """Features of pictures in a folder.

    Attributes:
        folder: of these features; others beside it hold those of other weights or processors.
        width: D, numbers of one feature.
        dtype: their type.
    """

    folder: Path
    width: int
    dtype: torch.dtype

    def _path(self, file: ImageFile) -> Path:
        return self.folder / file.sha256[:2] / f"{file.sha256}.bin"

    def bytes_of(self, features: int) -> int:
        """Return what a picture with so many features takes."""
        return features * self.width * self.dtype.itemsize + _CHECK_BYTES

    def holds(self, file: ImageFile, features: int) -> bool:
        """Return whether a picture's features are there, whole as far as their number tells."""
        with contextlib.suppress(OSError):
            return self._path(file).stat().st_size == self.bytes_of(features)
        return False

    def save(self, file: ImageFile, features: Tensor) -> None:
        """Keep the features of a picture (M, D); whole or not at all."""
        raw = features.detach().to("cpu", self.dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()
        path = self._path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_bytes(raw + _digest(raw))
        beside.replace(path)

    def load(self, file: ImageFile) -> Tensor:
        """Return the features of a picture (M, D).

        Raises:
            DataError: they are gone, or not what was written.
        """
        try:
            whole = bytearray(self._path(file).read_bytes())
        except OSError as error:
            raise self._lost(file, error.strerror or str(error)) from error
        raw = whole[:-_CHECK_BYTES]
        if _digest(raw) != bytes(whole[-_CHECK_BYTES:]):
            self._path(file).unlink(missing_ok=True)
            raise self._lost(file, "damaged, and removed now")
        return torch.frombuffer(raw, dtype=torch.uint8).view(self.dtype).view(-1, self.width)

    def _lost(self, file: ImageFile, why: str) -> DataError:
        return DataError(
            f"kept features of the picture {file.path!r}: {why}",
            where=str(self._path(file)),
            fix="go on with --resume, which computes what is missing, or set data.image.cache_features: false",
        )

    def make_room(self, wanted: int, *, most: int) -> bool:
        """Remove features of other weights and processors, the oldest first, until `wanted` bytes fit into `most`.

        What this folder holds already, of these or other pictures, stays.

        Args:
            wanted: bytes that will be added.
            most: bytes that all folders may take together.

        Returns:
            Whether they fit.
        """
        others = [each for each in self.folder.parent.glob("*") if each.is_dir() and each != self.folder]
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)  # folders go by their last use
        sizes = {each: _size(each) for each in others}
        held = sum(sizes.values()) + _size(self.folder)
        for each in sorted(others, key=lambda folder: folder.stat().st_mtime):
            if held + wanted <= most:
                break
            shutil.rmtree(each, ignore_errors=True)
            held -= sizes[each]
        return held + wanted <= most


def _digest(raw: bytes | bytearray) -> bytes:
    return hashlib.blake2b(raw, digest_size=_CHECK_BYTES).digest()


def _size(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in folder.rglob("*.bin")) if folder.is_dir() else 0
