"""Kernels: each computes softmax over what a token may see, by the definition."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loralab.data.example import TokenizedExample
from loralab.layout.tree import PackedRow, Tree, build_leaves, find_roots, lay_out
from loralab.models.attention_kernels import KERNELS, AttentionInputs
from loralab.models.visibility import TreeRoot, Visibility
from unit.layout.examples import EXAMPLES, example, trees

WINDOW = 3
CPU = torch.device("cpu")


def visible(row: PackedRow, *, window: int | None) -> Tensor:
    index, depth = torch.arange(len(row)), torch.from_numpy(row.depth)
    seen = (index <= index[:, None]) & (index[:, None] < torch.from_numpy(row.subtree_end))
    return seen if window is None else seen & (depth[:, None] - depth < window)


def inputs(length: int, *, grouped: bool, cap: float | None, sinks: bool, scaling: float | None) -> AttentionInputs:
    draw = torch.Generator().manual_seed(length)
    heads = 2 if grouped else 4

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * 2

    query, key, value = random(1, 4, length, 8), random(1, heads, length, 8), random(1, heads, length, 6)
    return AttentionInputs(query, key, value, scaling, 0.0, cap, random(4) if sinks else None)


def by_definition(given: AttentionInputs, seen: Tensor) -> Tensor:
    repeats = given.query.shape[1] // given.key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (given.key, given.value))
    scores = torch.einsum("bhqe,bhke->bhqk", given.query, key)
    scores = scores * (given.scaling if given.scaling is not None else 8**-0.5)
    if given.softcap is not None:
        scores = given.softcap * (scores / given.softcap).tanh()
    weights = scores.exp() * seen
    total = weights.sum(dim=-1, keepdim=True)
    if given.sinks is not None:
        total = total + given.sinks.exp()[None, :, None, None]
    return (weights / total) @ value


def attend(kernel: str, row: PackedRow, given: AttentionInputs, *, window: int | None) -> Tensor:
    seen = visible(row, window=window)

    def allowed(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen[query, key]

    def plain(root: TreeRoot) -> bool:
        return not root.branching and (window is None or root.end - root.start <= window)

    entry = KERNELS[kernel]
    out: Tensor = entry.attend(given, entry.build_mask(Visibility(find_roots(row), allowed, plain, CPU, torch.float32)))
    return out


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("kernel", ["per_tree", "products", "dense"])
@given(data=st.data(), examples=EXAMPLES)
def test_kernel_is_softmax_over_what_is_seen(
    kernel: str, window: int | None, data: st.DataObject, examples: list[TokenizedExample]
) -> None:
    row = lay_out(data.draw(trees(examples)))
    given = inputs(
        len(row),
        grouped=data.draw(st.booleans()),
        cap=data.draw(st.sampled_from([None, 2.0])),
        sinks=data.draw(st.booleans()),
        scaling=data.draw(st.sampled_from([None, 0.5])),
    )
    expected = by_definition(given, visible(row, window=window))
    torch.testing.assert_close(attend(kernel, row, given, window=window), expected, rtol=1e-4, atol=1e-5)


def row_of(*lengths: int) -> PackedRow:
    """Return a row of chains."""
    leaves = build_leaves([example(([9] * length, [1])) for length in lengths])
    return lay_out([Tree([leaf], [0]) for leaf in leaves])


@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("lengths", [(5,), (5, 5, 5), (5, 4, 5)], ids=str)
def test_chains_are_causal(lengths: tuple[int, ...], grouped: bool, scaling: float | None) -> None:
    """Chains of equal length go through one product together."""
    row = row_of(*lengths)
    given = inputs(len(row), grouped=grouped, cap=None, sinks=False, scaling=scaling)
    expected = by_definition(given, visible(row, window=None))
    for kernel in ("per_tree", "products", "dense"):
        torch.testing.assert_close(attend(kernel, row, given, window=None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_blocks_are_softmax_over_what_is_seen(kernel: str, window: int | None, cap: float | None) -> None:
    """FlexAttention, and variable lengths where something branches, forward only: a CPU has no more."""
    leaves = build_leaves([example(([1, 2, 3, 4, tail], [5, 6])) for tail in (7, 8)] + [example(([9] * 7, [1]))])
    row = lay_out([Tree(leaves[:2], [0, 4]), Tree(leaves[2:], [0])])
    given = inputs(len(row), grouped=True, cap=cap, sinks=False, scaling=None)
    given.value = torch.cat([given.value, given.value[..., :2]], dim=-1)  # E = F there
    with torch.no_grad():
        found = attend(kernel, row, given, window=window)
    torch.testing.assert_close(found, by_definition(given, visible(row, window=window)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "changed", "match"),
    [
        ("flex", {"dropout": 0.1}, "FlexAttention computes neither"),
        ("flex", {"sinks": torch.zeros(4)}, "FlexAttention computes neither"),
        ("varlen", {"dropout": 0.1}, "computes no soft cap, sinks or dropout"),
        ("varlen", {"softcap": 2.0}, "computes no soft cap, sinks or dropout"),
        ("varlen", {"sinks": torch.zeros(4)}, "computes no soft cap, sinks or dropout"),
    ],
)
def test_what_a_kernel_does_not_compute_is_refused(kernel: str, changed: dict[str, Any], match: str) -> None:
    row = row_of(4, 4)
    given = inputs(len(row), grouped=False, cap=None, sinks=False, scaling=None)
    for name, value in changed.items():
        setattr(given, name, value)
    with pytest.raises(NotImplementedError, match=match):
        attend(kernel, row, given, window=None)


@pytest.mark.parametrize("capped", [False, True], ids=["product", "by hand"])
def test_attention_dropout_drops_weights(capped: bool) -> None:
    torch.manual_seed(0)
    row = row_of(40, 30)
    given = inputs(len(row), grouped=False, cap=50.0 if capped else None, sinks=False, scaling=None)
    expected = by_definition(given, visible(row, window=None))
    given.dropout = 0.5
    outs = torch.stack([attend("per_tree", row, given, window=None) for _ in range(2000)])
    assert not torch.equal(outs[0], outs[1])
    error = (outs.mean(dim=0) - expected).abs().mean() / expected.abs().mean()
    assert float(error) < 0.1  # in the mean nothing changes
