"""Questions from rows: one for each trained turn, and samples that cover a split."""

import pytest

from loralab.errors import DataError
from loralab.evaluation.questions import as_example, questions_of, spread
from unit.data.prompters import CHATML, build_prompter
from unit.evaluation.asking import question
from unit.layout.examples import example

PROMPTER = build_prompter(CHATML)
STOP = PROMPTER.stop.ids[0]


def ids(text: str) -> list[int]:
    return PROMPTER.encode([text])[0]


def test_every_trained_turn_is_a_question() -> None:
    one = example((ids("the cat"), [*ids("runs"), STOP]), row=4, source=1)
    turns = example((ids("a dog"), ids("one")), ([*ids("a dog one"), STOP], [*ids("two"), STOP]), row=9)
    found = questions_of([one, turns], PROMPTER)
    assert [(q.unit, q.row, q.source) for q in found] == [(0, 4, 1), (1, 9, 0), (1, 9, 0)]
    assert [q.prompt for q in found] == ["the cat", "a dog", "a dog one<|stop|>"]
    assert [q.reference for q in found] == ["runs", "one", "two"]
    assert found[0].prompt_ids == tuple(ids("the cat"))
    assert found[0].reference_ids == (*ids("runs"), STOP)
    assert {type(token) for q in found for token in (*q.prompt_ids, *q.reference_ids)} == {int}


def test_units_count_the_chosen_rows() -> None:
    rows = [example((ids("the cat"), [5]), row=number) for number in range(1, 6)]
    found = questions_of(rows, PROMPTER, [1, 4])
    assert [(q.unit, q.row) for q in found] == [(0, 2), (1, 5)]
    assert questions_of(rows, PROMPTER, []) == []


def test_plain_text_asks_nothing() -> None:
    with pytest.raises(DataError, match=r"plain text \(data.format: text\) asks nothing") as caught:
        questions_of([example((ids("the cat"), [5])), example(([4], [5, 6]), row=7)], PROMPTER)
    assert caught.value.problems[0].where == "row 7"


@pytest.mark.parametrize(
    ("count", "limit", "wanted"),
    [
        (5, None, [0, 1, 2, 3, 4]),
        (3, 3, [0, 1, 2]),
        (3, 8, [0, 1, 2]),
        (10, 2, [2, 7]),
        (9, 1, [4]),
        (7, 3, [1, 3, 5]),
        (0, 4, []),
    ],
)
def test_samples_are_spread_evenly(count: int, limit: int | None, wanted: list[int]) -> None:
    assert spread(count, limit) == wanted


@pytest.mark.parametrize("count", [13, 100, 10_570])
@pytest.mark.parametrize("limit", [1, 7, 12, 99])
def test_no_row_is_sampled_twice_and_no_stretch_is_left_out(count: int, limit: int) -> None:
    found = spread(count, limit)
    assert len(found) == len(set(found)) == min(count, limit)
    gaps = [after - before for before, after in zip([-1, *found], [*found, count], strict=True)]
    assert max(gaps) <= count / len(found) + 1


def test_answers_become_branches_behind_one_prompt() -> None:
    made = as_example(question([3, 4, 5], unit=6), [[7], [8, 9]])
    assert (made.row, made.source) == (7, 0)
    assert [b.prompt_ids.tolist() for b in made.branches] == [[3, 4, 5]] * 2
    assert [b.answer_ids.tolist() for b in made.branches] == [[7], [8, 9]]
