"""How many tokens may go through the model at once.

Owns the choice behind `training.token_budget: auto`, what is free, and what of it may be used. The budget is
resolved once per run and kept: it never changes the loss, but a resume is bit-equal only under the same one.
What a token takes is counted on the model itself (`blueprint.py`); the rule of thumb here stands in where that
cannot be.
"""

import math
from dataclasses import dataclass

import psutil
import torch
from transformers.configuration_utils import PreTrainedConfig

from loralab.models.limits import read_limits
from loralab.models.precision import Resolved

# Longer micro-batches no longer raise the rate: the products are large enough.
_CEILING = {"cuda": 16_384, "cpu": 4_096, "mps": 4_096}
# What may be used of free memory. On a CPU running out cannot be caught, so more is left.
_USABLE = {"cuda": 0.85, "cpu": 0.5, "mps": 0.5}
# Activations that a layer saves for the backward sweep: so many times hidden and so many times
# intermediate size, in the compute type (norms, projections, attention, products of the MLP).
_HIDDEN_SAVED, _INTERMEDIATE_SAVED = 20, 6
# Scores that are capped or have sinks are computed by hand and saved, four float32 numbers a pair and head.
_PAIR_BYTES = 16
_SMALLEST = 256


@dataclass(frozen=True, slots=True)
class TokenMemory:
    """What a micro-batch takes at most, as a line over its tokens.

    Attributes:
        per_token: bytes of each token.
        fixed: bytes of any micro-batch: logits of a chunk, gradients.
    """

    per_token: float
    fixed: float


def resolve_token_budget(
    setting: str | int,
    *,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    checkpointing: bool,
    sharing: int = 1,
    counted: TokenMemory | None = None,
    free: int | None = None,
) -> Resolved[int]:
    """Choose the most tokens of a micro-batch.

    Args:
        setting: `training.token_budget`.
        config: the base model's.
        dtype: compute type.
        device: where to compute; the model is there already.
        checkpointing: whether activations are recomputed.
        sharing: processes that share a CPU's memory.
        counted: what a micro-batch takes, or None for the rule of thumb.
        free: bytes that are free once the model is there; None for what is free now.
    """
    if setting != "auto":
        return Resolved(int(setting), "set in training.token_budget")
    left = free_bytes(device) if free is None else free
    usable = usable_bytes(device, free=left, sharing=sharing)
    if counted is None:
        counted = TokenMemory(activation_bytes(config, dtype=dtype, checkpointing=checkpointing), 0.0)
    ceiling = _CEILING.get(device.type, 4_096)
    fitting = _fitting_tokens(max(usable - counted.fixed, 0.0), counted.per_token, pair_bytes(config, dtype=dtype))
    budget = max(_SMALLEST, 1 << (max(min(fitting, ceiling), 1).bit_length() - 1))
    if fitting >= ceiling:
        return Resolved(budget, f"more tokens at once bring no speed on {device.type}")
    shown = f"{usable / 2**30:.1f} GiB at about {counted.per_token / 2**10:.0f} KiB of activations per token"
    return Resolved(budget, f"{shown}, rounded down to a power of two")


def usable_bytes(device: torch.device, *, free: int, sharing: int = 1) -> float:
    """Return what micro-batches may take of the memory that is free.

    Args:
        device: where to compute.
        free: bytes that are free once the model is there.
        sharing: processes that share a CPU's memory.
    """
    return free * _USABLE.get(device.type, 0.5) / (1 if device.type == "cuda" else sharing)


def micro_batch_bytes(tokens: int, counted: TokenMemory, *, per_pair: float) -> float:
    """Return what a micro-batch takes whose tokens are one tree.

    Args:
        tokens: how many.
        counted: what tokens take.
        per_pair: of `pair_bytes`.
    """
    return counted.fixed + counted.per_token * tokens + per_pair * tokens**2


def activation_bytes(config: PreTrainedConfig, *, dtype: torch.dtype, checkpointing: bool) -> float:
    """Return an estimate of the activations that a token holds until the backward sweep, in bytes.

    Args:
        config: the base model's.
        dtype: compute type.
        checkpointing: whether only the inputs of layers are held.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    intermediate = int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden)
    experts = int(getattr(text, "num_experts_per_tok", None) or 1)
    layer = (_HIDDEN_SAVED * hidden + _INTERMEDIATE_SAVED * intermediate * experts) * dtype.itemsize
    layers = int(text.num_hidden_layers)
    return float(layer + layers * hidden * dtype.itemsize if checkpointing else layers * layer)


def pair_bytes(config: PreTrainedConfig, *, dtype: torch.dtype) -> float:
    """Return an estimate of the bytes that a query-key pair of one tree holds until the backward sweep.

    Args:
        config: the base model's.
        dtype: compute type, which masks have too.
    """
    text = config.get_text_config()
    masks = 2.0 * dtype.itemsize  # one for each kind of layer
    by_hand = getattr(text, "attn_logit_softcapping", None) is not None or text.model_type == "gpt_oss"
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    return masks + (int(text.num_hidden_layers) * heads * _PAIR_BYTES if by_hand else 0)


def _fitting_tokens(free: float, per_token: float, per_pair: float) -> int:
    """Solve per_token * T + per_pair * T ** 2 = free for T, as where all tokens are one tree."""
    return int((math.sqrt(per_token**2 + 4 * per_pair * free) - per_token) / (2 * per_pair))


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device; on a CPU, within the limit of the container too."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    left = read_limits().left_bytes
    return available if left is None else min(available, left)
