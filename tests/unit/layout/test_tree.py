"""Token trees: the label shift, what a token sees, and that nothing is lost by laying out."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.data.example import TokenizedExample
from loralab.layout.tree import PackedRow, Tree, build_leaves, find_roots, lay_out, shared_length, take_apart
from unit.layout.examples import EXAMPLES, branch, example, pairs_of, predictions, trees


def chain(*pairs: tuple[list[int], list[int]]) -> PackedRow:
    """Lay out branches of one example as one tree, sharing all that they have in common."""
    leaves = sorted(build_leaves([example(*pairs)]), key=lambda leaf: leaf.sort_key)
    shared = [0, *(shared_length(a, b) for a, b in itertools.pairwise(leaves))]
    return lay_out([Tree(leaves, shared)])


def asked(row: PackedRow) -> list[tuple[int, int, tuple[int, ...], int]]:
    """Return (example, branch, tokens seen from the position, label) of every label, by the definition of a tree."""
    found = []
    owners = zip(row.label_examples.tolist(), row.label_branches.tolist(), strict=True)
    for owner, position, label in zip(owners, row.label_positions.tolist(), row.labels.tolist(), strict=True):
        seen = [int(row.input_ids[k]) for k in range(len(row)) if k <= position < row.subtree_end[k]]
        found.append((*owner, tuple(seen), label))
    return found


def expected(examples: list[TokenizedExample]) -> list[tuple[int, int, tuple[int, ...], int]]:
    return [
        (number, place, *prediction)
        for number, tokenized in enumerate(examples)
        for place, pair in enumerate(pairs_of(tokenized))
        for prediction in predictions([pair])
    ]


def test_one_branch_by_hand() -> None:
    row = chain(([5, 6], [7, 8]))
    assert row.input_ids.tolist() == [5, 6, 7]
    assert row.label_positions.tolist() == [1, 2]
    assert row.labels.tolist() == [7, 8]
    assert row.depth.tolist() == [0, 1, 2]
    assert row.position_ids.tolist() == [[0, 1, 2]]
    assert row.subtree_end.tolist() == [3, 3, 3]
    assert row.label_examples.tolist() == row.label_branches.tolist() == [0, 0]
    assert len(row) == 3


def test_nested_branches_by_hand() -> None:
    row = chain(([1, 2], [3, 4]), ([1, 2, 5], [6, 7]), ([1, 2, 5], [8, 9]), ([1, 2, 5, 8], [9]))
    assert row.input_ids.tolist() == [1, 2, 3, 5, 6, 8]
    assert row.depth.tolist() == [0, 1, 2, 2, 3, 3]
    assert row.subtree_end.tolist() == [6, 6, 3, 6, 5, 6]
    assert row.labels.tolist() == [3, 4, 6, 7, 8, 9, 9]
    assert row.label_positions.tolist() == [1, 2, 3, 4, 3, 5, 5]  # 3 twice: two answers continue one prompt
    assert row.label_branches.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert [(root.start, root.end, root.branching) for root in find_roots(row)] == [(0, 6, True)]


def test_turns_that_extend_each_other_lie_on_one_path() -> None:
    row = chain(([1], [2, 3]), ([1, 2, 3, 4], [5]), ([1, 2, 3, 4, 5, 6], [7]))
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.label_positions.tolist() == [0, 1, 3, 5]
    assert row.labels.tolist() == [2, 3, 5, 7]
    assert not find_roots(row)[0].branching


def test_branch_that_repeats_another_counts_twice() -> None:
    row = chain(([1], [2]), ([1], [2]))
    assert row.input_ids.tolist() == [1]
    assert row.label_positions.tolist() == [0, 0]
    assert row.labels.tolist() == [2, 2]
    assert len(take_apart(row)) == 2


def test_answer_behind_nothing_is_read_from_its_second_token_on() -> None:
    row = chain(([], [4, 5, 6]))
    assert (row.input_ids.tolist(), row.labels.tolist(), row.label_positions.tolist()) == ([4, 5], [5, 6], [0, 1])
    (found,) = take_apart(row).values()
    assert (found.prompt_ids.tolist(), found.answer_ids.tolist()) == ([4], [5, 6])


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1], [2], 0), ([1, 2], [1, 2], 2)],
)
def test_shared_length(first: list[int], second: list[int], length: int) -> None:
    one, other = build_leaves([example((first, [9])), example((second, [9]))])
    assert shared_length(one, other) == shared_length(other, one) == length


@given(data=st.data(), examples=EXAMPLES)
def test_a_row_is_taken_apart_into_exactly_its_branches(data: st.DataObject, examples: list[TokenizedExample]) -> None:
    row = lay_out(data.draw(trees(examples)))
    found = take_apart(row)
    whole = {(number, place): each for number, e in enumerate(examples) for place, each in enumerate(e.branches)}
    assert found.keys() == whole.keys()
    for key, each in whole.items():
        prompt, answer = each.prompt_ids.tolist(), each.answer_ids.tolist()
        meant = branch(prompt, answer) if prompt else branch(answer[:1], answer[1:])
        np.testing.assert_array_equal(found[key].prompt_ids, meant.prompt_ids, strict=True)
        np.testing.assert_array_equal(found[key].answer_ids, meant.answer_ids, strict=True)


@given(data=st.data(), examples=EXAMPLES)
def test_labels_are_what_a_naive_loop_predicts(data: st.DataObject, examples: list[TokenizedExample]) -> None:
    assert sorted(asked(lay_out(data.draw(trees(examples))))) == sorted(expected(examples))


@given(data=st.data(), examples=EXAMPLES)
def test_visibility_is_ancestry(data: st.DataObject, examples: list[TokenizedExample]) -> None:
    """Of a depth-first walk, a token's ancestors are the newest tokens of every smaller depth."""
    row = lay_out(data.draw(trees(examples)))
    stack: list[int] = []
    ancestry = np.zeros((len(row), len(row)), dtype=bool)
    for query, depth in enumerate(row.depth.tolist()):
        assert depth <= len(stack)
        stack = [*stack[:depth], query]
        ancestry[query, stack] = True
    index = np.arange(len(row))
    visible = (index <= index[:, None]) & (index[:, None] < row.subtree_end)
    np.testing.assert_array_equal(visible, ancestry)
    np.testing.assert_array_equal(visible.sum(axis=1) - 1, row.depth)  # so positions count on from the prefix
    np.testing.assert_array_equal(row.position_ids, row.depth[None])


@given(data=st.data(), examples=EXAMPLES)
def test_roots_cover_the_row_and_know_whether_they_branch(
    data: st.DataObject, examples: list[TokenizedExample]
) -> None:
    row = lay_out(data.draw(trees(examples)))
    roots = find_roots(row)
    assert [root.start for root in roots] == [0, *(root.end for root in roots[:-1])]
    assert roots[-1].end == len(row)
    for root in roots:
        depth = row.depth[root.start : root.end].tolist()
        assert root.branching is (depth != list(range(len(depth))))
        assert [segment.start for segment in root.segments] == [root.start, *(s.end for s in root.segments[:-1])]
        assert root.segments[-1].end == root.end
        for segment in root.segments:
            for query in range(segment.start, segment.end):
                seen = [key for start, end in (*segment.above, (segment.start, query + 1)) for key in range(start, end)]
                assert seen == [key for key in range(query + 1) if query < row.subtree_end[key]]


@given(data=st.data(), examples=EXAMPLES)
def test_prefix_hash_stands_for_the_path(data: st.DataObject, examples: list[TokenizedExample]) -> None:
    """What dropout is keyed by: equal where the same tokens lead, different where others do."""
    row = lay_out(data.draw(trees(examples)))
    known: dict[tuple[int, ...], int] = {}
    for query in range(len(row)):
        path = tuple(int(row.input_ids[k]) for k in range(query + 1) if query < row.subtree_end[k])
        assert known.setdefault(path, int(row.token_prefixes[query])) == int(row.token_prefixes[query])
    assert len(set(known.values())) == len(known)
