"""Attention over token trees, through transformers' public attention interfaces.

Owns the name under which a model calls it, and the mask: what a layer may see is the library's
own mask function (causal, sliding, chunked) evaluated at depths, intersected with ancestry. So a
window is right inside a tree without being known here. How the products are computed is
`attention_kernels.py`.

The tree travels as a forward argument, inside the 2-D attention mask; nothing is kept in module
globals, so recomputed layers see what they saw before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from loralab.models.attention_kernels import KERNELS, AttentionInputs, KernelMask
from loralab.models.visibility import TreeRoot, Visibility

# transformers looks for "sdpa" and "flex_attention" inside names: this one must contain neither.
TREE_ATTENTION = "loralab_trees"

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_CAUSAL: Any = causal_mask_function
# What layers pass besides the mask and may be passed over: the mask object already knows it.
_KNOWN = frozenset(
    {"sliding_window", "is_causal", "position_ids", "use_cache", "output_router_logits", "cache_position"}
)


class UnsupportedAttention(Exception):
    """A layer asks for something that tree attention does not compute."""


@dataclass(slots=True)
class TreeLayout:
    """What a row of token trees looks like.

    Attributes:
        depth: tokens from the root (L).
        subtree_end: index just past the last token below each token's segment (L).
        roots: the trees, in order; together they cover the row.
        kernel: name in `KERNELS` of what computes the products.
        calls: number of attention layers that were computed with this layout.
    """

    depth: Tensor
    subtree_end: Tensor
    roots: Sequence[TreeRoot]
    kernel: str
    calls: int = field(default=0)
    _places: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return `depth` and `subtree_end` on a device; copied once for all its layers."""
        if device == self.depth.device:
            return self.depth, self.subtree_end
        if device not in self._places:
            self._places[device] = self.depth.to(device), self.subtree_end.to(device)
        return self._places[device]


class _CarriesLayout(torch.Tensor):
    """A 2-D mask of ones that carries the row's layout to the mask function.

    transformers moves and casts the mask of a forward, some models view it, and then it reaches
    the registered mask function.
    """

    trees: TreeLayout

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        source = next((a for a in args if isinstance(a, _CarriesLayout) and hasattr(a, "trees")), None)
        if not isinstance(result, _CarriesLayout):
            return result
        if source is None or result.shape != source.shape:
            return result.as_subclass(torch.Tensor)  # a part of it, or something counted on it
        result.trees = source.trees  # moved, cast or viewed: still the row's mask
        return result


def carry_layout(layout: TreeLayout) -> Tensor:
    """Return the attention mask (1, L) for a forward over `layout`."""
    ones = torch.ones((1, len(layout.depth)), dtype=torch.bool, device=layout.depth.device)
    mask = ones.as_subclass(_CarriesLayout)
    mask.trees = layout
    return mask


@dataclass(slots=True)
class TreeMask:
    """What arrives at a layer as its attention mask.

    Attributes:
        layout: of the row.
        build: makes what the layer's kind allows on a device, in the kernel's own form.
    """

    layout: TreeLayout
    build: Callable[[torch.device], KernelMask]
    _made: dict[torch.device, KernelMask] = field(default_factory=dict)

    def on(self, device: torch.device) -> KernelMask:
        """Return the mask on a device, made once for all layers of the kind that are there.

        A base that is spread has layers on several, and what carries tensors between them knows nothing of this.
        """
        if device not in self._made:
            self._made[device] = self.build(device)
        return self._made[device]

    @property
    def ndim(self) -> int:
        """Number of dimensions of the mask that this stands for; some models ask."""
        return 4


def _build_mask(*_: Any, attention_mask: Tensor | None, mask_function: MaskFunction, **kwargs: Any) -> TreeMask:
    if not isinstance(attention_mask, _CarriesLayout):
        raise UnsupportedAttention("the model changed the attention mask before its layers' masks were made")
    layout, local_size = attention_mask.trees, kwargs.get("local_size")

    def plain(root: TreeRoot) -> bool:
        """Return whether the layer sees all that a causal chain of this length sees."""
        if root.branching or kwargs.get("use_vmap"):
            return False
        return mask_function is _CAUSAL or (local_size is not None and root.end - root.start <= local_size)

    def build(device: torch.device) -> KernelMask:
        depth, subtree_end = layout.on(device)

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (key <= query) & (query < subtree_end[key])
            return seen & mask_function(batch, head, depth[query], depth[key])

        seen = Visibility(layout.roots, allowed, plain, device, kwargs["dtype"])
        mask: KernelMask = KERNELS[layout.kernel].build_mask(seen)
        return mask

    made = TreeMask(layout, build)
    made.on(layout.depth.device)  # now, where a mask that cannot be built is the mask's fault, not a layer's
    return made


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TreeMask,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute one layer's attention over a row of trees.

    Args:
        module: the attention layer.
        query: queries (1, H, L, E).
        key: keys (1, G, L, E), with G dividing H.
        value: values (1, G, L, F).
        attention_mask: made by `_build_mask`.
        scaling: factor of the scores; None takes E ** -0.5.
        dropout: probability of dropping a weight.
        softcap: cap of the scores by tanh.
        s_aux: a score per head that takes part in the softmax and is dropped (H).
        **kwargs: what else the layer passes.

    Returns:
        Outputs (1, L, H, F), and no weights.

    Raises:
        UnsupportedAttention: an argument that is not honoured here.
    """
    unknown = sorted(name for name, v in kwargs.items() if name not in _KNOWN and v is not None and v is not False)
    if unknown or kwargs.get("is_causal") is False:
        raise UnsupportedAttention(f"the layer passes {', '.join(unknown) or 'is_causal=False'}")
    if not isinstance(attention_mask, TreeMask):
        raise UnsupportedAttention(f"the layer passes a mask of its own ({type(attention_mask).__name__})")
    layout = attention_mask.layout
    layout.calls += 1
    inputs = AttentionInputs(query, key, value, scaling, dropout, softcap, s_aux)
    out = KERNELS[layout.kernel].attend(inputs, attention_mask.on(query.device))
    return out.transpose(1, 2).contiguous(), None  # as the library's own: some layers view it


def attention_in_use(model: PreTrainedModel) -> str:
    """Return the name of the attention that a model's decoder layers call."""
    return str(model.config.get_text_config()._attn_implementation)


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Let a model's decoder layers call the attention registered as `name`, if they do not already.

    A vision tower keeps its own: its masks are of another kind.
    """
    if attention_in_use(model) == name:
        return
    inner = [key for key in model.config.sub_configs if getattr(model.config, key) is model.config.get_text_config()]
    model.set_attn_implementation({inner[0]: name} if inner else name)


AttentionInterface.register(TREE_ATTENTION, _attend)
AttentionMaskInterface.register(TREE_ATTENTION, _build_mask)
