"""LoRA dropout whose masks are a function of what a token is, not of where it lies.

Owns the counter-based generator. A mask is keyed by (seed, step, layer, all tokens up to this
one): so every layout and cut of a step, and every number of processes, drops the same inputs;
recomputation sees the same mask, and a resume needs nothing replayed. Rows that begin alike take
the same masks there, whether they are computed once or each for itself. Integer arithmetic alone,
so every device agrees.

Source: keys are mixed by SplitMix64's finalizer (Steele, Lea & Flood 2014, Fast splittable
pseudorandom number generators, fig. 13); the number of a token and a column is a product of theirs
(multiplicative hashing: Dietzfelbinger et al. 1997, A reliable randomized algorithm for the closest-pair problem).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loralab.errors import ModelError

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB
# Which masks a key gives; another number whenever they change, so that no run goes on with others.
MASKS = 2
_VALUES = 1 << 32  # of a drawn number
# Numbers drawn at once on a CPU: what a core's own cache holds.
_DRAWN = 1 << 18
# Integers of the size of a floating type, in which a number is kept or cleared bit by bit.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(slots=True)
class DropoutKeys:
    """Keys of the tokens that are going through the model, shared by all its layers.

    Set before each forward and left in place, since a recomputed layer asks again in the
    backward sweep; one micro-batch is run backward before the next goes forward.

    Attributes:
        tokens: one key per laid-out token (L), or None while no keyed forward is under way.
        device_type: of a model without numbers, the kind of device that the run computes on; else None.
    """

    tokens: Tensor | None = None
    device_type: str | None = None

    def of_rows(self, rows: int) -> Tensor | None:
        """Return the keys of a layer's input rows, or None where its rows are not the tokens that have keys."""
        return self.tokens if self.tokens is not None and len(self.tokens) == rows else None

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

    @contextmanager
    def numbered(self, rows: int, device: torch.device) -> Iterator[None]:
        """Let the keys be those of some rows that are no tokens: what a layer is probed with."""
        self.tokens = torch.arange(rows, device=device)
        try:
            yield
        finally:
            self.tokens = None


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


@dataclass(slots=True)
class PictureKeys(DropoutKeys):
    """Keys inside a vision tower, whose layers see patches, then fewer features.

    A picture's rows are keyed by its bytes and their place in it, so a mask does not depend on which pictures
    are encoded together.

    Attributes:
        pictures: one key per picture, or None while no keyed forward is under way.
        counts: features of each picture; a layer's rows are dealt out in proportion.
    """

    pictures: Tensor | None = None
    counts: tuple[int, ...] = ()

    def of_rows(self, rows: int) -> Tensor | None:
        """Return the keys of a layer's input rows, or None where they are not those of the pictures."""
        total = sum(self.counts)
        if self.pictures is None or not total or any(rows * count % total for count in self.counts):
            return None
        each = [rows * count // total for count in self.counts]
        device = self.pictures.device
        places = torch.cat([torch.arange(count, device=device) for count in each])
        whose = self.pictures.repeat_interleave(torch.tensor(each, device=device))
        return _mix(whose + places * _GOLDEN)

    @contextmanager
    def numbered(self, rows: int, device: torch.device) -> Iterator[None]:
        """Let the keys be those of one picture of so many rows."""
        self.pictures, self.counts = torch.zeros(1, dtype=torch.long, device=device), (rows,)
        try:
            yield
        finally:
            self.pictures, self.counts = None, ()


class KeyedDropout(nn.Module):
    """Dropout of a LoRA layer's input, by key.

    Args:
        probability: of dropping a number.
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
        mask = self.draw(inputs)
        if mask is None:
            return inputs
        out: Tensor = _Drop.apply(inputs, mask, 1.0 / (1.0 - self.p))
        return out

    def draw(self, inputs: Tensor) -> "DropMask | None":
        """Return the mask of `inputs`, or None where nothing is dropped.

        Args:
            inputs: (..., D), with one row per keyed token.

        Raises:
            ModelError: the rows are not the tokens that have keys.
        """
        if not self.training or self.p == 0.0:
            return None
        rows = inputs.numel() // inputs.shape[-1]
        tokens = self.keys.of_rows(rows)
        if tokens is None:
            raise ModelError(
                f"a layer with LoRA dropout sees {rows} rows, which are not the tokens that are laid out",
                where=f"adapted layer {self.layer}",
                fix="set lora.dropout: 0, or leave this layer out of lora.target_modules",
            )
        dropped = min(max(round(self.p * _VALUES), 1), _VALUES - 1)
        by_blocks = (self.keys.device_type or tokens.device.type) == "cpu"
        keys = tokens.to(inputs.device)  # of a base that is spread, the layer may be on another one
        return DropMask(_odd(_mix(keys + self._offset)), dropped - _VALUES // 2, by_blocks)

    def extra_repr(self) -> str:
        """Return what a printed model says of the layer."""
        return f"p={self.p}, layer={self.layer}"


@dataclass(frozen=True, slots=True)
class DropMask:
    """Which numbers of a layer's input are dropped; drawn again wherever it is applied, so nothing of it is kept.

    The number of token and column is the product of two odd 32-bit keys, one of each: as the keys are hashes, its
    upper bits are as good as random, and it is dropped where it lies below a threshold.

    Attributes:
        tokens: an odd key per row, 32 bits (n).
        threshold: kept are the numbers from here on.
        by_blocks: whether it is drawn a few rows at a time, which a CPU's cache holds.
    """

    tokens: Tensor
    threshold: int
    by_blocks: bool

    def apply(self, rows: Tensor) -> Tensor:
        """Return a copy of `rows` (n, D) with zeros where a number is dropped."""
        bits = _BITS[rows.element_size()]
        columns = _odd(_mix(torch.arange(rows.shape[-1], device=rows.device) * _GOLDEN))
        if not self.by_blocks:
            return torch.where(self._drawn(columns, slice(None)) >= self.threshold, rows, rows.new_zeros(()))
        out = torch.empty_like(rows)
        at_once = max(1, _DRAWN // rows.shape[-1])
        for start in range(0, len(rows), at_once):
            block = slice(start, start + at_once)
            # All ones where it is kept and zero where not, without a comparison: those are slow on mixed types.
            drawn = self._drawn(columns, block).clamp_(self.threshold - 1, self.threshold)
            kept = torch.rsub(drawn, self.threshold - 1)
            torch.bitwise_and(rows[block].view(bits), kept.to(bits), out=out[block].view(bits))
        return out

    def _drawn(self, columns: Tensor, block: slice) -> Tensor:
        return self.tokens[block, None] * columns


class _Drop(torch.autograd.Function):
    """Inputs where they are kept, scaled; and so their gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: DropMask, scale: float) -> Tensor:
        ctx.mask, ctx.scale = mask, scale
        return mask.apply(inputs.reshape(-1, inputs.shape[-1])).mul_(scale).view(inputs.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (above,) = gradients
        pulled = ctx.mask.apply(above.reshape(-1, above.shape[-1])).mul_(ctx.scale)
        return pulled.view(above.shape), None, None


def _odd(keys: Tensor) -> Tensor:
    """Return the upper halves of 64-bit keys as odd 32-bit ones."""
    return (keys >> 32).to(torch.int32) | 1


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
