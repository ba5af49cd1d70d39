"""Loss sums: every forward that has a loss runs here.

Owns `LossSum` and the loop over micro-batches. Losses are sums with counts; division happens
where a mean is reported, once.
"""

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loralab.layout.collate import MicroBatch

Backward = Callable[[Tensor], None]
Observe = Callable[[MicroBatch, Tensor], None]
Context = Callable[[bool], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class LossSum:
    """Negative log-likelihood over supervised tokens.

    Attributes:
        total: sum in nats, float32, on the model's device (scalar).
        count: number of supervised tokens.
    """

    total: Tensor
    count: int


def run_micro_batches(
    model: nn.Module,
    batches: Iterable[MicroBatch],
    *,
    device: torch.device,
    backward: Backward | None = None,
    observe: Observe | None = None,
    context: Context | None = None,
) -> LossSum:
    """Run the model over micro-batches and sum their losses.

    Args:
        model: a `SupervisedPeftModel`, or a wrapper of one.
        batches: micro-batches, in order.
        device: where the model is.
        backward: called with each micro-batch's loss sum (scalar, with graph), or None.
        observe: called with each micro-batch and its token losses (N, without graph), or None.
        context: given whether a micro-batch is the last, returns what forward and backward run
            in (gradient synchronisation), or None.
    """
    pending = list(batches)
    total = torch.zeros((), dtype=torch.float32, device=device)
    count = 0
    for index, batch in enumerate(pending):
        moved = batch.to(device)
        with contextlib.nullcontext() if context is None else context(index == len(pending) - 1):
            losses = model(
                input_ids=moved.input_ids,
                attention_mask=moved.attention_mask,
                position_ids=moved.position_ids[0],
                label_positions=moved.label_positions,
                labels=moved.labels,
            )
            loss = losses.sum()
            if backward is not None:
                backward(loss)
        total += loss.detach()
        count += len(batch.labels)
        if observe is not None:
            observe(batch, losses.detach())
    return LossSum(total, count)
