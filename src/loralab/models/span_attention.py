"""Attention over a row of token trees as plain matrix products, for half precision on a CPU.

Owns the blocks of queries that a row is cut into, each with just the keys that it may see, and one autograd
function over all of them. PyTorch's own attention on a CPU multiplies tiles of 32 by 64 numbers, thousands of calls
a layer, and in half precision its backward sweep converts every tile; here each block is a few products that fill
the machine's matrix units. Scores and their softmax are float32, as there.
"""

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.models.visibility import TreeRoot, TreeSegment, Visibility

# Rows of a product, about: fewer do not fill the matrix units, more see less of what a block may skip. Where a tree
# branches there is more to skip: each branch sees its own ancestors alone.
_ROWS, _TREE_ROWS = 256, 128
# Most keys of a query, on average over a tree, whose weights are kept for the backward sweep; of longer trees they are
# computed again, since they would outweigh all else that a layer keeps of a token.
_KEPT = 512
# Scores that are computed at once: 8 MiB in float32, which a processor's cache holds.
_SCORES = 1 << 21
# The switch of `_exact_product` is one for the whole process.
_SWITCHED = threading.Lock()


@dataclass(frozen=True, slots=True)
class Block:
    """Queries that are scored at once.

    Attributes:
        rows: the queries.
        keys: what they may see: a range of the row, or indices into it (K).
        mask: added to the scores of the last keys (n, K or fewer).
        keep: whether the weights are kept for the backward sweep.
        alone: whether it is its tree's only block.
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
    for start, stop in _even(root.start, root.end, _ROWS):
        yield start, stop, [(root.start, stop)]


def _cut_tree(segments: Sequence[TreeSegment]) -> Iterator[Cut]:
    """Yield blocks of a tree: neighbouring short segments together, long ones in pieces."""
    group: list[TreeSegment] = []
    for segment in segments:
        if group and segment.end - group[0].start > _TREE_ROWS:
            yield from _cut_group(group)
            group = []
        group.append(segment)
    yield from _cut_group(group)


def _cut_group(group: Sequence[TreeSegment]) -> Iterator[Cut]:
    first, last = group[0], group[-1]
    above = set(itertools.chain.from_iterable(segment.above for segment in group))
    for start, stop in _even(first.start, last.end, _ROWS):  # more than one of a long segment alone
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
        ctx.drawing = torch.get_rng_state() if dropout > 0.0 else None
        every_key, every_value = (_per_query_head(shared, heads) for shared in (key, value))
        columns = _columns(every_key, blocks)
        for part in _parts(blocks, heads):
            weights = part.weights(query, every_key, columns, scale)
            if part.block.keep:
                kept.append(weights)
            if dropout > 0.0:
                weights = _dropped(weights, _drawn(weights, dropout), dropout)
            out[part.block.rows, part.heads] = (weights @ part.seen(every_value)).transpose(0, 1)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.scale, ctx.dropout = blocks, scale, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.random.fork_rng(devices=[], enabled=ctx.drawing is not None):
            if ctx.drawing is not None:
                torch.set_rng_state(ctx.drawing)  # the weights are dropped again, in the same order
            return _BlockAttention._pull(ctx, gradients[0])

    @staticmethod
    def _pull(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, shared_key, shared_value, *kept = ctx.saved_tensors
        key, value = (_per_query_head(shared, len(query)) for shared in (shared_key, shared_value))
        above = gradient.transpose(0, 1)  # (H, L, F)
        # Several blocks or heads add to the same keys: in float32, so that their number rounds nothing away.
        alone = all(block.alone for block in ctx.blocks) and len(query) == len(shared_key)
        summed = key.dtype if alone else torch.float32
        of_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        of_key, of_value = (torch.zeros(t.shape, dtype=summed, device=t.device) for t in (key, value))
        left = iter(kept)
        columns = None if all(block.keep for block in ctx.blocks) else _columns(key, ctx.blocks)
        for part in _parts(ctx.blocks, len(query)):
            weights = next(left) if part.block.keep else part.weights(query, key, columns, ctx.scale)
            pulled = part.asking(above)  # (h, n, F)
            of_weights, used = pulled @ part.seen(value).transpose(1, 2), weights
            if ctx.dropout > 0.0:
                drawn = _drawn(weights, ctx.dropout)
                of_weights, used = (_dropped(each, drawn, ctx.dropout) for each in (of_weights, weights))
            part.add(of_value, used.transpose(1, 2) @ pulled)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            of_query[part.heads, part.block.rows] = of_scores @ part.seen(key)
            part.add(of_key, of_scores.transpose(1, 2) @ part.asking(query))
        of_key, of_value = (_per_key_head(found, len(shared_key)).to(key.dtype) for found in (of_key, of_value))
        return of_query, of_key, of_value, None, None, None


def _columns(key: Tensor, blocks: Sequence[Block]) -> Tensor | None:
    """Return keys in float32 as columns (H, E, L), which the blocks of a longer chain have in common; else None."""
    if all(block.alone or isinstance(block.keys, Tensor) for block in blocks):
        return None
    return key.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _per_query_head(shared: Tensor, heads: int) -> Tensor:
    """Return of keys or values (G, L, E) a copy for each query head (H, L, E).

    Products of a few key heads with many rows each would take up to three times as long.
    """
    return shared if len(shared) == heads else shared.repeat_interleave(heads // len(shared), dim=0)


def _per_key_head(found: Tensor, groups: int) -> Tensor:
    """Return the sums over the query heads of each key head (G, L, E)."""
    return found if len(found) == groups else found.unflatten(0, (groups, -1)).sum(dim=1)


@dataclass(frozen=True, slots=True)
class _Part:
    """The heads of a block that are computed at once."""

    block: Block
    heads: slice

    def asking(self, each: Tensor) -> Tensor:
        """Return of (H, L, E) the block's queries (h, n, E)."""
        return each[self.heads, self.block.rows]

    def seen(self, each: Tensor) -> Tensor:
        """Return of (H, L, E) what the block may see (h, K, E)."""
        return each[self.heads, self.block.keys]

    def add(self, total: Tensor, found: Tensor) -> None:
        """Add to (H, L, E) what was found for the keys of the block (h, K, E)."""
        if isinstance(self.block.keys, slice):
            total[self.heads, self.block.keys] += found
        else:
            total[self.heads].index_add_(1, self.block.keys, found.to(total.dtype))

    def weights(self, query: Tensor, key: Tensor, columns: Tensor | None, scale: float) -> Tensor:
        """Return what each query takes of each key, in the inputs' type (h, n, K).

        Args:
            query: queries (H, L, E).
            key: keys (H, L, E).
            columns: the same keys in float32 (H, E, L), or None.
            scale: factor of the scores.
        """
        keys = self.block.keys
        if columns is None or isinstance(keys, Tensor):
            seen = self.seen(key).transpose(1, 2).float()
        else:
            seen = columns[self.heads, :, keys]
        scores = _exact_product(self.asking(query).float(), seen, query.dtype).mul_(scale)
        scores[:, :, -self.block.mask.shape[1] :] += self.block.mask
        return scores.softmax(dim=-1).to(query.dtype)


def _parts(blocks: Sequence[Block], heads: int) -> Iterator[_Part]:
    for block in blocks:
        keys = len(block.keys) if isinstance(block.keys, Tensor) else block.keys.stop - block.keys.start
        scores = (block.rows.stop - block.rows.start) * keys
        # Equal parts: one small one left over would take as long as a large one.
        parts = -(-heads // max(1, _SCORES // scores))
        for part in range(parts):
            yield _Part(block, slice(part * heads // parts, (part + 1) * heads // parts))


def _exact_product(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a product of float32 tensors whose numbers are of type `dtype`, not rounded.

    A product of two bfloat16 tensors comes out in bfloat16. As float32 tensors their product is not rounded, and
    a processor that multiplies bfloat16 may do so again: nothing is lost, since each factor is one.
    """
    if dtype != torch.bfloat16:
        return first @ second
    matmul = cast(Any, torch.backends.mkldnn).matmul  # not in the stubs
    with _SWITCHED:
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            return first @ second
        finally:
            matmul.fp32_precision = before


def _drawn(weights: Tensor, probability: float) -> Tensor:
    return torch.rand(weights.shape, device=weights.device) >= probability


def _dropped(weights: Tensor, kept: Tensor, probability: float) -> Tensor:
    return (weights * kept).mul_(1.0 / (1.0 - probability))
