"""What checks of one layer against another share: fixed inputs, and how far two answers are apart."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def fixed_numbers(shape: Any, device: torch.device) -> Tensor:
    """Return numbers in float32 without a pattern that a product could average away; no generator is asked."""
    count = int(torch.Size(shape).numel())
    return torch.sin(torch.arange(count, device=device, dtype=torch.float32) ** 1.5 % 1000.0).view(*shape)


def pull_back(out: Tensor, wanted: Iterable[Tensor]) -> list[Tensor]:
    """Return gradients of `wanted` for a fixed gradient of `out`.

    The first operation of the sweep is no matrix product: torch warns of one on a GPU if its own thread has run
    nothing there before.
    """
    above = fixed_numbers(out.shape, out.device).to(out.dtype)
    return list(torch.autograd.grad((out * above).sum(), list(wanted)))


def largest_difference(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """Return the largest difference of tensors, one by one, as a share of the spread of `theirs`."""
    pairs = [(x.detach().float(), y.detach().float()) for x, y in zip(ours, theirs, strict=True)]
    return max(float((x - y).abs().max() / y.std().clamp_min(1e-12)) for x, y in pairs)
