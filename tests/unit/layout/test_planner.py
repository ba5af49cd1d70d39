"""The planner: however a step is cut, its micro-batches are the step, and no larger than the budget."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loralab.data.example import TokenizedExample
from loralab.layout.collate import MicroBatch, StepBatch
from loralab.layout.planner import Layout, Planner, SharingCost, ShrinkingPlanner
from loralab.layout.tree import Tree, build_leaves
from support.layouts import ALWAYS_SHARE, sharing_rows
from unit.layout.examples import EXAMPLES, example, pairs_of, planners, predictions

Asked = tuple[int, tuple[int, ...], int]
LAYOUTS: list[Layout] = ["shared", "packed", "padded"]


def seen(batch: MicroBatch, row: int, column: int) -> tuple[int, ...]:
    """Return the tokens that a position sees, by the definition of a tree."""
    ends = batch.subtree_end[row]
    return tuple(int(batch.input_ids[row, k]) for k in range(column + 1) if column < int(ends[k]))


def asked(batch: MicroBatch) -> list[Asked]:
    """Return (example, tokens seen from the position, label) of every label."""
    width = batch.input_ids.shape[1]
    found = []
    triples = zip(batch.label_positions.tolist(), batch.labels.tolist(), batch.label_examples.tolist(), strict=True)
    for position, label, owner in triples:
        row, column = divmod(position, width)
        assert batch.attention_mask[row, column] == 1
        found.append((owner, seen(batch, row, column), label))
    return found


def asked_of_step(step: StepBatch) -> list[Asked]:
    return sorted(each for batch in step.micro_batches for each in asked(batch))


def asked_of_examples(examples: Sequence[TokenizedExample]) -> list[Asked]:
    return sorted((i, *prediction) for i, each in enumerate(examples) for prediction in predictions(pairs_of(each)))


@given(examples=EXAMPLES, planner=planners())
def test_a_step_asks_what_its_examples_ask(examples: list[TokenizedExample], planner: Planner) -> None:
    step = planner(examples)
    assert asked_of_step(step) == asked_of_examples(examples)
    assert step.supervised_tokens == sum(len(batch.labels) for batch in step.micro_batches)
    assert step.tokens == sum(int(batch.attention_mask.sum()) for batch in step.micro_batches)
    assert step.examples == tuple(examples)
    for batch in step.micro_batches:
        assert (batch.roots is None) is (planner.layout == "padded")
        assert torch.equal(batch.position_ids[0], batch.depth)


def check_budget(planner: Planner, examples: Sequence[TokenizedExample]) -> None:
    longest = max(len(leaf) for leaf in build_leaves(examples))
    for batch in planner(examples).micro_batches:
        rows, length = batch.input_ids.shape
        if rows * length > planner.token_budget:  # one path that is longer than the budget, and nothing beside it
            assert rows == 1
            assert length <= longest
            assert batch.depth[0].tolist() == list(range(length))


@given(examples=EXAMPLES, planner=planners())
def test_no_micro_batch_exceeds_the_budget(examples: list[TokenizedExample], planner: Planner) -> None:
    check_budget(planner, examples)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_micro_batch_exceeds_any_budget(layout: Layout) -> None:
    """A tree that is one token too large shows under one budget only."""
    examples = sharing_rows(0, vocabulary=97)
    for budget in range(1, Planner(10_000, layout=layout)(examples).tokens + 2):
        check_budget(Planner(budget, layout=layout, cost=ALWAYS_SHARE), examples)


@given(examples=EXAMPLES, planner=planners())
def test_planning_is_deterministic(examples: list[TokenizedExample], planner: Planner) -> None:
    first, second = planner(examples), planner(examples)
    assert len(first.micro_batches) == len(second.micro_batches)
    for one, other in zip(first.micro_batches, second.micro_batches, strict=True):
        assert one.roots == other.roots
        for name in type(one).__slots__:
            value = getattr(one, name)
            assert not isinstance(value, torch.Tensor) or torch.equal(value, getattr(other, name)), name


@given(examples=EXAMPLES, planner=planners(layouts=["packed", "padded"]))
def test_only_the_shared_layout_joins_examples(examples: list[TokenizedExample], planner: Planner) -> None:
    alone = sum(batch.tokens for each in examples for batch in planner([each]).micro_batches)
    assert planner(examples).tokens == alone


@given(examples=EXAMPLES)
def test_sharing_lays_out_each_prefix_once(examples: list[TokenizedExample]) -> None:
    """With no budget and no cost, what is laid out is the number of distinct prefixes."""
    shared = Planner(10_000, cost=ALWAYS_SHARE)(examples)
    paths = [tuple(leaf.ids.tolist()) for leaf in build_leaves(examples)]
    assert shared.tokens == len({path[: end + 1] for path in paths for end in range(len(path))})
    assert len(shared.micro_batches) == 1


@given(examples=EXAMPLES, budget=st.integers(1, 60))
def test_sharing_never_lays_out_more_than_packing(examples: list[TokenizedExample], budget: int) -> None:
    shared, packed, padded = (Planner(budget, layout=layout, cost=ALWAYS_SHARE)(examples).tokens for layout in LAYOUTS)
    assert shared <= packed <= padded


@given(examples=EXAMPLES, threshold=st.integers(1, 10), planner=planners())
def test_paths_on_both_sides_of_a_threshold_never_meet(
    examples: list[TokenizedExample], threshold: int, planner: Planner
) -> None:
    planner = Planner(planner.token_budget, layout=planner.layout, cost=planner.cost, position_threshold=threshold)
    found = [0, 0]
    for batch in planner(examples).micro_batches:
        found[int(batch.depth.max()) + 1 > threshold] += len(batch.labels)
    leaves = build_leaves(examples)
    long = sum(len(leaf.labels) for leaf in leaves if len(leaf) > threshold)
    assert found == [sum(len(leaf.labels) for leaf in leaves) - long, long]


@pytest.mark.parametrize(("budget", "shapes"), [(1, [1, 1, 1, 1]), (2, [2, 2]), (3, [3, 1]), (4, [4])])
def test_padded_rows_by_hand(budget: int, shapes: list[int]) -> None:
    examples = [example(([1], [2])), example(([1], [2]), ([3], [4])), example(([5], [6]))]
    step = Planner(budget, layout="padded")(examples)
    assert [batch.input_ids.shape[0] for batch in step.micro_batches] == shapes


def test_padded_rows_of_alike_lengths_lie_together() -> None:
    examples = [example(([1] * length, [2])) for length in (3, 9, 4, 8)]
    shapes = [tuple(batch.input_ids.shape) for batch in Planner(18, layout="padded")(examples).micro_batches]
    assert shapes == [(2, 9), (2, 4)]


def test_packing_fills_the_first_row_with_room() -> None:
    examples = [example(([i] * length, [9])) for i, length in enumerate((3, 7, 4, 6))]
    lengths = [batch.input_ids.shape[1] for batch in Planner(10, layout="packed")(examples).micro_batches]
    assert lengths == [10, 10]


@pytest.mark.parametrize("length", [2, 2000])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_turns_that_extend_each_other_are_one_chain_in_every_layout(layout: Layout, length: int) -> None:
    first = [7] * length
    turns = example((first, [1, 2]), ([*first, 1, 2, *first], [5]))
    (batch,) = Planner(10_000, layout=layout)([turns]).micro_batches
    assert batch.input_ids.tolist() == [[*first, 1, 2, *first]]


def test_padding_takes_branches_that_part_as_rows_of_their_own() -> None:
    parting = example(([1, 2], [3]), ([1, 9], [3, 4]))
    (batch,) = Planner(100, layout="padded", cost=ALWAYS_SHARE)([parting]).micro_batches
    assert batch.input_ids.tolist() == [[1, 9, 3], [1, 2, 0]]
    (batch,) = Planner(100, layout="packed", cost=ALWAYS_SHARE)([parting]).micro_batches
    assert batch.input_ids.tolist() == [[1, 2, 9, 3]]


def test_short_prefixes_are_not_shared() -> None:
    def tokens(shared: int) -> int:
        return Planner(100)([example(([*[1] * shared, i], [9])) for i in (5, 6)]).tokens

    assert tokens(15) == 32
    assert tokens(16) == 18


@pytest.mark.parametrize(("shared", "rest", "saves"), [(300, 5, True), (20, 500, False)])
def test_sharing_must_pay_for_the_larger_square(shared: int, rest: int, saves: bool) -> None:
    """A tree of T tokens costs T x T pairs, two chains half of their squares."""
    first, second = build_leaves([example(([1] * shared + [i] * rest, [3])) for i in (5, 6)])
    assert SharingCost(tokens_per_pair=1 / 100).saves(shared, Tree([first], [0]), second) is saves
    assert SharingCost(tokens_per_pair=0.0).saves(shared, Tree([first], [0]), second)


def test_shrinking_halves_the_budget_for_all_steps_that_follow() -> None:
    examples = [example(([i] * 8, [1])) for i in range(4)]
    planner = ShrinkingPlanner(Planner(32, layout="packed", position_threshold=99))
    assert len(planner(examples).micro_batches) == 1
    assert planner.shrink(40) == 16
    assert [batch.tokens for batch in planner(examples).micro_batches] == [16, 16]
    assert planner.planner == Planner(16, layout="packed", position_threshold=99)
    assert planner.shrink(10) == 5


def test_equal_sizes_keep_the_order_of_the_step() -> None:
    examples = [example(([i] * 4, [1])) for i in range(6)]
    step = Planner(8, layout="packed")(examples)
    owners = [np.unique(batch.label_examples).tolist() for batch in step.micro_batches]
    assert owners == [[0, 1], [2, 3], [4, 5]]
