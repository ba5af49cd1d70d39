"""Classes: how answers are read, hand-counted cases, and scikit-learn as the oracle."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from loralab.errors import DataError
from loralab.evaluation.metrics.classes import LABEL_ACCURACY, YES_NO_METRIC, parse_yes_no
from loralab.evaluation.metrics.measure import measure
from unit.evaluation.metrics.made import evidence_of, figures_of

_WORDS = ("yes", "no", "maybe")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("yes", "yes"),
        ("  Yes.\n", "yes"),
        ("NO!", "no"),
        ("Maybe", "maybe"),
        ("Yes, because they do.", "yes"),
        ("Answer: yes", "yes"),
        ("The answer is: No", "no"),
        ("The answer is no, because", "no"),
        ("**Yes**", "yes"),
        ("Answer:**No**", "no"),
        ('"no"', "no"),
        ("- yes", "yes"),
        ("final answer = maybe", "maybe"),
        ("So the correct answer is yes", "yes"),
        ("Yes\uff0c因为", "yes"),
        ("\uff39\uff45\uff53", "yes"),  # full-width letters
        ("yes no", "yes"),
        ("yesterday", None),
        ("noon", None),
        ("No-one knows", None),
        ("no's", None),
        ("Yes or no?", None),
        ("yes/no/maybe", None),
        ("not sure", None),
        ("unknown", None),
        ("I think yes", None),
        ("ja", None),
        ("да", None),
        ("answer", None),
        ("1", None),
        ("...", None),
        ("", None),
    ],
)
def test_first_word_decides(text: str, word: str | None) -> None:
    assert parse_yes_no(text) == word


@given(st.text(max_size=40))
@settings(deadline=None)
def test_any_text_is_read_or_not(text: str) -> None:
    assert parse_yes_no(text) in (*_WORDS, None)


def test_yes_no_by_hand() -> None:
    # Confusion (rows: truth; columns: yes, no, unparsable): yes 2 1 1, no 1 3 0.
    references = ["yes"] * 4 + ["no"] * 4
    answers = ["Yes.", "yes", "No", "I cannot tell", "yes", "no", "no", "No, never"]
    evidence = evidence_of(answers, references)
    figures = figures_of(YES_NO_METRIC, evidence)
    assert figures["yes_no_accuracy"] == pytest.approx(5 / 8)
    assert figures["yes_no_unparsable"] == pytest.approx(1 / 8)
    assert figures["yes_no_precision_yes"] == pytest.approx(2 / 3)
    assert figures["yes_no_recall_yes"] == pytest.approx(2 / 4)
    assert figures["yes_no_f1_yes"] == pytest.approx(4 / 7)
    assert figures["yes_no_precision_no"] == pytest.approx(3 / 4)
    assert figures["yes_no_recall_no"] == pytest.approx(3 / 4)
    assert figures["yes_no_f1_no"] == pytest.approx(3 / 4)
    assert figures["yes_no_macro_f1"] == pytest.approx((4 / 7 + 3 / 4) / 2)
    assert math.isnan(figures["yes_no_f1_maybe"])
    found = measure({"yes_no": YES_NO_METRIC}, evidence, resamples=200)
    assert not any(name.endswith("maybe") for name in found.values)
    assert found.details["yes_no"] == {
        "classes": ["yes", "no"],
        "columns": ["yes", "no", "unparsable"],
        "confusion_matrix": [[2, 1, 1], [1, 3, 0]],
    }


def test_class_that_only_answers_have_is_a_column() -> None:
    details = YES_NO_METRIC.details(evidence_of(["maybe", "no"], ["yes", "no"]))
    assert details["classes"] == ["yes", "no"]
    assert details["columns"] == ["yes", "no", "maybe", "unparsable"]
    assert details["confusion_matrix"] == [[0, 0, 1, 0], [0, 1, 0, 0]]


@given(st.lists(st.tuples(st.sampled_from([*_WORDS, "hm"]), st.sampled_from(_WORDS)), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_yes_no_is_what_scikit_learn_says(pairs: list[tuple[str, str]]) -> None:
    said, true = (list(column) for column in zip(*pairs, strict=True))
    evidence = evidence_of(said, true)
    figures, details = figures_of(YES_NO_METRIC, evidence), YES_NO_METRIC.details(evidence)
    there = [word for word in _WORDS if word in true]
    assert figures["yes_no_accuracy"] == pytest.approx(accuracy_score(true, said))
    assert figures["yes_no_macro_f1"] == pytest.approx(
        f1_score(true, said, labels=there, average="macro", zero_division=0)
    )
    scores = precision_recall_fscore_support(true, said, labels=list(_WORDS), zero_division=0)[:3]
    for place, word in enumerate(_WORDS):
        for name, score in zip(("precision", "recall", "f1"), scores, strict=True):
            ours = figures[f"yes_no_{name}_{word}"]
            assert ours == pytest.approx(score[place]) if word in there else math.isnan(ours)
    columns = ["hm" if column == "unparsable" else column for column in details["columns"]]
    whole = confusion_matrix(true, said, labels=columns)
    assert details["classes"] == there
    assert details["confusion_matrix"] == [whole[columns.index(word)].tolist() for word in there]


def test_reference_that_is_no_yes_or_no() -> None:
    with pytest.raises(DataError) as caught:
        measure({"yes_no": YES_NO_METRIC}, evidence_of(["yes", "no"], ["yes", "blue"]), resamples=10)
    assert "'blue' is not yes, no or maybe (1 of 2" in str(caught.value)
    assert caught.value.problems[0].where == "row 2 of data source 1"


def test_turns_of_one_row_are_added() -> None:
    evidence = evidence_of(["yes", "no", "no"], ["yes", "yes", "no"], units=[0, 0, 1])
    rows = YES_NO_METRIC.statistics(evidence)
    assert rows.sum(axis=1).tolist() == [2, 1]
    assert figures_of(YES_NO_METRIC, evidence)["yes_no_accuracy"] == pytest.approx(2 / 3)


def test_labels_by_hand() -> None:
    evidence = evidence_of([" Positive", "neutral", "NEGATIVE", "odd"], ["positive", "positive", "negative", "neutral"])
    figures = figures_of(LABEL_ACCURACY, evidence)
    assert figures["label_accuracy"] == pytest.approx(2 / 4)
    assert figures["label_macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert LABEL_ACCURACY.details(evidence) == {
        "classes": ["negative", "neutral", "positive"],
        "columns": ["negative", "neutral", "positive", "(no label)"],
        "confusion_matrix": [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0]],
    }


def test_labels_are_what_scikit_learn_says() -> None:
    rng = np.random.default_rng(3)
    true, said = (rng.choice(["Straße", "été", "猫", "x y"], size=200).tolist() for _ in range(2))
    figures = figures_of(LABEL_ACCURACY, evidence_of(said, true))
    assert figures["label_accuracy"] == pytest.approx(accuracy_score(true, said))
    assert figures["label_macro_f1"] == pytest.approx(f1_score(true, said, average="macro"))


def test_too_many_labels() -> None:
    texts = [f"label {number}" for number in range(51)]
    with pytest.raises(DataError, match="51 different labels"):
        measure({"label_accuracy": LABEL_ACCURACY}, evidence_of(texts, texts), resamples=10)
    assert measure({"label_accuracy": LABEL_ACCURACY}, evidence_of(texts[:50], texts[:50]), resamples=10).values == {
        "label_accuracy": 1.0,
        "label_macro_f1": 1.0,
    }
