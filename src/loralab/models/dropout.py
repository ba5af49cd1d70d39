"""LoRA dropout whose masks are a function of what a token is, not of where it lies.

Owns the counter-based generator. A mask is keyed by (seed, step, layer, all tokens up to this
one): so every layout and cut of a step, and every number of processes, drops the same inputs;
recomputation sees the same mask, and a resume needs nothing replayed. Rows that begin alike take
the same masks there, whether they are computed once or each for itself. Integer arithmetic alone,
so every device agrees.

Source: the mixing function is SplitMix64's finalizer (Steele, Lea & Flood 2014, Fast splittable
pseudorandom number generators, fig. 13).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loralab.errors import ModelError

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB
_LANES = 4  # 16-bit numbers in each 64-bit one
_LANE_VALUES = 1 << 16


@dataclass(slots=True)
class DropoutKeys:
    """Keys of the tokens that are going through the model, shared by all its layers.

    Set before each forward and left in place, since a recomputed layer asks again in the
    backward sweep; one micro-batch is run backward before the next goes forward.

    Attributes:
        tokens: one key per laid-out token (L), or None while no keyed forward is under way.
    """

    tokens: Tensor | None = None

    @contextmanager
    def narrowed(self, positions: Tensor) -> Iterator[None]:
        """Let the keys be those of the tokens at `positions`: what the head sees."""
        whole = self.tokens
        if whole is not None:
            self.tokens = whole[positions]
        try:
            yield
        finally:
            self.tokens = whole


def token_keys(seed: int, step: int, prefixes: Tensor) -> Tensor:
    """Return one key per token.

    Args:
        seed: of the run.
        step: optimizer step, from 0.
        prefixes: a hash of all token ids up to each token (any shape).

    Returns:
        64-bit keys (flattened).
    """
    run = _mix(torch.tensor([seed], dtype=torch.long) * _GOLDEN + step)
    return _mix(prefixes.flatten() + run.to(prefixes.device))


class KeyedDropout(nn.Module):
    """Dropout of a LoRA layer's input, by key.

    Args:
        probability: of dropping a number; taken in steps of 1 / 65,536.
        layer: number of the layer among the adapted ones.
        keys: shared by all layers of a model.
    """

    def __init__(self, probability: float, *, layer: int, keys: DropoutKeys) -> None:
        super().__init__()
        self.p = probability  # PEFT reads it by this name
        self.layer = layer
        self.keys = keys
        self._offset = _wrapped((layer + 1) * _FIRST)

    def forward(self, inputs: Tensor) -> Tensor:
        """Drop and scale while training; return `inputs` as they are otherwise.

        Args:
            inputs: (..., D), with one row per keyed token.

        Raises:
            ModelError: the rows are not the tokens that have keys.
        """
        keep = self.keep(inputs)
        if keep is None:
            return inputs
        # The scale in place: what is kept for the backward sweep is the mask, one byte a number.
        kept = torch.where(keep.view(inputs.shape), inputs, torch.zeros((), dtype=inputs.dtype, device=inputs.device))
        return kept.mul_(1.0 / (1.0 - self.p))

    def keep(self, inputs: Tensor) -> Tensor | None:
        """Return which numbers of `inputs` are kept (rows, D), or None where nothing is dropped.

        Args:
            inputs: (..., D), with one row per keyed token.

        Raises:
            ModelError: the rows are not the tokens that have keys.
        """
        if not self.training or self.p == 0.0:
            return None
        tokens = self.keys.tokens
        rows = inputs.numel() // inputs.shape[-1]
        if tokens is None or len(tokens) != rows:
            raise ModelError(
                f"a layer with LoRA dropout sees {rows} tokens, {0 if tokens is None else len(tokens)} are laid out",
                where=f"adapted layer {self.layer}",
                fix="set lora.dropout: 0, or leave this layer out of lora.target_modules",
            )
        return self._keep(tokens, inputs.shape[-1])

    def _keep(self, tokens: Tensor, width: int) -> Tensor:
        columns = torch.arange((width + _LANES - 1) // _LANES, device=tokens.device) * _GOLDEN
        drawn = _mix(_mix(tokens + self._offset)[:, None] + columns[None, :])
        lanes = drawn.view(torch.int16)[:, :width]
        return lanes >= round(self.p * _LANE_VALUES) - _LANE_VALUES // 2

    def extra_repr(self) -> str:
        """Return what a printed model says of the layer."""
        return f"p={self.p}, layer={self.layer}"


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift right without the sign: torch has no unsigned shift."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(value: int) -> int:
    """Return `value` as a signed 64-bit number."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
