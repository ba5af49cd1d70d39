"""Attention as plain products: outputs and gradients of the definition, in blocks of any size, kept or recomputed."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from loralab.layout.tree import Root, Segment
from loralab.models import span_attention
from loralab.models.span_attention import Block, attend_blocks, build_blocks
from loralab.models.visibility import Visibility

# Three chains, and three roots of which the last has a prefix, two branches and a branch below the second.
CHAINS = (Root(0, 7, branching=False), Root(7, 8, branching=False), Root(8, 21, branching=False))
TREE = (
    *CHAINS[:2],
    Root(
        8,
        21,
        branching=True,
        segments=(
            Segment(8, 12, ()),
            Segment(12, 15, ((8, 12),)),
            Segment(15, 17, ((8, 12),)),
            Segment(17, 19, ((8, 12), (15, 17))),
            Segment(19, 21, ((8, 12), (15, 17))),
        ),
    ),
)
LENGTH, EACH = 21, 8


def visible(roots: Sequence[Root]) -> Tensor:
    seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for root in roots:
        for segment in root.segments or (Segment(root.start, root.end, ()),):
            for query in range(segment.start, segment.end):
                for start, end in (*segment.above, (segment.start, query + 1)):
                    seen[query, start:end] = True
    return seen


def blocks_of(roots: Sequence[Root], dtype: torch.dtype = torch.float64) -> list[Block]:
    seen = visible(roots)

    def allowed(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen[query, key]

    return build_blocks(Visibility(roots, allowed, lambda root: not root.branching, torch.device("cpu"), dtype))


def tensors(*, groups: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values as views of one tensor, as models pass them, and a gradient of the output."""
    draw = torch.Generator().manual_seed(groups)
    sizes = (4 * EACH, groups * EACH, groups * EACH)
    joined = torch.randn(LENGTH, sum(sizes), generator=draw, dtype=torch.float64).to(dtype)
    parts = joined.split(sizes, dim=1)
    query, key, value = (part.view(LENGTH, -1, EACH).transpose(0, 1).requires_grad_() for part in parts)
    return query, key, value, torch.randn(LENGTH, 4, EACH, generator=draw, dtype=torch.float64).to(dtype)


def by_definition(query: Tensor, key: Tensor, value: Tensor, roots: Sequence[Root]) -> Tensor:
    repeats = len(query) // len(key)
    key, value = (tensor.repeat_interleave(repeats, dim=0) for tensor in (key, value))
    scores = (query @ key.transpose(1, 2) * 0.3).masked_fill(~visible(roots), float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(0, 1)


@pytest.mark.parametrize("kept", [0, 5, 512], ids=lambda kept: f"kept to {kept}")
@pytest.mark.parametrize("block", [2, 5, 256], ids=lambda block: f"blocks of {block}")
@pytest.mark.parametrize("groups", [4, 2, 1], ids=lambda groups: f"{groups} key heads")
@pytest.mark.parametrize("roots", [CHAINS, TREE], ids=["chains", "tree"])
def test_outputs_and_gradients_are_those_of_the_definition(
    roots: Sequence[Root], groups: int, block: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_attention, "_ROWS", block)
    monkeypatch.setattr(span_attention, "_TREE_ROWS", 2)
    monkeypatch.setattr(span_attention, "_SCORES", 4 * block)
    monkeypatch.setattr(span_attention, "_KEPT", kept)
    *inputs, above = tensors(groups=groups)
    expected = by_definition(*inputs, roots)
    found = attend_blocks(*inputs, blocks=blocks_of(roots), scale=0.3)
    assert found.is_contiguous()
    # Scores are float32 whatever the inputs are.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(found, inputs, above), torch.autograd.grad(expected, inputs, above), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 512], ids=lambda kept: f"kept to {kept}")
@pytest.mark.parametrize("rows", [4, 256], ids=lambda rows: f"blocks of {rows}")
@pytest.mark.parametrize("roots", [(Root(0, LENGTH, branching=False),), CHAINS, TREE], ids=["chain", "chains", "tree"])
def test_bfloat16_is_no_further_from_the_truth_than_pytorchs_own(
    roots: Sequence[Root], rows: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_attention, "_ROWS", rows)
    monkeypatch.setattr(span_attention, "_TREE_ROWS", 2)
    monkeypatch.setattr(span_attention, "_KEPT", kept)
    *exact, above = tensors(groups=2)
    *inputs, rounded = tensors(groups=2, dtype=torch.bfloat16)
    truth = by_definition(*exact, roots)
    found = attend_blocks(*inputs, blocks=blocks_of(roots, torch.bfloat16), scale=0.3)
    stock = torch.nn.functional.scaled_dot_product_attention(
        *(tensor[None] for tensor in inputs), attn_mask=visible(roots), scale=0.3, enable_gqa=True
    )[0].transpose(0, 1)
    wanted = [truth, *torch.autograd.grad(truth, exact, above)]
    for ours, theirs, true in zip(
        [found, *torch.autograd.grad(found, inputs, rounded)],
        [stock, *torch.autograd.grad(stock, inputs, rounded)],
        wanted,
        strict=True,
    ):
        assert (ours - true).detach().norm() < 1.5 * (theirs - true).detach().norm()


@pytest.mark.parametrize("kept", [0, 512])
def test_dropped_weights_are_scaled_and_dropped_again_in_the_backward_sweep(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With values of one, what a query gets is the sum of its weights after dropout, and so is the gradient's sum."""
    monkeypatch.setattr(span_attention, "_KEPT", kept)
    query, key, _, _ = tensors(groups=4)
    value = torch.ones(4, LENGTH, EACH, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    blocks = blocks_of(CHAINS)
    outs = [attend_blocks(query, key, value, blocks=blocks, scale=0.3, dropout=0.4) for _ in range(300)]
    torch.testing.assert_close(torch.stack(outs).mean(dim=0), torch.ones(LENGTH, 4, EACH).double(), rtol=0, atol=0.35)
    assert not torch.equal(outs[0], outs[1])
    (of_value,) = torch.autograd.grad(outs[0].sum(), value)
    # out is linear in the values: their gradient, summed over all of them, is the output.
    torch.testing.assert_close(of_value.sum(), outs[0].sum().detach(), rtol=1e-5, atol=0)


def test_gradients_under_dropout_are_those_of_differences() -> None:
    query, key, value, above = tensors(groups=2)

    def total(query: Tensor, key: Tensor) -> Tensor:
        torch.manual_seed(3)
        out = attend_blocks(query, key, value, blocks=blocks_of(TREE), scale=0.3, dropout=0.3)
        return (out * above).sum()

    gradients = torch.autograd.grad(total(query, key), (query, key))
    for index, gradient in enumerate(gradients):
        inputs = [query.detach().clone(), key.detach().clone()]
        direction = torch.randn(inputs[index].shape, generator=torch.Generator().manual_seed(1)).double()
        with torch.no_grad():
            sides = []
            for step in (1e-2, -1e-2):
                moved = list(inputs)
                moved[index] = inputs[index] + step * direction
                sides.append(float(total(*moved)))
        assert (sides[0] - sides[1]) / 2e-2 == pytest.approx(float((gradient * direction).sum()), rel=2e-2)


def test_a_branch_is_multiplied_with_its_own_ancestors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_attention, "_TREE_ROWS", 2)
    monkeypatch.setattr(span_attention, "_ROWS", 4)
    keys = {}
    for block in blocks_of(TREE):
        indices = range(*block.keys.indices(LENGTH)) if isinstance(block.keys, slice) else block.keys.tolist()
        keys[block.rows.start] = list(indices)
    assert keys[12] == [8, 9, 10, 11, 12, 13, 14]
    assert keys[15] == [8, 9, 10, 11, 15, 16]
    assert keys[19] == [8, 9, 10, 11, 15, 16, 19, 20]


def test_weights_of_long_trees_are_not_kept() -> None:
    short, long = Root(0, 600, branching=False), Root(600, 2600, branching=False)
    seen = Visibility((short, long), lambda *_: torch.ones(()), lambda _: True, torch.device("meta"), torch.bfloat16)
    assert {block.rows.start < 600: block.keep for block in build_blocks(seen)} == {True: True, False: False}
