"""Attention as plain products: outputs and gradients of the definition, in blocks of any size, kept or recomputed."""

import pytest
import torch
from torch import Tensor

from loralab.models import span_attention
from loralab.models.span_attention import Spans, attend_spans

SPANS = [(0, 7), (7, 8), (8, 21)]
LENGTH, EACH = 21, 8


def tensors(*, groups: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values as views of one tensor, as models pass them, and a gradient of the output."""
    draw = torch.Generator().manual_seed(groups)
    sizes = (4 * EACH, groups * EACH, groups * EACH)
    joined = torch.randn(LENGTH, sum(sizes), generator=draw, dtype=torch.float64).to(dtype)
    parts = joined.split(sizes, dim=1)
    query, key, value = (part.view(LENGTH, -1, EACH).transpose(0, 1).requires_grad_() for part in parts)
    return query, key, value, torch.randn(LENGTH, 4, EACH, generator=draw, dtype=torch.float64).to(dtype)


def mask_of_a_tree() -> list[Tensor | None]:
    """Return masks in which the last span branches: its tokens from the seventh on do not see the third to sixth."""
    own = torch.full((13, 13), float("-inf"), dtype=torch.float64).triu_(1)
    own[6:, 2:6] = float("-inf")
    return [None, None, own]


def by_definition(query: Tensor, key: Tensor, value: Tensor, spans: Spans, masks: list[Tensor | None]) -> Tensor:
    repeats = len(query) // len(key)
    key, value = (tensor.repeat_interleave(repeats, dim=0) for tensor in (key, value))
    scores = torch.full((len(query), LENGTH, LENGTH), float("-inf"), dtype=query.dtype)
    own = query @ key.transpose(1, 2) * 0.3
    for (start, end), mask in zip(spans, masks, strict=True):
        causal = torch.full((end - start, end - start), float("-inf"), dtype=query.dtype).triu_(1)
        added = own[:, start:end, start:end] + (causal if mask is None else mask)
        scores[:, start:end, start:end] = added
    return (scores.softmax(dim=-1) @ value).transpose(0, 1)


@pytest.mark.parametrize("kept", [0, 10, 512], ids=lambda kept: f"kept to {kept}")
@pytest.mark.parametrize("block", [2, 5, 256], ids=lambda block: f"blocks of {block}")
@pytest.mark.parametrize("groups", [4, 2, 1], ids=lambda groups: f"{groups} key heads")
@pytest.mark.parametrize("tree", [False, True], ids=["chains", "tree"])
def test_outputs_and_gradients_are_those_of_the_definition(
    tree: bool, groups: int, block: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_attention, "_BLOCK", block)
    monkeypatch.setattr(span_attention, "_KEPT", kept)
    *inputs, above = tensors(groups=groups)
    masks: list[Tensor | None] = mask_of_a_tree() if tree else [None] * len(SPANS)
    expected = by_definition(*inputs, SPANS, masks)
    found = attend_spans(*inputs, spans=SPANS, masks=masks, scale=0.3)
    assert found.is_contiguous()
    # Scores are float32 whatever the inputs are.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(found, inputs, above), torch.autograd.grad(expected, inputs, above), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_no_further_from_the_truth_than_pytorchs_own() -> None:
    *exact, above = tensors(groups=2)
    *inputs, rounded = tensors(groups=2, dtype=torch.bfloat16)
    masks: list[Tensor | None] = [None]
    truth = by_definition(*exact, [(0, LENGTH)], masks)
    found = attend_spans(*inputs, spans=[(0, LENGTH)], masks=masks, scale=0.3)
    stock = torch.nn.functional.scaled_dot_product_attention(
        *(tensor[None] for tensor in inputs), is_causal=True, scale=0.3, enable_gqa=True
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
    outs = [attend_spans(query, key, value, spans=SPANS, masks=[None] * 3, scale=0.3, dropout=0.4) for _ in range(300)]
    torch.testing.assert_close(torch.stack(outs).mean(dim=0), torch.ones(LENGTH, 4, EACH).double(), rtol=0, atol=0.35)
    assert not torch.equal(outs[0], outs[1])
    (of_value,) = torch.autograd.grad(outs[0].sum(), value)
    # out is linear in the values: their gradient, summed over all of them, is the output.
    torch.testing.assert_close(of_value.sum(), outs[0].sum().detach(), rtol=1e-5, atol=0)


def test_gradients_under_dropout_are_those_of_differences() -> None:
    query, key, value, above = tensors(groups=2)

    def total(query: Tensor, key: Tensor) -> Tensor:
        torch.manual_seed(3)
        out = attend_spans(query, key, value, spans=SPANS, masks=mask_of_a_tree(), scale=0.3, dropout=0.3)
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
