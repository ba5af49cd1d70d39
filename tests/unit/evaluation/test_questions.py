"""Questions from rows: one for each trained turn, and samples that cover a split."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from loralab.data.tokens.store import TokenStore
from loralab.data.tokens.tokenize import Unit
from loralab.errors import DataError
from loralab.evaluation.answers import Question
from loralab.evaluation.questions import (
    answerable_rows,
    as_example,
    longest_prompt,
    questions_of,
    references_of,
    spread,
)
from unit.data.prompters import CHATML, build_prompter
from unit.data.stores import branch, write_units
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


def stored(folder: Path, *prompts: int, cut: tuple[int, ...] = ()) -> TokenStore:
    """Write a row for each prompt of so many tokens; the rows at `cut` had their answer cut."""
    answer = [*ids("runs"), STOP]
    units = [
        Unit(
            [branch([5] * prompt, answer if row else [*ids("long"), STOP])],
            notes={"truncated"} if row in cut else set(),
        )
        for row, prompt in enumerate(prompts)
    ]
    return write_units(folder / "store", [(0, row, unit) for row, unit in enumerate(units, start=1)])


def test_rows_whose_answer_was_cut_are_not_asked(tmp_path: Path) -> None:
    split = stored(tmp_path, 3, 9, 4, 2, cut=(1, 2))
    whole = answerable_rows(split, "validation")
    assert whole.origins[:, 1].tolist() == [1, 4]
    assert [q.row for q in questions_of(whole, PROMPTER)] == [1, 4]
    assert (longest_prompt(split), longest_prompt(whole)) == (9, 3)
    assert len(answerable_rows(split.select(np.array([0, 3])), "validation")) == 2


def test_rows_that_were_all_cut_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the answers of all 2 rows were cut at data\.max_length") as caught:
        answerable_rows(stored(tmp_path, 3, 4, cut=(0, 1)), "validation")
    problem = caught.value.problems[0]
    assert problem.where == "split validation"
    assert problem.fix.startswith("raise data.max_length")


def test_stored_text_asks_nothing_cut_or_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"plain text \(data.format: text\) asks nothing") as caught:
        answerable_rows(stored(tmp_path, 3, 4, 1, cut=(0, 1, 2)), "test")
    assert caught.value.problems[0].where == "row 3"


def test_references_are_read_without_prompts(tmp_path: Path) -> None:
    split = stored(tmp_path, 3, 4, 2)
    found = list(references_of(split, PROMPTER))
    assert [(q.unit, q.row, q.source, q.reference) for q in found] == [
        (q.unit, q.row, q.source, q.reference) for q in questions_of(split, PROMPTER)
    ]
    assert [q.reference for q in found] == ["long", "runs", "runs"]
    assert {(q.prompt, q.prompt_ids, q.reference_ids) for q in found} == {("", (), ())}


def test_questions_keep_no_prompt_of_their_own(tmp_path: Path) -> None:
    split = stored(tmp_path, 2000, 3000)
    found = questions_of(split, PROMPTER)
    assert found[1].prompt_ids is not found[1].prompt_ids  # made when it is read
    assert found[0] == questions_of(split, PROMPTER)[0] != found[1]
    plain = pickle.loads(pickle.dumps(found[0]))
    assert type(plain) is Question
    assert (plain.prompt_ids, plain.reference, plain.prompt) == ((5,) * 2000, "long", found[0].prompt)


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
