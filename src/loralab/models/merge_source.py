"""The files of a base, read tensor by tensor, and which weight of the model each tensor is.

Owns finding the safetensors files of a folder or a Hub id, and the names that transformers gives their tensors.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import CONFIG_NAME
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from loralab.config.schema import ModelConfig
from loralab.errors import ModelError, excerpt
from loralab.hub.cache import LICENCES, in_cache, is_whole

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# A repository may hold the same weights in another cut beside these.
_WANTED = ("model*.safetensors", "*-of-*.safetensors", "*.json", *LICENCES)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The stored weights of a base.

    Attributes:
        folder: where they lie.
        files: safetensors files in order.
        owners: file of each tensor.
    """

    folder: Path
    files: tuple[Path, ...]
    owners: Mapping[str, Path]

    def read(self, name: str) -> Tensor:
        """Return one tensor.

        Raises:
            ModelError: its file cannot be read.
        """
        try:
            with safe_open(str(self.owners[name]), framework="pt") as tensors:
                found: Tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.owners[name], error) from error
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        with safe_open(str(self.owners[name]), framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def names(self, file: Path) -> list[str]:
        """Return the tensors of a file, those of one layer next to each other."""
        return sorted(name for name, owner in self.owners.items() if owner == file)

    def dtype(self) -> torch.dtype:
        """Return the type that most of the stored numbers have."""
        counts: dict[torch.dtype, int] = {}
        for file in self.files:
            with safe_open(str(file), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    part = tensors.get_slice(name)
                    kind = _TYPES.get(str(part.get_dtype()))
                    if kind is not None:
                        counts[kind] = counts.get(kind, 0) + _count(part.get_shape())
        return max(counts, key=lambda kind: counts[kind]) if counts else torch.float32

    def stored_bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(file.stat().st_size for file in self.files)


_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _count(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def open_checkpoint(model: ModelConfig) -> Checkpoint:
    """Find the stored weights of a base: in its folder, or in the snapshot of a Hub id.

    Raises:
        ModelError: there are none, or a file cannot be read.
    """
    folder = checkpoint_folder(model)
    index = folder / INDEX_FILE
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = [SINGLE_FILE]
        files = tuple(folder / str(name) for name in names)
        owners = {}
        for file in files:
            with safe_open(str(file), framework="pt") as tensors:
                owners.update(dict.fromkeys(tensors.keys(), file))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(folder, error) from error
    return Checkpoint(folder, files, owners)


def checkpoint_folder(model: ModelConfig) -> Path:
    """Return the folder of a base; of a Hub id, that of its snapshot.

    Raises:
        ModelError: the Hub does not give it.
    """
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        return folder
    config = in_cache(model.name, CONFIG_NAME, model.revision)
    if config is not None and is_whole(model.name, model.revision):
        return config.parent
    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=list(_WANTED)))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"cannot load the weights of {model.name!r}: {excerpt(error)}",
            where="key model.name",
            fix="check the network and the token, or give a local folder with --model",
        ) from error


def snapshot_revision(folder: Path) -> str | None:
    """Return the commit of a snapshot in the Hub's cache, or None for another folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _unreadable(where: Path, error: Exception) -> ModelError:
    return ModelError(
        f"cannot read the model's weights: {excerpt(error)}", where=str(where), fix="restore the files there"
    )


@dataclass(frozen=True, slots=True)
class KeyMap:
    """Which weight of the model each tensor of a checkpoint is.

    Attributes:
        weights: name in the model of each tensor that is one weight of it, or none.
        converted: tensors that transformers makes weights of in another form, such as fused experts.
    """

    weights: Mapping[str, str]
    converted: frozenset[str]

    def sources(self) -> dict[str, str]:
        """Return the tensor of each weight."""
        return {weight: name for name, weight in self.weights.items()}


def map_keys(checkpoint: Checkpoint, base: PreTrainedModel) -> KeyMap:
    """Find the weight of each stored tensor, as transformers' own loading does.

    Args:
        checkpoint: the stored weights.
        base: the model, without an adapter; on the meta device.
    """
    transforms = get_model_conversion_mapping(base)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    known = base.state_dict()
    prefix = base.base_model_prefix or None
    weights, converted = {}, set()
    for name in checkpoint.owners:
        weight, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if pattern is not None:
            converted.add(name)
        else:
            weights[name] = weight
    return KeyMap(weights, frozenset(converted))
