"""Task metrics on real answers: people's answers to PubMedQA and guesses of prices, prices as they are written."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralab.evaluation.metrics.measure import compare, measure
from loralab.evaluation.metrics.numbers import NUMBER, parse_number
from loralab.evaluation.metrics.table import METRICS, resolve_metrics
from unit.evaluation.metrics.made import evidence_of

pytestmark = pytest.mark.slow

# A guess, a price, their distance and whether it is at most a fifth of the price: worked out by hand.
BY_HAND = (
    ("120", "114.99", 5.01, True),
    ("80", "8.39", 71.61, False),
    ("35", "12.09", 22.91, False),
    ("350", "17.99", 332.01, False),
    ("75", "41.91", 33.09, False),
    ("12", "19.67", 7.67, False),
    ("115", "49.99", 65.01, False),
    ("100", "60.41", 39.59, False),
    ("300", "18.98", 281.02, False),
    ("80", "27.99", 52.01, False),
    ("90", "33.97", 56.03, False),
    ("120", "25.95", 94.05, False),
    ("300", "37.45", 262.55, False),
    ("450", "6.99", 443.01, False),
    ("280", "11.09", 268.91, False),
    ("140", "60.99", 79.01, False),
    ("19.99", "22.99", 3.00, True),
    ("85", "40.43", 44.57, False),
    ("450", "26.99", 423.01, False),
    ("7", "6.95", 0.05, True),
)
SUM_BY_HAND = 2584.12


def _rows(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): texts hold U+2028, which JSON does not escape.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _pubmedqa(folder: Path) -> list[dict[str, Any]]:
    return _rows(folder / "yesno" / "pubmedqa" / "pubmedqa_train.jsonl")


def _yes_no(said: list[str], true: list[str]) -> dict[str, float]:
    return measure(resolve_metrics(["yes_no"]), evidence_of(said, true), resamples=200).values


@pytest.mark.parametrize(
    ("column", "accuracy", "macro_f1"),
    [("human_pred_with_context", 0.7820, 0.6946), ("human_pred_free", 0.9280, 0.8881), (None, 0.5520, 0.2371)],
)
def test_pubmedqa_as_its_source_states(data_folder: Path, column: str | None, accuracy: float, macro_f1: float) -> None:
    rows = _pubmedqa(data_folder)
    assert len(rows) == 500
    found = _yes_no(["yes" if column is None else row[column] for row in rows], [row["answer"] for row in rows])
    assert round(found["yes_no_accuracy"], 4) == accuracy
    assert round(found["yes_no_macro_f1"], 4) == macro_f1
    assert found["yes_no_unparsable"] == 0


def test_pubmedqa_yes_and_no_alone(data_folder: Path) -> None:
    column = "human_pred_with_context"
    rows = [row for row in _pubmedqa(data_folder) if {row["answer"], row[column]} <= {"yes", "no"}]
    assert len(rows) == 430
    found = _yes_no([row[column] for row in rows], [row["answer"] for row in rows])
    stated = {"accuracy": 0.8581, "f1_yes": 0.8893, "f1_no": 0.8026, "macro_f1": 0.8459}
    assert {name: round(found[f"yes_no_{name}"], 4) for name in stated} == stated
    assert not any(name.endswith("maybe") for name in found)


def test_people_who_saw_the_conclusion_answer_better(data_folder: Path) -> None:
    rows, metrics = _pubmedqa(data_folder), resolve_metrics(["yes_no", "label_accuracy"])
    true = [row["answer"] for row in rows]
    free, context = (
        measure(metrics, evidence_of([row[column] for row in rows], true), resamples=1000)
        for column in ("human_pred_free", "human_pred_with_context")
    )
    seen = compare(free, context, resamples=1000)
    assert seen["yes_no_accuracy"]["value"] == pytest.approx(0.146)
    for figure in ("yes_no_accuracy", "yes_no_macro_f1", "label_accuracy", "label_macro_f1"):
        assert seen[figure]["verdict"] == "better"
        assert seen[figure]["low"] > 0
    only_free = sum(r["human_pred_free"] == r["answer"] != r["human_pred_with_context"] for r in rows)
    assert seen["yes_no_accuracy"]["mcnemar"]["only_adapter"] == only_free


def _prices(folder: Path) -> tuple[list[str], list[str]]:
    """Return guesses and prices as texts. They are of different products: the file of guesses has no prices."""
    prices = folder / "price" / "items_prompts"
    with (prices / "human_guesses_250.csv").open(encoding="utf-8", newline="") as file:
        guesses = [row[1] for row in csv.reader(file)]
    return guesses, [row["completion"] for row in _rows(prices / "items_prompts_val.jsonl")]


def test_prices_by_hand_for_twenty_rows(data_folder: Path) -> None:
    guesses, prices = _prices(data_folder)
    assert [(guess, price) for guess, price, _, _ in BY_HAND] == list(zip(guesses[:20], prices[:20], strict=True))
    evidence = evidence_of([f"Price is ${guess}" for guess, *_ in BY_HAND], [price for _, price, *_ in BY_HAND])
    found = measure({"number": NUMBER}, evidence, resamples=200)
    np.testing.assert_allclose(found.per_answer["number"], [-error for *_, error, _ in BY_HAND])
    assert found.values["number_mae"] == pytest.approx(SUM_BY_HAND / 20)
    assert found.values["number_within_20"] == pytest.approx(sum(within for *_, within in BY_HAND) / 20)
    assert found.figures["number_within_20"].count == 20


def test_prices_against_a_plain_loop(data_folder: Path) -> None:
    guesses, prices = _prices(data_folder)
    errors, within = [], 0
    for guess, price in zip(guesses, prices, strict=False):
        errors.append(abs(float(guess) - float(price)))
        within += errors[-1] <= float(price) * 0.2
    found = measure({"number": NUMBER}, evidence_of(guesses[: len(prices)], prices), resamples=200).values
    assert len(errors) == 150
    assert found["number_mae"] == pytest.approx(sum(errors) / 150)
    assert found["number_rmse"] == pytest.approx((sum(error**2 for error in errors) / 150) ** 0.5)
    assert found["number_within_20"] == pytest.approx(within / 150)
    assert found["number_unparsable"] == 0


def test_prices_are_read_as_they_are_written(data_folder: Path) -> None:
    folder = data_folder / "price" / "items_prompts"
    answers = [row["messages"][-1]["content"] for each in "ab" for row in _rows(folder / f"messages_{each}_val.jsonl")]
    prices = [row["price"] for row in _rows(folder / "items_prompts_val.jsonl")]
    assert [parse_number(answer) for answer in answers] == prices


def test_guesses_have_every_figure(data_folder: Path) -> None:
    guesses, prices = _prices(data_folder)
    names = [name for name, metric in METRICS.items() if metric.needs == "answers" and name != "yes_no"]
    names.remove("label_accuracy")  # prices are more than fifty labels
    found = measure(resolve_metrics(names), evidence_of(guesses[:150], prices), resamples=300)
    for name, figure in found.figures.items():
        assert figure.low is not None, name
        assert figure.low <= figure.value <= figure.high, name
