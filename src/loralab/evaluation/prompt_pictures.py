"""Prompts with pictures, as `generate` takes them: what tells them apart, and the tensors beside their ids.

Owns that a picture is decoded once however many prompts of a call show it, as far as memory is meant for that.
"""

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loralab.data.example import ImageFile, PlacedImage
from loralab.data.images.processor import PictureProcessor
from loralab.errors import ModelError
from loralab.layout.paths import token_keys
from loralab.models.supervised import SupervisedPeftModel

# Pixels of pictures that were decoded are kept up to so many bytes.
_KEPT_BYTES = 256 * 2**20
# What some families want to know of each token: 1 where it stands for a picture, else 0.
_KINDS = "mm_token_type_ids"


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts, whose ids and pictures may be made when they are read.

    Attributes:
        ids: token ids of each.
        images: gives the pictures of one by its number.
    """

    ids: Sequence[Sequence[int]]
    images: Callable[[int], Sequence[PlacedImage]] = lambda _: ()

    def digest(self, number: int) -> bytes:
        """Return what tells a prompt from others in little memory; pictures of one size have the same ids."""
        keys = token_keys(np.asarray(self.ids[number], dtype=np.int64), self.images(number))
        return hashlib.blake2b(keys.tobytes(), digest_size=16).digest()


class PictureInputs:
    """What a model's own forward takes of the pictures of prompts.

    Args:
        model: base with adapter.
        pictures: its processor, or None where it reads no pictures.
    """

    def __init__(self, model: SupervisedPeftModel, pictures: PictureProcessor | None) -> None:
        self._model, self._pictures = model, pictures
        self._decoded: OrderedDict[ImageFile, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0

    def read(self, ids: Tensor, images: Sequence[Sequence[PlacedImage]]) -> dict[str, Tensor]:
        """Return the tensors that go to `generate` beside ids and mask; none where no prompt has a picture.

        Args:
            ids: of all prompts, padded (B, L).
            images: pictures of each prompt, in order.

        Raises:
            DataError: a file is not what it was, or cannot be decoded.
            ModelError: the model reads no pictures.
        """
        files = [image.file for shown in images for image in shown]
        if not files:
            return {}
        if self._pictures is None:
            raise ModelError(
                "a prompt with a picture, but the model reads none",
                where=files[0].path,
                fix="take an adapter of a vision-language model, or leave the picture out",
            )
        found = self._pictures.join([self._tensors(file, self._pictures) for file in files])
        if _KINDS in inspect.signature(type(self._model.language_model).forward).parameters:
            found[_KINDS] = (ids == self._pictures.token).to(torch.int64)
        device = self._model.embedding.weight.device
        return {name: value.to(device) for name, value in found.items()}

    def _tensors(self, file: ImageFile, pictures: PictureProcessor) -> dict[str, Tensor]:
        known = self._decoded.get(file)
        if known is None:
            known = self._decoded[file] = pictures.read([file])
            self._bytes += _size(known)
            while self._bytes > _KEPT_BYTES and len(self._decoded) > 1:
                self._bytes -= _size(self._decoded.popitem(last=False)[1])
        self._decoded.move_to_end(file)
        return known


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors.values())
