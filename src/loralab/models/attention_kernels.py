"""How attention over a row of trees is computed: one entry of `KERNELS` per way.

Owns the products and the form of the mask that each way wants. What may be seen is decided in
`attention.py` and comes in as `Visibility`.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from loralab.models.span_attention import Block, attend_blocks, build_blocks
from loralab.models.visibility import Visibility

_RECOMPILE_LIMIT = 64
# Below 128 queries FlexAttention would take its decoding kernel, which has no form for lengths that vary
# (torch 2.11 fails while compiling it); training rows are never that short for long.
_FLEX_OPTIONS: FlexKernelOptions = {"FORCE_USE_FLEX_ATTENTION": True}
# Where the keyword is not there yet, fewer key heads than query heads are taken as they come.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@dataclass(slots=True)
class AttentionInputs:
    """What a layer gives.

    Attributes:
        query: (1, H, L, E).
        key: (1, G, L, E).
        value: (1, G, L, F).
        scaling: factor of the scores; None takes E ** -0.5.
        dropout: probability of dropping a weight.
        softcap: cap of the scores by tanh, or None.
        sinks: a score per head that takes part in the softmax and is dropped (H), or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None
    dropout: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return self.scaling if self.scaling is not None else float(self.query.shape[-1] ** -0.5)

    @property
    def plain_scores(self) -> bool:
        """Whether scores are scaled products and nothing else."""
        return self.softcap is None and self.sinks is None

    def slice(self, start: int, end: int) -> "AttentionInputs":
        """Return the tokens from `start` up to `end`."""
        query, key, value = (tensor[:, :, start:end] for tensor in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)


@dataclass(slots=True)
class PerTree:
    """Spans of a row and the mask inside each, None for a causal chain.

    Attributes:
        spans: start and end of each.
        masks: additive (T, T), or None.
    """

    spans: list[tuple[int, int]]
    masks: list[Tensor | None]


@dataclass(slots=True)
class Products:
    """Blocks of queries, and what the way beside it takes where scores are more than products.

    Attributes:
        blocks: cuts the row.
        per_tree: makes the masks of that way.
    """

    blocks: Callable[[], Sequence[Block]]
    per_tree: Callable[[], PerTree]


KernelMask = PerTree | Products | BlockMask | tuple[Tensor, int]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A way to compute attention over a row of trees.

    Attributes:
        build_mask: returns the mask in its own form.
        attend: given inputs and that mask, returns outputs (1, H, L, F).
    """

    build_mask: Callable[[Visibility], Any]
    attend: Callable[[AttentionInputs, Any], Tensor]


def _mask_per_tree(seen: Visibility) -> PerTree:
    spans = [(root.start, root.end) for root in seen.roots]
    masks = [None if seen.plain(root) else seen.additive(root.start, root.end) for root in seen.roots]
    return PerTree(spans, masks)


def _mask_dense(seen: Visibility) -> PerTree:
    length = seen.roots[-1].end
    return PerTree([(0, length)], [seen.additive(0, length)])


def _attend_per_tree(inputs: AttentionInputs, mask: PerTree) -> Tensor:
    lengths = {end - start for start, end in mask.spans}
    if len(mask.spans) > 1 and len(lengths) == 1 and all(m is None for m in mask.masks) and inputs.plain_scores:
        return _attend_equal_chains(inputs, count=len(mask.spans), length=lengths.pop())
    outs = [
        _attend_span(inputs.slice(start, end), own) for (start, end), own in zip(mask.spans, mask.masks, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _attend_equal_chains(inputs: AttentionInputs, *, count: int, length: int) -> Tensor:
    query, key, value = (
        t[0].unflatten(1, (count, length)).transpose(0, 1) for t in (inputs.query, inputs.key, inputs.value)
    )
    out = functional.scaled_dot_product_attention(
        query, key, value, dropout_p=inputs.dropout, is_causal=True, scale=inputs.scaling, enable_gqa=_grouped(inputs)
    )
    return out.transpose(0, 1).flatten(1, 2)[None]


def _attend_span(inputs: AttentionInputs, mask: Tensor | None) -> Tensor:
    if not inputs.plain_scores:
        return _attend_by_hand(inputs, mask)
    return functional.scaled_dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        attn_mask=mask,
        dropout_p=inputs.dropout,
        is_causal=mask is None,
        scale=inputs.scaling,
        enable_gqa=_grouped(inputs),
    )


def _grouped(inputs: AttentionInputs) -> bool:
    return inputs.query.shape[1] != inputs.key.shape[1]


def _attend_by_hand(inputs: AttentionInputs, mask: Tensor | None) -> Tensor:
    """Compute scores that are capped or have sinks; the softmax is float32, as in the models."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if _grouped(inputs):
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    if mask is None:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    else:
        scores = scores + mask
    scores = scores.float()
    if inputs.sinks is not None:
        column = inputs.sinks.float().reshape(1, -1, 1, 1).expand(-1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(query.dtype)
    return functional.dropout(weights, p=inputs.dropout) @ value


def _mask_blocks(seen: Visibility) -> BlockMask:
    length = seen.roots[-1].end
    return create_block_mask(seen.allowed, B=None, H=None, Q_LEN=length, KV_LEN=length, device=seen.device)


@functools.cache
def _flex(device_type: str) -> Callable[..., Tensor]:
    flex: Any = flex_attention
    if device_type != "cuda":
        return cast("Callable[..., Tensor]", flex)
    dynamo: Any = torch._dynamo.config
    # Past the limit of recompilations an error, not the uncompiled form: that materialises all scores.
    compiled: Any = torch.compile(flex, fullgraph=True)

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        # Each kind of layer, length class and gradient mode is a compilation; 8 would not do.
        with dynamo.patch(recompile_limit=_RECOMPILE_LIMIT):
            return cast(Tensor, compiled(*args, **kwargs))

    return attend


def _attend_blocks(inputs: AttentionInputs, mask: BlockMask) -> Tensor:
    if inputs.dropout > 0 or inputs.sinks is not None:
        raise NotImplementedError("FlexAttention computes neither attention dropout nor sinks here")
    cap = inputs.softcap

    def capped(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return score if cap is None else cap * torch.tanh(score / cap)

    return _flex(inputs.query.device.type)(
        inputs.query,
        inputs.key,
        inputs.value,
        score_mod=None if cap is None else capped,
        block_mask=mask,
        scale=inputs.scale,
        enable_gqa=_grouped(inputs),
        kernel_options=_FLEX_OPTIONS,
    )


def _mask_lengths(seen: Visibility) -> tuple[Tensor, int] | BlockMask:
    if not all(seen.plain(root) for root in seen.roots):
        return _mask_blocks(seen)
    borders = torch.tensor([0, *(root.end for root in seen.roots)], dtype=torch.int32)
    # Without waiting: a blocking copy would let the device run dry before every micro-batch.
    return borders.to(seen.device, non_blocking=True), max(root.end - root.start for root in seen.roots)


def _attend_lengths(inputs: AttentionInputs, mask: tuple[Tensor, int] | BlockMask) -> Tensor:
    if isinstance(mask, BlockMask):
        return _attend_blocks(inputs, mask)
    if not inputs.plain_scores or inputs.dropout > 0:
        raise NotImplementedError("variable-length attention computes no soft cap, sinks or dropout")
    borders, longest = mask
    query, key, value = (t[0].transpose(0, 1).contiguous() for t in (inputs.query, inputs.key, inputs.value))
    further: dict[str, Any] = _GROUPED if _grouped(inputs) else {}
    out: Any = varlen_attn(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        scale=inputs.scale,
        window_size=(-1, 0),
        **further,
    )
    attended: Tensor = out.transpose(0, 1)[None]
    return attended


def _mask_products(seen: Visibility) -> Products:
    return Products(
        functools.cache(lambda: build_blocks(seen)),
        functools.cache(lambda: _mask_per_tree(seen)),
    )


def _attend_products(inputs: AttentionInputs, mask: Products) -> Tensor:
    if not inputs.plain_scores:
        return _attend_per_tree(inputs, mask.per_tree())
    query, key, value = inputs.query[0], inputs.key[0], inputs.value[0]
    out = attend_blocks(query, key, value, blocks=mask.blocks(), scale=inputs.scale, dropout=inputs.dropout)
    return out.transpose(0, 1)[None]


KERNELS: dict[str, Kernel] = {
    # one scaled dot product per tree: where kernels are cheap to start (CPU)
    "per_tree": Kernel(_mask_per_tree, _attend_per_tree),
    # a few matrix products per tree: half precision on a CPU
    "products": Kernel(_mask_products, _attend_products),
    # one for the whole row under a dense mask: always right, pays for every pair of the row
    "dense": Kernel(_mask_dense, _attend_per_tree),
    # FlexAttention: skips what no token may see
    "flex": Kernel(_mask_blocks, _attend_blocks),
    # flash attention of variable lengths where nothing branches, FlexAttention where something does
    "varlen": Kernel(_mask_lengths, _attend_lengths),
}
