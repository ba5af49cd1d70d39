"""Attention over a row of token trees as plain matrix products, for half precision on a CPU.

Owns the blocks of queries that a row is cut into, each with just the keys that it may see, and one autograd
function over all of them. PyTorch's own attention on a CPU multiplies tiles of 32 by 64 numbers, thousands of calls
a layer, and in half precision its backward sweep converts every tile; here each block is a few products that fill
the machine's matrix units. Scores and their softmax are float32, as there.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.models.visibility import TreeRoot, TreeSegment, Visibility

# Queries that are scored at once, about: more would hold larger squares, and see less of what a block may skip.
# Where a tree branches there is more to skip: each branch sees its own ancestors alone.
_CHAIN_BLOCK, _TREE_BLOCK = 256, 128
# Most keys of a query, on average over a tree, whose weights are kept for the backward sweep; of longer trees they are
# computed again, since they would outweigh all else that a layer keeps of a token.
_KEPT = 512


@dataclass(frozen=True, slots=True)
class Block:
    """Queries that are scored at once.

    Attributes:
        rows: the queries.
        keys: what they may see: a range of the row, or indices into it (K).
        mask: added to the scores of the last keys (n, K or fewer).
        keep: whether the weights are kept for the backward sweep.
        alone: whether no other block sees these keys.
    """

    rows: slice
    keys: slice | Tensor
    mask: Tensor
    keep: bool
    alone: bool


def build_blocks(seen: Visibility) -> list[Block]:
    """Cut a row into blocks.

    Args:
        seen: what the tokens of the row may see in layers of one kind.
    """
    triangles: dict[int, Tensor] = {}

    def triangle(rows: int) -> Tensor:
        if rows not in triangles:
            above = torch.full((rows, rows), float("-inf"), dtype=seen.dtype, device=seen.device)
            triangles[rows] = above.triu_(1)
        return triangles[rows]

    blocks: list[Block] = []
    for root in seen.roots:
        plain = seen.plain(root)
        cuts = list(_cut_tree(root.segments) if root.branching and root.segments else _cut_chain(root))
        pairs = sum((stop - start) * sum(end - first for first, end in ranges) for start, stop, ranges in cuts)
        keep = pairs <= _KEPT * (root.end - root.start)
        for start, stop, ranges in cuts:
            keys = _joined(ranges, seen.device)
            mask = triangle(stop - start) if plain else _mask(seen, start, stop, keys)
            blocks.append(Block(slice(start, stop), keys, mask, keep, len(cuts) == 1))
    return blocks


Cut = tuple[int, int, list[tuple[int, int]]]  # start and end of the queries, ranges of what they may see


def _cut_chain(root: TreeRoot) -> Iterator[Cut]:
    """Yield blocks of a tree in which each token sees those before it, or of which nothing else is known."""
    for start, stop in _even(root.start, root.end, _CHAIN_BLOCK):
        yield start, stop, [(root.start, stop)]


def _cut_tree(segments: Sequence[TreeSegment]) -> Iterator[Cut]:
    """Yield blocks of a tree: neighbouring short segments together, long ones in pieces."""
    group: list[TreeSegment] = []
    for segment in segments:
        if group and segment.end - group[0].start > _TREE_BLOCK:
            yield from _cut_group(group)
            group = []
        group.append(segment)
    yield from _cut_group(group)


def _cut_group(group: Sequence[TreeSegment]) -> Iterator[Cut]:
    first, last = group[0], group[-1]
    above = set(itertools.chain.from_iterable(segment.above for segment in group))
    for start, stop in _even(first.start, last.end, _CHAIN_BLOCK):  # more than one of a long segment alone
        yield start, stop, _united([*above, (first.start, stop)])


def _united(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges that neither touch nor overlap, and cover the same indices."""
    united: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(united[-1][1], end))
        else:
            united.append((start, end))
    return united


def _even(start: int, end: int, about: int) -> Iterator[tuple[int, int]]:
    count = max(1, round((end - start) / about))
    size = -(-(end - start) // count)
    return ((first, min(first + size, end)) for first in range(start, end, size))


def _joined(ranges: Sequence[tuple[int, int]], device: torch.device) -> slice | Tensor:
    if len(ranges) == 1:
        return slice(*ranges[0])
    return torch.cat([torch.arange(start, end, device=device) for start, end in ranges])


def _mask(seen: Visibility, start: int, stop: int, keys: slice | Tensor) -> Tensor:
    indices = torch.arange(keys.start, keys.stop, device=seen.device) if isinstance(keys, slice) else keys
    return seen.additive_between(torch.arange(start, stop, device=seen.device), indices)


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, *, blocks: Sequence[Block], scale: float, dropout: float = 0.0
) -> Tensor:
    """Return softmax(scale q k^T + mask) v of each block.

    Args:
        query: queries (H, L, E).
        key: keys (G, L, E), with G dividing H.
        value: values (G, L, F).
        blocks: of the row; together they cover it.
        scale: factor of the scores.
        dropout: probability of dropping a weight, by torch's generator.

    Returns:
        Outputs (L, H, F), contiguous.
    """
    out: Tensor = _BlockAttention.apply(query, key, value, blocks, scale, dropout)
    return out


class _BlockAttention(torch.autograd.Function):
    """softmax(scale q k^T + mask) v per block."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float, dropout: float
    ) -> Tensor:
        heads, length, _ = query.shape
        out = query.new_empty(length, heads, value.shape[-1])
        kept: list[Tensor] = []
        for block in blocks:
            weights = _weights(query, key, block, scale)
            if block.keep:
                kept.append(weights)
            if dropout > 0.0:
                kept.append(torch.rand(weights.shape, device=weights.device) >= dropout)
                weights = _dropped(weights, kept[-1], dropout)
            mixed = weights @ value[:, block.keys]  # (G, H / G x n, F)
            out[block.rows] = mixed.view(heads, -1, mixed.shape[-1]).transpose(0, 1)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.scale, ctx.dropout = blocks, scale, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        groups, scale = len(key), ctx.scale
        above = gradients[0].transpose(0, 1)  # (H, L, F)
        # Several blocks add to the same keys: in float32, so that their number rounds nothing away.
        summed = key.dtype if all(block.alone for block in ctx.blocks) else torch.float32
        of_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        of_key, of_value = (torch.zeros(t.shape, dtype=summed, device=t.device) for t in (key, value))
        left = iter(kept)
        for block in ctx.blocks:
            weights = next(left) if block.keep else _weights(query, key, block, scale)
            pulled = _grouped(above[:, block.rows], groups)  # (G, H / G x n, F)
            of_weights, used = pulled @ value[:, block.keys].transpose(1, 2), weights
            if ctx.dropout > 0.0:
                drawn = next(left)
                of_weights, used = (_dropped(each, drawn, ctx.dropout) for each in (of_weights, weights))
            _add(of_value, block, used.transpose(1, 2) @ pulled)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(scale)
            of_query[:, block.rows] = (of_scores @ key[:, block.keys]).view(len(query), -1, query.shape[-1])
            _add(of_key, block, of_scores.transpose(1, 2) @ _grouped(query[:, block.rows], groups))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None


def _add(total: Tensor, block: Block, part: Tensor) -> None:
    if isinstance(block.keys, slice):
        total[:, block.keys] += part
    else:
        total.index_add_(1, block.keys, part.to(total.dtype))


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """Return the rows of all heads that share a key head, one below the other: (H, n, E) as (G, H / G x n, E)."""
    return heads.reshape(groups, -1, heads.shape[-1])


def _dropped(weights: Tensor, kept: Tensor, probability: float) -> Tensor:
    return (weights * kept).mul_(1.0 / (1.0 - probability))


def _weights(query: Tensor, key: Tensor, block: Block, scale: float) -> Tensor:
    """Return what each query of a block takes of each key, in the inputs' type (G, H / G x n, K)."""
    scaled = _grouped(query[:, block.rows].float() * scale, len(key))
    scores = scaled @ key[:, block.keys].float().transpose(1, 2)
    each = scores.view(len(query), -1, scores.shape[-1])
    each[:, :, -block.mask.shape[1] :] += block.mask
    return scores.softmax(dim=-1).to(query.dtype)
