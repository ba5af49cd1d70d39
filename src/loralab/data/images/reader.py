"""The pictures of a micro-batch, as the layout asks for them: pixels, or features that are known already.

Owns the choice between the two for each call; what is kept where is the store's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from loralab.data.example import ImageFile
from loralab.data.images.processor import PictureProcessor


class KnownFeatures(Protocol):
    """Features of pictures that were encoded before; `data.images.feature_store.FeatureStore` is one."""

    def load(self, file: ImageFile) -> Tensor:
        """Return the features of a picture (M, D)."""


@dataclass(frozen=True, slots=True)
class PictureReader:
    """Reads pictures for a planner.

    Attributes:
        processor: decodes them.
        axes: A, of the positions of the model's tokens.
        known: features of all pictures that will be asked for, or None.
    """

    processor: PictureProcessor
    axes: int
    known: KnownFeatures | None = None

    @property
    def token(self) -> int:
        """Id of the token that takes a feature of a picture."""
        return self.processor.token

    def read(self, files: Sequence[ImageFile]) -> Mapping[str, Tensor]:
        """Return pixels, or `features` (M, D), of pictures, one behind the other.

        Raises:
            DataError: a file is not what it was, or cannot be decoded.
        """
        if self.known is not None:
            return {"features": torch.cat([self.known.load(file) for file in files])}
        return self.processor.read(files)

    def knowing(self, known: KnownFeatures | None) -> "PictureReader":
        """Return the same reader with features that are known."""
        return replace(self, known=known)
