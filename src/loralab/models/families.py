"""Facts about architectures: which layers a token tree can pass, and what happens behind the head.

Owns the static tables. What a table cannot know is measured on the loaded model, in
`self_check.py`; a family that neither knows takes the padded layout.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from loralab.errors import ModelError

# Layers whose mask is an index function of query and key; all others compress, recur or convolve.
TREE_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Rotary embeddings that are a function of the token's own position.
STATIC_ROPE_TYPES = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
# Settings by which attention scores depend on where a key lies in the row, not on its position.
_ROW_DEPENDENT = {
    "alibi": "ALiBi biases attention by distance in the row",
    "attn_temperature_tuning": "the attention temperature is tuned by place in the row",
    "use_linear_attn": "it has linear attention",
    "is_encoder_decoder": "it is an encoder-decoder",
}


# Activations that models compute in several operations, each of which keeps a tensor, and the same function as
# one operation of torch: GELU by its tanh approximation.
ACTIVATION_TWINS = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
# Where configurations name the activation.
_ACTIVATION_KEYS = ("activation_function", "hidden_act", "hidden_activation")


@dataclass(frozen=True, slots=True)
class Positions:
    """How a model's position embedding depends on what else is in a batch.

    Attributes:
        kind: "static", or the rope type that is not.
        threshold: path length beyond which the embedding changes, or None.
    """

    kind: str
    threshold: int | None = None


@dataclass(frozen=True, slots=True)
class LogitTail:
    """What a model does to logits behind its head: scale, then cap.

    Attributes:
        factor: what logits are multiplied by.
        cap: `cap * tanh(logits / cap)`, or None.
    """

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the model's own logits, given those of its head."""
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def take_activation_twin(config: PreTrainedConfig) -> tuple[str, str] | None:
    """Let a base compute its activation in one operation, where torch has the same function.

    Args:
        config: the base model's, changed in place.

    Returns:
        The names of the activation before and now, or None where there is no such twin.
    """
    text = config.get_text_config()
    if not type(text).__module__.startswith("transformers."):
        return None  # code of its own may know activations by other names
    for key in _ACTIVATION_KEYS:
        before = getattr(text, key, None)
        if isinstance(before, str) and before in ACTIVATION_TWINS:
            setattr(text, key, ACTIVATION_TWINS[before])
            return before, ACTIVATION_TWINS[before]
    return None


def find_tree_obstacle(config: PreTrainedConfig) -> str | None:
    """Return why an architecture cannot take token trees as far as its configuration tells, or None.

    Args:
        config: the base model's.
    """
    text = config.get_text_config()
    for name, reason in _ROW_DEPENDENT.items():
        if getattr(text, name, False):
            return reason
    foreign = sorted({str(kind) for kind in getattr(text, "layer_types", None) or ()} - TREE_LAYER_TYPES)
    return f"it has layers of type {', '.join(foreign)}" if foreign else None


def find_positions(config: PreTrainedConfig) -> Positions:
    """Return whether positions depend on the longest path of a batch, and from which length on."""
    text = config.get_text_config()
    for rope in _rope_settings(text):
        kind = str(rope.get("rope_type", "default"))
        if kind not in STATIC_ROPE_TYPES:
            original = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            return Positions(kind, int(original or text.max_position_embeddings))
    return Positions("static")


def _rope_settings(text: PreTrainedConfig) -> list[Mapping[str, Any]]:
    held = getattr(text, "rope_parameters", None) or {}
    if "rope_type" in held:
        return [held]
    return [value for value in held.values() if isinstance(value, Mapping)]


def check_positions(config: PreTrainedConfig, max_length: int) -> None:
    """Check that no row is so long that the embedding would depend on rows seen before.

    Raises:
        ModelError: dynamic NTK scaling with longer rows; its frequencies follow the longest so far.
    """
    positions = find_positions(config)
    if "dynamic" in positions.kind and positions.threshold is not None and max_length > positions.threshold:
        raise ModelError(
            f"max_length {max_length} is beyond the {positions.threshold} positions of this model's training, and "
            f"its {positions.kind} rope would make a row depend on the longest row seen before",
            where="key data.max_length",
            fix=f"set data.max_length: {positions.threshold} or less",
        )


def find_logit_tail(config: PreTrainedConfig) -> LogitTail:
    """Return what the configuration says of logits behind the head."""
    text = config.get_text_config()
    factor, cap = 1.0, None
    for name, read in LOGIT_TAILS.items():
        value = getattr(text, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            tail = read(float(value))
            factor, cap = factor * tail.factor, cap or tail.cap
    return LogitTail(factor, cap)


# Settings that change logits behind the head, by their names in transformers' configurations.
LOGIT_TAILS: dict[str, Callable[[float], LogitTail]] = {
    "final_logit_softcapping": lambda cap: LogitTail(cap=cap),
    "logits_soft_cap": lambda cap: LogitTail(cap=cap),
    "output_logit_soft_cap": lambda cap: LogitTail(cap=cap),
    "logit_scale": lambda factor: LogitTail(factor=factor),
    "lm_head_multiplier": lambda factor: LogitTail(factor=factor),
    "output_multiplier": lambda factor: LogitTail(factor=factor),
    "logits_scaling": lambda divisor: LogitTail(factor=1.0 / divisor),
}
