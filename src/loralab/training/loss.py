"""Loss sums: every forward that has a loss runs here.

Owns `LossSum` and the loop over micro-batches. Losses are sums with counts; division happens
where a mean is reported, once.
"""

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loralab.layout.collate import MicroBatch
from loralab.models.token_loss import TokenLosses

Backward = Callable[[Tensor], None]
Observe = Callable[[MicroBatch, TokenLosses], None]
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
    dropout_key: tuple[int, int] | None = None,
) -> LossSum:
    """Run the model over micro-batches and sum their losses.

    Args:
        model: a `SupervisedPeftModel`, or a wrapper of one.
        batches: micro-batches, in order.
        device: where the model is.
        backward: called with each micro-batch's loss sum (scalar, with graph), or None.
        observe: called with each micro-batch and what is known of its labels, entropies and
            correctness included, or None. Only without `backward`.
        context: given whether a micro-batch is the last, returns what forward and backward run
            in (gradient synchronisation), or None.
        dropout_key: seed and step that LoRA dropout is keyed by, or None.
    """
    pending = list(batches)
    total = torch.zeros((), dtype=torch.float32, device=device)
    count = 0
    for index, batch in enumerate(pending):
        inputs = model_inputs(batch.to(device))
        with contextlib.nullcontext() if context is None else context(index == len(pending) - 1):
            result: TokenLosses = model(**inputs, dropout_key=dropout_key, statistics=observe is not None)
            loss = result.losses.sum()
            if backward is not None:
                backward(loss)
        total += loss.detach()
        count += len(batch.labels)
        if observe is not None:
            observe(batch, result)
    return LossSum(total, count)


def model_inputs(batch: MicroBatch) -> dict[str, Any]:
    """Return a micro-batch as the arguments of a `SupervisedPeftModel`'s forward."""
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "depth": batch.depth,
        "subtree_end": batch.subtree_end,
        "roots": batch.roots,
        "token_prefixes": batch.token_prefixes,
        "label_positions": batch.label_positions,
        "labels": batch.labels,
        **({} if batch.pictures is None else {"pictures": batch.pictures}),
    }
