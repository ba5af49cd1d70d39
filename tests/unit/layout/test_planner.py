"""The planner: however a step is cut, its micro-batches are the step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loralab.data.example import TokenizedExample
from loralab.layout.collate import MicroBatch, StepBatch
from loralab.layout.planner import Planner
from unit.layout.examples import EXAMPLES, example

Asked = tuple[int, tuple[int, ...], int]


def asked(batch: MicroBatch) -> list[Asked]:
    """Return (example, tokens of the row up to the position, label) of every label."""
    width = batch.input_ids.shape[1]
    found = []
    for position, label, owner in zip(
        batch.label_positions.tolist(), batch.labels.tolist(), batch.label_examples.tolist(), strict=True
    ):
        row, column = divmod(position, width)
        assert batch.attention_mask[row, : column + 1].all()
        found.append((owner, tuple(batch.input_ids[row, : column + 1].tolist()), label))
    return found


def asked_of_step(step: StepBatch) -> list[Asked]:
    return [each for batch in step.micro_batches for each in asked(batch)]


@given(examples=EXAMPLES, size=st.integers(1, 9))
def test_union_of_micro_batches_is_the_step(examples: list[TokenizedExample], size: int) -> None:
    whole, cut = Planner(len(examples))(examples), Planner(size)(examples)
    assert len(whole.micro_batches) == 1
    assert asked_of_step(cut) == asked_of_step(whole)
    assert len(cut.micro_batches) == -(-len(examples) // size)
    assert cut.supervised_tokens == sum(len(batch.labels) for batch in cut.micro_batches)
    assert cut.supervised_tokens == sum(each.supervised_tokens for each in examples)
    assert cut.tokens == whole.tokens == sum(int(batch.attention_mask.sum()) for batch in cut.micro_batches)
    assert cut.rows == tuple((each.source, each.row) for each in examples)
    owners = [torch.unique(batch.label_examples).tolist() for batch in cut.micro_batches]
    assert owners == [list(range(len(examples)))[i : i + size] for i in range(0, len(examples), size)]


@pytest.mark.parametrize(("size", "shapes"), [(1, [1, 2, 1]), (2, [3, 1]), (3, [4])])
def test_an_example_stays_in_one_micro_batch_with_all_its_rows(size: int, shapes: list[int]) -> None:
    examples = [example(([1], [2])), example(([1], [2]), ([3], [4])), example(([5], [6]))]
    assert [batch.input_ids.shape[0] for batch in Planner(size)(examples).micro_batches] == shapes
