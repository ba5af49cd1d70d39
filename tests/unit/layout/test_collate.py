"""Padding: right of each row, hidden by position whatever the pad's id."""

import pytest
import torch

from loralab.layout.collate import StepBatch, collate_rows
from loralab.layout.tree import PackedRow, Tree, build_leaves, lay_out
from unit.layout.examples import example


def rows(*pairs: tuple[list[int], list[int]]) -> list[PackedRow]:
    """Return one row per example."""
    examples = [example(pair) for pair in pairs]
    return [lay_out([Tree([leaf], [0])]) for leaf in build_leaves(examples)]


def test_two_rows_by_hand() -> None:
    batch = collate_rows(rows(([5], [6, 7]), ([1, 2, 3], [4, 9])), trees=False)
    assert batch.input_ids.tolist() == [[5, 6, 0, 0], [1, 2, 3, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[[0, 1, 0, 0], [0, 1, 2, 3]]]
    assert batch.depth.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert batch.subtree_end.tolist() == [[2, 2, 0, 0], [4, 4, 4, 4]]
    hashes = batch.token_prefixes.tolist()
    assert hashes[0][2:] == [0, 0]
    assert len({*hashes[0][:2], *hashes[1], 0}) == 7  # one for each path, none for padding
    assert batch.label_positions.tolist() == [0, 1, 6, 7]
    assert batch.labels.tolist() == [6, 7, 4, 9]
    assert batch.label_examples.tolist() == [0, 0, 1, 1]
    assert batch.tokens == 6
    assert batch.roots is None


def test_a_row_of_trees_knows_its_roots() -> None:
    leaves = build_leaves([example(([1, 2], [3, 4])), example(([1, 2], [5, 6])), example(([9], [8]))])
    batch = collate_rows([lay_out([Tree(leaves[:2], [0, 2]), Tree(leaves[2:], [0])])], trees=True)
    assert batch.roots is not None
    assert [(root.start, root.end, root.branching) for root in batch.roots] == [(0, 4, True), (4, 5, False)]


@pytest.mark.parametrize("token", [0, 1, 7])
def test_real_tokens_with_the_id_of_the_padding_stay_visible(token: int) -> None:
    batch = collate_rows(rows(([token, token], [token, token]), ([1] * 4, [2])), trees=False)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [token, token, 2]
    assert batch.tokens == 7


def test_moving_moves_every_tensor_and_changes_none() -> None:
    batch = collate_rows(rows(([5], [6])), trees=True)
    moved, same = batch.to(torch.device("meta")), batch.to(torch.device("cpu"))
    assert (moved.tokens, moved.roots) == (batch.tokens, batch.roots)
    tensors = [name for name in type(batch).__slots__ if isinstance(getattr(batch, name), torch.Tensor)]
    assert len(tensors) == 9
    assert {getattr(moved, name).device.type for name in tensors} == {"meta"}
    assert all(torch.equal(getattr(same, name), getattr(batch, name)) for name in tensors)


def test_step_counts_tokens_and_knows_its_rows() -> None:
    examples = (
        example(([5], [6]), row=3),
        example(([1, 2], [3]), row=9, source=1),
        example(([1] * 5, [2, 3]), ([1] * 5, [4])),
    )
    batches = (
        collate_rows(rows(([5], [6]), ([1, 2], [3])), trees=False),
        collate_rows(rows(([1] * 5, [2, 3])), trees=True),
    )
    step = StepBatch(batches, supervised_tokens=5, examples=examples, token_budget=64)
    assert step.tokens == 1 + 2 + 6
    assert step.example_tokens == 1 + 2 + 6 + 5  # each branch on its own
    assert step.rows == ((0, 3), (1, 9), (0, 1))
