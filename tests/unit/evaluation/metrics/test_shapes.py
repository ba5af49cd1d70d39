"""The form of answers: stops, lengths, repetition."""

import math

import pytest

from loralab.evaluation.metrics.measure import measure
from loralab.evaluation.metrics.shapes import LENGTH, REPETITION, STOP_RATE, repeated_share
from unit.evaluation.metrics.made import evidence_of, figures_of


def test_stop_rate() -> None:
    evidence = evidence_of(["a", "b", "c"], ["x"] * 3, stopped=[True, False, True])
    assert figures_of(STOP_RATE, evidence) == {"stop_rate": pytest.approx(2 / 3)}
    always = measure(
        {"stop_rate": STOP_RATE}, evidence_of(["a"] * 20, ["x"] * 20, stopped=[True] * 20), resamples=100
    ).figures["stop_rate"]
    assert always.high == 1
    assert 0.8 < always.low < 0.9  # 20 of 20 do not prove that all will stop


def test_length_counts_tokens_and_characters() -> None:
    evidence = evidence_of(["été", "", "猫 a"], ["x"] * 3, ids=[4, 0, 2])
    assert figures_of(LENGTH, evidence) == {"length_tokens": 2.0, "length_characters": 2.0}


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c d", 0.0),
        ("a b c d a b c d", 1 / 5),
        ("no no no no no no", 2 / 3),
        ("  a\nb\tc d  ", 0.0),
    ],
)
def test_repeated_share(text: str, share: float) -> None:
    assert repeated_share(text) == pytest.approx(share)


def test_short_texts_are_left_out() -> None:
    assert math.isnan(repeated_share("a b c"))
    evidence = evidence_of(["a b c", "no no no no no no", "", "a b c d"], ["x"] * 4)
    assert figures_of(REPETITION, evidence) == {"repetition": pytest.approx(1 / 3)}
    assert REPETITION.count(REPETITION.statistics(evidence).sum(axis=0)) == 2
    assert measure({"repetition": REPETITION}, evidence_of(["a", ""], ["x", "x"]), resamples=10).values == {}
