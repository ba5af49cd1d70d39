"""Padding: right of each row, hidden by position whatever the pad's id."""

import pytest
import torch

from loralab.layout.collate import StepBatch, collate_rows
from loralab.layout.tree import PackedRow, build_rows
from unit.layout.examples import example


def rows(*examples: tuple[list[int], list[int]]) -> list[PackedRow]:
    return [row for found in build_rows([example(pair) for pair in examples]) for row in found]


def test_two_rows_by_hand() -> None:
    batch = collate_rows(rows(([5], [6, 7]), ([1, 2, 3], [4, 9])))
    assert batch.input_ids.tolist() == [[5, 6, 0, 0], [1, 2, 3, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[[0, 1, 0, 0], [0, 1, 2, 3]]]
    assert batch.depth.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert batch.subtree_end.tolist() == [[2, 2, 0, 0], [4, 4, 4, 4]]
    assert batch.label_positions.tolist() == [0, 1, 6, 7]
    assert batch.labels.tolist() == [6, 7, 4, 9]
    assert batch.label_examples.tolist() == [0, 0, 1, 1]
    assert batch.tokens == 6


@pytest.mark.parametrize("token", [0, 1, 7])
def test_real_tokens_with_the_id_of_the_padding_stay_visible(token: int) -> None:
    batch = collate_rows(rows(([token, token], [token, token]), ([1] * 4, [2])))
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [token, token, 2]
    assert batch.tokens == 7


def test_moving_moves_every_tensor_and_changes_none() -> None:
    batch = collate_rows(rows(([5], [6])))
    moved = batch.to(torch.device("meta"))
    assert {getattr(moved, name).device.type for name in type(batch).__slots__} == {"meta"}
    same = batch.to(torch.device("cpu"))
    assert all(torch.equal(getattr(same, name), getattr(batch, name)) for name in type(batch).__slots__)


def test_step_counts_tokens_of_all_micro_batches() -> None:
    batches = (collate_rows(rows(([5], [6]), ([1, 2], [3]))), collate_rows(rows(([1] * 5, [2, 3]))))
    assert StepBatch(batches, supervised_tokens=4, rows=()).tokens == 1 + 2 + 6
