"""Packed rows: the label shift, chains of turns, and what a token sees."""

from hypothesis import given

from loralab.data.example import TokenizedExample
from loralab.layout.tree import PackedRow, build_rows
from unit.layout.examples import EXAMPLES, example, predictions


def asked(row: PackedRow) -> list[tuple[tuple[int, ...], int]]:
    """Return (tokens seen from the position, label) for every label, by the definition of a tree."""
    found = []
    for position, label in zip(row.label_positions.tolist(), row.labels.tolist(), strict=True):
        seen = [int(row.input_ids[k]) for k in range(len(row)) if k <= position < row.subtree_end[k]]
        found.append((tuple(seen), label))
    return found


def pairs_of(tokenized: TokenizedExample) -> list[tuple[list[int], list[int]]]:
    return [(b.prompt_ids.tolist(), b.answer_ids.tolist()) for b in tokenized.branches]


def test_one_branch_by_hand() -> None:
    ((row,),) = build_rows([example(([5, 6], [7, 8]))])
    assert row.input_ids.tolist() == [5, 6, 7]
    assert row.label_positions.tolist() == [1, 2]
    assert row.labels.tolist() == [7, 8]
    assert row.depth.tolist() == [0, 1, 2]
    assert row.position_ids.tolist() == [[0, 1, 2]]
    assert row.subtree_end.tolist() == [3, 3, 3]
    assert row.label_examples.tolist() == [0, 0]
    assert len(row) == 3


@given(examples=EXAMPLES)
def test_labels_are_what_a_naive_loop_predicts(examples: list[TokenizedExample]) -> None:
    for index, (tokenized, rows) in enumerate(zip(examples, build_rows(examples), strict=True)):
        assert [each for row in rows for each in asked(row)] == predictions(pairs_of(tokenized))
        assert all(set(row.label_examples.tolist()) == {index} for row in rows)
        assert all(row.position_ids.tolist() == [row.depth.tolist()] for row in rows)


def test_turns_that_extend_each_other_share_a_row() -> None:
    (rows,) = build_rows([example(([1], [2, 3]), ([1, 2, 3, 4], [5]), ([1, 2, 3, 4, 5, 6], [7]))])
    (row,) = rows
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.label_positions.tolist() == [0, 1, 3, 5]
    assert row.labels.tolist() == [2, 3, 5, 7]


def test_turns_that_do_not_extend_each_other_have_rows_of_their_own() -> None:
    (rows,) = build_rows([example(([1], [2]), ([1, 9], [3]), ([1, 9, 3, 4], [5]))])
    assert [row.input_ids.tolist() for row in rows] == [[1], [1, 9, 3, 4]]


def test_same_turns_of_two_examples_stay_apart() -> None:
    rows = build_rows([example(([1], [2])), example(([1, 2], [3]))])
    assert [len(each) for each in rows] == [1, 1]
    assert rows[1][0].label_examples.tolist() == [1]


def test_branch_that_repeats_another_counts_twice() -> None:
    ((row,),) = build_rows([example(([1], [2]), ([1], [2]))])
    assert row.input_ids.tolist() == [1]
    assert row.label_positions.tolist() == [0, 0]
    assert row.labels.tolist() == [2, 2]
