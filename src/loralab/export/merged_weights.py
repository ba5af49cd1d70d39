"""A merged model on disk: its files of weights, read one tensor at a time.

Owns where a tensor lies. Nothing here holds more than one.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loralab.errors import ModelError, excerpt
from loralab.run import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class MergedWeights:
    """The weights of a folder in Hugging Face layout.

    Args:
        folder: with `model.safetensors`, or several files and their index.

    Attributes:
        names: of all tensors.

    Raises:
        ModelError: there are none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if (folder / INDEX).is_file():
            found = {str(name): str(file) for name, file in read_json(folder / INDEX).get("weight_map", {}).items()}
        else:
            found = dict.fromkeys(self._names_in(SINGLE), SINGLE)
        self._files = found
        self.names = tuple(found)

    def _names_in(self, file: str) -> list[str]:
        try:
            with safe_open(str(self._folder / file), framework="pt") as tensors:
                return list(tensors.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot read {file}: {excerpt(error)}",
                where=str(self._folder),
                fix="give a run, or a folder that `loralab merge` wrote",
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        with safe_open(str(self._folder / self._files[name]), framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        with safe_open(str(self._folder / self._files[name]), framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)
