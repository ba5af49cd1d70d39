"""Groups: rows that share a long beginning, each row in exactly one group."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.data.example import TokenizedExample
from loralab.layout.grouping import MIN_SHARED_TOKENS, find_prefix_groups, groups_per_step
from unit.layout.examples import EXAMPLES, example


def rows(*prompts: Sequence[int]) -> list[TokenizedExample]:
    return [example((prompt, [1, 2])) for prompt in prompts]


def as_sets(groups: Sequence[Sequence[int]]) -> set[frozenset[int]]:
    return {frozenset(group) for group in groups}


@given(examples=EXAMPLES)
def test_every_row_is_in_one_group(examples: list[TokenizedExample]) -> None:
    groups = find_prefix_groups(examples, largest=2)
    assert sorted(index for group in groups for index in group) == list(range(len(examples)))
    assert groups == find_prefix_groups(examples, largest=2)


@pytest.mark.parametrize("preamble", [0, 50])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_about_one_document_are_found(seed: int, preamble: int) -> None:
    """Wherever they stand, and although all rows begin with the same template."""
    draw = np.random.default_rng(seed)
    start = draw.integers(0, 99, preamble).tolist()
    documents = [draw.integers(0, 99, 256).tolist() for _ in range(12)]
    owners = draw.permutation(np.repeat(np.arange(12), 9)).tolist()
    prompts = [[*start, *documents[owner], *draw.integers(0, 99, draw.integers(3, 30)).tolist()] for owner in owners]
    groups = find_prefix_groups(rows(*prompts), largest=9)
    assert as_sets(groups) == {frozenset(i for i, o in enumerate(owners) if o == owner) for owner in range(12)}


def test_group_larger_than_a_step_is_cut_where_it_shares_least() -> None:
    """The template of all rows makes one group of few rows; of many, the documents behind it do."""
    start = list(range(60))
    prompts = [[*start, *[100 + place // 3] * 40, place] for place in range(12)]
    assert as_sets(find_prefix_groups(rows(*prompts), largest=12)) == {frozenset(range(12))}
    documents = {frozenset(range(place, place + 3)) for place in range(0, 12, 3)}
    assert as_sets(find_prefix_groups(rows(*prompts), largest=11)) == documents
    assert as_sets(find_prefix_groups(rows(*prompts), largest=2)) == documents  # rows of one document share alike


@pytest.mark.parametrize(("shared", "grouped"), [(32, True), (31, False), (200, True)])
def test_what_is_shared_must_be_long(shared: int, grouped: bool) -> None:
    assert MIN_SHARED_TOKENS == 32
    start = list(range(100, 100 + shared))
    groups = find_prefix_groups(rows([*start, 1], [*start, 2], [7, 8]), largest=2)
    assert (len(groups) == 2) is grouped


def test_identical_rows_are_a_group_among_others() -> None:
    groups = find_prefix_groups(rows([5] * 40, [6] * 40, [5] * 40), largest=2)
    assert as_sets(groups) == {frozenset({0, 2}), frozenset({1})}


def test_order_does_not_depend_on_the_size_of_ids() -> None:
    """Ids beyond a byte sort by value, so that rows of a group are neighbours."""
    starts = [[300 + place] * 40 for place in range(3)]
    prompts = [[*start, tail] for tail in (1, 70_000, 256) for start in starts]
    groups = find_prefix_groups(rows(*prompts), largest=4)
    assert as_sets(groups) == {frozenset(range(place, 9, 3)) for place in range(3)}


def test_groups_per_step_by_hand() -> None:
    groups = [[0, 1, 2], [3, 4], [5]]
    assert groups_per_step(groups, [[0, 1], [2, 3, 5], [4]]) == pytest.approx((1 + 3 + 1) / 3)
    assert groups_per_step(groups, []) == 0.0


@given(size=st.integers(1, 6))
def test_groups_per_step_is_one_where_steps_are_groups(size: int) -> None:
    groups = [list(range(start, start + size)) for start in range(0, 5 * size, size)]
    assert groups_per_step(groups, groups) == 1.0
