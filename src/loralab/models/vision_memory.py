"""What reading pictures takes of memory, by rule: a vision tower's forward cannot be followed without numbers.

Owns the estimate. It counts patches; all families here have plain transformer layers in their towers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

# Numbers that a layer keeps of a patch for the backward sweep, in hidden and intermediate sizes, as for text.
_HIDDEN_KEPT, _INTERMEDIATE_KEPT = 20, 6
# The same of what is alive inside a layer that keeps nothing.
_HIDDEN_ALIVE, _INTERMEDIATE_ALIVE = 8, 2


@dataclass(frozen=True, slots=True)
class TowerMemory:
    """What a vision tower takes, in bytes.

    Attributes:
        kept: of each patch until the backward sweep.
        alive: of each patch while it is encoded, and then no more.
        patches_per_token: patches that become one token of the language model.
    """

    kept: float
    alive: float
    patches_per_token: int

    @property
    def per_token(self) -> float:
        """Bytes of each token that stands for a part of a picture."""
        return self.patches_per_token * (self.kept + self.alive)


def tower_memory(
    config: PreTrainedConfig, *, dtype: torch.dtype, trained: bool, checkpointing: bool = False
) -> TowerMemory:
    """Return what a model's vision tower takes for each patch.

    Args:
        config: the base model's.
        dtype: compute type.
        trained: whether a gradient goes through it.
        checkpointing: whether only inputs of layers are held.
    """
    vision = config.vision_config
    hidden = int(getattr(vision, "embed_dim", None) or vision.hidden_size)
    intermediate = int(getattr(vision, "intermediate_size", None) or hidden * getattr(vision, "mlp_ratio", 4))
    depth = int(getattr(vision, "depth", None) or vision.num_hidden_layers)
    layer = (_HIDDEN_KEPT * hidden + _INTERMEDIATE_KEPT * intermediate) * dtype.itemsize
    held = layer + depth * hidden * dtype.itemsize if checkpointing else depth * layer
    alive = (_HIDDEN_ALIVE * hidden + _INTERMEDIATE_ALIVE * intermediate) * dtype.itemsize
    # Qwen2-VL merges in the tower, Idefics3 behind it.
    merged = int(getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", None) or 1)
    return TowerMemory(held if trained else 0.0, alive, merged**2)


def count_patches(config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> int:
    """Return how many patches the pixels of a micro-batch are; 0 where its features are known.

    Args:
        config: the base model's.
        tensors: of its pictures, by name.
    """
    pixels = tensors.get("pixel_values")
    if pixels is None:
        return 0
    if pixels.dim() == 2:  # cut into patches already
        return int(pixels.shape[0])
    patch = int(config.vision_config.patch_size)
    return math.ceil(pixels.numel() / (pixels.shape[-3] * patch**2))
