"""How a row's layout reaches the layers: inside the attention mask, and only there."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from loralab.layout.tree import Root
from loralab.models.attention import (
    TREE_ATTENTION,
    TreeLayout,
    TreeMask,
    UnsupportedAttention,
    carry_layout,
    use_attention,
)
from loralab.models.attention_kernels import PerTree
from support.families import build_family

# A prefix of two tokens with branches of two and one; a lone root of two.
DEPTH = torch.tensor([0, 1, 2, 3, 2, 0, 1])
SUBTREE_END = torch.tensor([5, 5, 4, 4, 5, 7, 7])
ROOTS = (Root(0, 5, branching=True), Root(5, 7, branching=False))
PARENTS = [None, 0, 1, 2, 1, None, 5]


def layout(kernel: str = "per_tree") -> TreeLayout:
    return TreeLayout(DEPTH, SUBTREE_END, ROOTS, kernel)


def build_mask(mask: Tensor | None, function: Any = causal_mask_function, **options: Any) -> TreeMask:
    made: TreeMask = AttentionMaskInterface()[TREE_ATTENTION](
        1, 7, 7, attention_mask=mask, mask_function=function, dtype=torch.float32, **options
    )
    return made


def masks(made: TreeMask) -> list[Any]:
    mask = made.on(torch.device("cpu"))
    assert isinstance(mask, PerTree)
    return [each if each is None else (each == 0).int().tolist() for each in mask.masks]


def ancestry() -> list[list[int]]:
    seen = torch.zeros(7, 7, dtype=torch.int)
    for token in range(7):
        above: int | None = token
        while above is not None:
            seen[token, above] = 1
            above = PARENTS[above]
    return seen.tolist()


def test_name_is_none_that_transformers_looks_into() -> None:
    assert "sdpa" not in TREE_ATTENTION
    assert "flex_attention" not in TREE_ATTENTION
    assert TREE_ATTENTION in AttentionInterface()
    assert TREE_ATTENTION in AttentionMaskInterface()


def test_mask_is_two_dimensional_and_all_ones() -> None:
    mask = carry_layout(layout())
    assert mask.shape == (1, 7)
    assert bool(mask.all())


@pytest.mark.parametrize(
    "moved",
    [
        lambda mask: mask.to(torch.long),
        lambda mask: mask.to("cpu", dtype=torch.float32),
        lambda mask: mask.view(1, 7),
        lambda mask: mask[:, :],
        lambda mask: mask.contiguous().clone(),
        lambda mask: mask.to(dtype=torch.bool).detach(),
    ],
)
def test_moved_or_cast_mask_still_carries_the_layout(moved: Any) -> None:
    carried = layout()
    assert build_mask(moved(carry_layout(carried))).layout is carried


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(lambda _mask: None, id="none"),
        pytest.param(lambda _mask: torch.ones(1, 7), id="another"),
        pytest.param(lambda mask: mask[:, :5], id="cut"),
        pytest.param(lambda mask: mask[None], id="more dimensions"),
        pytest.param(lambda mask: 1 - mask.int()[0], id="fewer dimensions"),
    ],
)
def test_mask_that_the_model_made_is_refused(changed: Any) -> None:
    with pytest.raises(UnsupportedAttention, match="changed the attention mask"):
        build_mask(changed(carry_layout(layout())))


def test_layers_see_ancestors_and_chains_need_no_mask() -> None:
    made = build_mask(carry_layout(layout()))
    assert made.ndim == 4
    whole = ancestry()
    assert masks(made) == [[row[:5] for row in whole[:5]], None]
    assert masks(build_mask(carry_layout(layout("dense")))) == [whole]


def test_window_is_counted_in_depths() -> None:
    def window(b: Any, h: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < 2)

    tree, chain = masks(build_mask(carry_layout(layout()), window, local_size=2))
    assert tree == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
    assert chain is None  # not longer than the window
    _, chain = masks(build_mask(carry_layout(layout()), window, local_size=1))
    assert chain == [[1, 0], [1, 1]]


def test_unknown_mask_function_is_asked_even_for_chains() -> None:
    def nothing_but_itself(b: Any, h: Any, query: Tensor, key: Tensor) -> Tensor:
        return query == key

    assert masks(build_mask(carry_layout(layout()), nothing_but_itself))[1] == [[1, 0], [0, 1]]


def attend(mask: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 7, 4) for _ in range(3))
    function: Any = AttentionInterface()[TREE_ATTENTION]
    out, weights = function(nn.Identity(), query, key, value, mask, **options)
    assert weights is None
    assert out.shape == (1, 7, 2, 4)
    return out  # type: ignore[no-any-return]


def test_each_layer_is_counted() -> None:
    made = build_mask(carry_layout(layout()))
    attend(made)
    attend(made, scaling=0.5, sliding_window=3, is_causal=True, position_ids=DEPTH[None], use_cache=False)
    assert made.layout.calls == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "is_causal=False"),
        ({"new": 1, "another": "x"}, "another, new"),
    ],
)
def test_argument_that_is_not_honoured_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedAttention, match=named):
        attend(build_mask(carry_layout(layout())), **options)


@pytest.mark.parametrize("options", [{"position_bias": None}, {"output_attentions": False}])
def test_argument_that_says_nothing_is_passed_over(options: dict[str, Any]) -> None:
    attend(build_mask(carry_layout(layout())), **options)


def test_mask_of_another_kind_is_refused() -> None:
    with pytest.raises(UnsupportedAttention, match="a mask of its own"):
        attend(torch.ones(1, 1, 7, 7, dtype=torch.bool))


def test_attention_is_set_once_and_back() -> None:
    model = build_family("llama", vocabulary=64)
    before = str(model.config._attn_implementation)
    ids = torch.arange(7)[None]
    expected = model(input_ids=ids).logits
    use_attention(model, TREE_ATTENTION)
    assert model.config._attn_implementation == TREE_ATTENTION
    use_attention(model, before)
    assert torch.equal(model(input_ids=ids).logits, expected)
