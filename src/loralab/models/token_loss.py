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
# Where the softmax goes block by block, a chunk holds its logits in the compute type alone, and their gradient in
# their place or, where logits must stay, beside them. Fewer rows read the whole head more often: 656 rows of
# Qwen2.5's took 0.65 s at 82 a chunk, 0.56 s at twice as many.
_BLOCKED_FACTORS = {"in place": 3.0, "beside": 1.5}
# Logits of such a block, in elements: 2 MiB in float32, which a core's own cache holds.
_BLOCK_ELEMENTS = 1 << 19

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


def chunk_elements(device_type: str, *, trains: bool = False, spare: bool = False) -> int:
    """Return the logits of a chunk, in elements.

    Args:
        device_type: kind of device.
        trains: whether the gradient of a frozen head's input is formed.
        spare: as in `token_losses`.
    """
    if trains and device_type == "cpu":
        return int(CHUNK_ELEMENTS * _BLOCKED_FACTORS["in place" if spare else "beside"])
    return CHUNK_ELEMENTS * (_CUDA_FACTOR if device_type == "cuda" else 1)


def token_losses(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    *,
    vocabulary: int,
    trained_head: bool,
    spare: bool = False,
    device_type: str | None = None,
) -> TokenLosses:
    """Return the loss of every label, with gradients to `hidden` and to a trained head.

    Args:
        head: from hidden states to logits, whatever the model does behind its head included.
        hidden: hidden states at the supervised positions (N, D).
        labels: token ids to predict (N).
        vocabulary: V, which decides on the size of a chunk.
        trained_head: whether `head` has weights that are trained.
        spare: whether the head's own gradient needs no logits, so that theirs may be written over them.
        device_type: kind of device whose chunks are taken; None takes that of `labels`.
    """
    device = device_type or labels.device.type
    trains = torch.is_grad_enabled() and not trained_head
    chunks = _chunks(labels, vocabulary, chunk_elements(device, trains=trains, spare=spare))
    if trains:
        how = ("in place" if spare else "beside") if device == "cpu" else "whole"
        losses: Tensor = _FrozenHeadLoss.apply(head, hidden, labels, chunks, how)
        return TokenLosses(losses)
    if not torch.is_grad_enabled():
        return TokenLosses(torch.cat([_loss(head, hidden, labels, chunk) for chunk in chunks]))
    parts = [checkpoint(_loss, head, hidden, labels, chunk, use_reentrant=False) for chunk in chunks]
    return TokenLosses(torch.cat(parts))


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
    chunks = _chunks(labels, vocabulary, chunk_elements(device_type or labels.device.type))
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


def _chunks(labels: Tensor, vocabulary: int, elements: int) -> list[slice]:
    count, rows = len(labels), max(1, elements // vocabulary)
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _loss(head: Head, hidden: Tensor, labels: Tensor, chunk: slice) -> Tensor:
    return functional.cross_entropy(head(hidden[chunk], chunk).float(), labels[chunk], reduction="none")


class _FrozenHeadLoss(torch.autograd.Function):
    """Token losses whose gradient is ready when the forward ends.

    Losses are per token, so the gradient of any weighted sum of them is the stored one, row by
    row, times the weight.
    """

    @staticmethod
    def forward(ctx: Any, head: Head, hidden: Tensor, labels: Tensor, chunks: list[slice], how: str) -> Tensor:
        losses, gradient = [], torch.empty_like(hidden)
        for chunk in chunks:
            with torch.enable_grad():
                states = hidden[chunk].detach().requires_grad_()
                logits = head(states, chunk)
                if how == "whole":
                    loss = functional.cross_entropy(logits.float(), labels[chunk], reduction="none")
                    (gradient[chunk],) = torch.autograd.grad(loss.sum(), states)
                else:
                    above = logits.detach() if how == "in place" else torch.empty_like(logits)
                    loss = _loss_by_blocks(logits.detach(), labels[chunk], gradient=above)
                    (gradient[chunk],) = torch.autograd.grad(logits, states, above)
                    del above
            losses.append(loss.detach())
            del logits, loss, states  # before the next chunk's are made
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[None, Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * outputs[0][:, None]).to(gradient.dtype), None, None, None


def _loss_by_blocks(logits: Tensor, labels: Tensor, *, gradient: Tensor) -> Tensor:
    """Return losses (n), float32, and write the gradient of their sum (n, V), which may be where the logits are.

    A few rows at a time: a float32 copy of them, its softmax and the gradient pass through a core's cache,
    where copies of the whole chunk would go through memory four times.
    """
    count, vocabulary = logits.shape
    losses = torch.empty(count, dtype=torch.float32, device=logits.device)
    rows = max(1, _BLOCK_ELEMENTS // vocabulary)
    for start in range(0, count, rows):
        block = slice(start, min(start + rows, count))
        scores, wanted = logits[block].float(), labels[block, None]
        probabilities = scores.softmax(dim=-1)
        # The largest probability is 1 / sum exp(score - top), so no logarithm of a vanishing number is taken.
        behind = scores.amax(dim=-1) - scores.gather(1, wanted)[:, 0]
        losses[block] = behind - probabilities.amax(dim=-1).log()
        gradient[block] = probabilities.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float32))
    return losses
