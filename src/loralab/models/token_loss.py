"""From hidden states at supervised positions to token losses, without all logits at once.

Owns the chunks and the gradient. With a frozen head, the gradient of the hidden states is formed
while the loss is computed, so that no logit outlives its chunk; with a trained head each chunk is
recomputed in the backward sweep.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Logits of a chunk, in elements: 32 MiB in float32 whatever the vocabulary.
CHUNK_ELEMENTS = 1 << 23
# So many times more on CUDA: a chunk reads the whole head twice, which a small one does not pay for.
_CUDA_FACTOR = 8

# From hidden states (n, D) and the slice of the supervised positions that they are, to logits (n, V).
Head = Callable[[Tensor, slice], Tensor]


class TokenLosses(NamedTuple):
    """What a forward with labels returns.

    Attributes:
        losses: negative log-likelihood of each label in nats, float32 (N).
        entropies: entropy of each predicted distribution in nats, float32 (N), or None.
        correct: whether the most likely token is the label, bool (N), or None.
        predicted: the most likely token, id (N), or None.
    """

    losses: Tensor
    entropies: Tensor | None = None
    correct: Tensor | None = None
    predicted: Tensor | None = None


def chunk_elements(device_type: str) -> int:
    """Return the logits of a chunk, in elements."""
    return CHUNK_ELEMENTS * (_CUDA_FACTOR if device_type == "cuda" else 1)


def token_losses(
    head: Head, hidden: Tensor, labels: Tensor, *, vocabulary: int, trained_head: bool, device_type: str | None = None
) -> TokenLosses:
    """Return the loss of every label, with gradients to `hidden` and to a trained head.

    Args:
        head: from hidden states to logits, whatever the model does behind its head included.
        hidden: hidden states at the supervised positions (N, D).
        labels: token ids to predict (N).
        vocabulary: V, which decides on the size of a chunk.
        trained_head: whether `head` has weights that are trained.
        device_type: kind of device whose chunks are taken; None takes that of `labels`.
    """
    chunks = _chunks(labels, vocabulary, device_type)
    if not torch.is_grad_enabled():
        return TokenLosses(torch.cat([_loss(head, hidden, labels, chunk) for chunk in chunks]))
    if trained_head:
        parts = [checkpoint(_loss, head, hidden, labels, chunk, use_reentrant=False) for chunk in chunks]
        return TokenLosses(torch.cat(parts))
    losses: Tensor = _FrozenHeadLoss.apply(head, hidden, labels, chunks)
    return TokenLosses(losses)


def token_statistics(
    head: Head, hidden: Tensor, labels: Tensor, *, vocabulary: int, device_type: str | None = None
) -> TokenLosses:
    """Return loss, entropy, correctness and the most likely token of every label; no gradients.

    Args:
        head: from hidden states to logits.
        hidden: hidden states at the supervised positions (N, D).
        labels: token ids to predict (N).
        vocabulary: V.
        device_type: as in `token_losses`.
    """
    chunks = _chunks(labels, vocabulary, device_type)
    parts = [logit_statistics(head(hidden[chunk], chunk), labels[chunk]) for chunk in chunks]
    columns = zip(*((part.losses, part.entropies, part.correct, part.predicted) for part in parts), strict=True)
    return TokenLosses(*(torch.cat(column) for column in columns))


def logit_statistics(logits: Tensor, labels: Tensor) -> TokenLosses:
    """Return loss, entropy, correctness and the most likely token of every label.

    Numbers whatever the logits are, as long as one of a row is finite or positive infinity: a label that
    cannot be (its logit is minus infinity) costs the largest float32, so that differences stay numbers.

    Args:
        logits: of any floating type (N, V).
        labels: token ids (N).
    """
    log_probabilities = safe_log_softmax(logits)
    losses = functional.nll_loss(log_probabilities, labels, reduction="none")
    # p log p is 0 where p is: the product of a probability of 0 and the lowest float32 is 0, never nan.
    entropies = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    predicted = logits.argmax(dim=-1)  # not of the log-probabilities, where rounding makes ties
    return TokenLosses(losses, entropies, predicted == labels, predicted)


def safe_log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities in float32, finite for every logit that is a number or infinite.

    A head in half precision overflows to infinity, of which a softmax is nan; such a logit counts as
    the largest of its type.

    Args:
        logits: of any floating type (..., V).
    """
    bounded = logits.clamp(max=torch.finfo(logits.dtype).max).float()
    return bounded.log_softmax(dim=-1).clamp_(min=torch.finfo(torch.float32).min)


def _chunks(labels: Tensor, vocabulary: int, device_type: str | None) -> list[slice]:
    count, elements = len(labels), chunk_elements(device_type or labels.device.type)
    rows = max(1, elements // vocabulary)
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _loss(head: Head, hidden: Tensor, labels: Tensor, chunk: slice) -> Tensor:
    return functional.cross_entropy(head(hidden[chunk], chunk).float(), labels[chunk], reduction="none")


class _FrozenHeadLoss(torch.autograd.Function):
    """Token losses whose gradient is ready when the forward ends.

    Losses are per token, so the gradient of any weighted sum of them is the stored one, row by
    row, times the weight.
    """

    @staticmethod
    def forward(ctx: Any, head: Head, hidden: Tensor, labels: Tensor, chunks: list[slice]) -> Tensor:
        losses, gradient = [], torch.empty_like(hidden)
        for chunk in chunks:
            with torch.enable_grad():
                states = hidden[chunk].detach().requires_grad_()
                loss = functional.cross_entropy(head(states, chunk).float(), labels[chunk], reduction="none")
                (gradient[chunk],) = torch.autograd.grad(loss.sum(), states)
            losses.append(loss.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * outputs[0][:, None]).to(gradient.dtype), None, None
