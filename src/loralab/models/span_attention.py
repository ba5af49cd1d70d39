"""Attention over a row of spans as plain matrix products, for half precision on a CPU.

Owns one autograd function over all spans of a row. PyTorch's own attention on a CPU multiplies tiles of 32 by
64 numbers, thousands of calls a layer, and in half precision its backward sweep converts every tile; here each
span is a few products that fill the machine's matrix units. Scores and their softmax are float32, as there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Queries that are scored at once, about: more would hold larger squares, and see less of what a causal span skips.
_BLOCK = 256
# Longest span whose weights are kept for the backward sweep; of longer ones they are computed again, since they
# would outweigh all else that a layer keeps of a token.
_KEPT = 512

Spans = Sequence[tuple[int, int]]


def attend_spans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    spans: Spans,
    masks: Sequence[Tensor | None],
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(scale q k^T + mask) v inside each span, in which a token sees none behind it.

    Args:
        query: queries (H, L, E).
        key: keys (G, L, E), with G dividing H.
        value: values (G, L, F).
        spans: start and end of each; together they cover the row.
        masks: additive (T, T) of each span, -inf above the diagonal; None for a causal chain.
        scale: factor of the scores.
        dropout: probability of dropping a weight, by torch's generator.

    Returns:
        Outputs (L, H, F), contiguous.
    """
    out: Tensor = _SpanAttention.apply(query, key, value, spans, masks, scale, dropout)
    return out


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries `rows` of one span, the keys `seen` that they may see, and their mask (n, keys), None for a chain."""

    rows: slice
    seen: slice
    mask: Tensor | None
    alone: bool  # the only block of its span
    keep: bool  # whether its weights are kept for the backward sweep


class _SpanAttention(torch.autograd.Function):
    """softmax(scale q k^T + mask) v per span."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: Spans,
        masks: Sequence[Tensor | None],
        scale: float,
        dropout: float,
    ) -> Tensor:
        heads, length, _ = query.shape
        out = query.new_empty(length, heads, value.shape[-1])
        kept: list[Tensor] = []
        for block in _blocks(spans, masks):
            weights = _weights(query, key, block, scale)
            if block.keep:
                kept.append(weights)
            if dropout > 0.0:
                kept.append(torch.rand(weights.shape, device=weights.device) >= dropout)
                weights = _dropped(weights, kept[-1], dropout)
            mixed = weights @ value[:, block.seen]  # (G, H / G x n, F)
            out[block.rows] = mixed.view(heads, -1, mixed.shape[-1]).transpose(0, 1)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.spans, ctx.masks, ctx.scale, ctx.dropout = spans, masks, scale, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        groups, scale = len(key), ctx.scale
        above = gradients[0].transpose(0, 1)  # (H, L, F)
        blocks = list(_blocks(ctx.spans, ctx.masks))
        # Several blocks of a span add to the same keys: in float32, so that their number rounds nothing away.
        summed = key.dtype if all(block.alone for block in blocks) else torch.float32
        of_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        of_key, of_value = (torch.zeros(t.shape, dtype=summed, device=t.device) for t in (key, value))
        left = iter(kept)
        for block in blocks:
            weights = next(left) if block.keep else _weights(query, key, block, scale)
            pulled = _grouped(above[:, block.rows], groups)  # (G, H / G x n, F)
            of_weights, used = pulled @ value[:, block.seen].transpose(1, 2), weights
            if ctx.dropout > 0.0:
                drawn = next(left)
                of_weights, used = (_dropped(each, drawn, ctx.dropout) for each in (of_weights, weights))
            of_value[:, block.seen] += used.transpose(1, 2) @ pulled
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(scale)
            of_query[:, block.rows] = (of_scores @ key[:, block.seen]).view(len(query), -1, query.shape[-1])
            of_key[:, block.seen] += of_scores.transpose(1, 2) @ _grouped(query[:, block.rows], groups)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None, None


def _blocks(spans: Spans, masks: Sequence[Tensor | None]) -> Iterator[_Block]:
    for (first, end), mask in zip(spans, masks, strict=True):
        count = max(1, round((end - first) / _BLOCK))
        size = -(-(end - first) // count)
        for start in range(first, end, size):
            stop = min(start + size, end)
            own = None if mask is None else mask[start - first : stop - first, : stop - first]
            yield _Block(slice(start, stop), slice(first, stop), own, size >= end - first, end - first <= _KEPT)


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """Return the rows of all heads that share a key head, one below the other: (H, n, E) as (G, H / G x n, E)."""
    return heads.reshape(groups, -1, heads.shape[-1])


def _dropped(weights: Tensor, kept: Tensor, probability: float) -> Tensor:
    return (weights * kept).mul_(1.0 / (1.0 - probability))


def _weights(query: Tensor, key: Tensor, block: _Block, scale: float) -> Tensor:
    """Return what each query of a block takes of each key, in the inputs' type (G, H / G x n, keys)."""
    scaled = _grouped(query[:, block.rows].float() * scale, len(key))
    scores = scaled @ key[:, block.seen].float().transpose(1, 2)
    rows = block.rows.stop - block.rows.start
    each = scores.view(len(query), rows, -1)
    if block.mask is None:
        each[:, :, -rows:] += torch.full((rows, rows), float("-inf"), device=scores.device).triu_(1)
    else:
        each += block.mask
    return scores.softmax(dim=-1).to(query.dtype)
