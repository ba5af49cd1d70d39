"""Calibration: closed forms, and scikit-learn's Brier score."""

import math

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from loralab.errors import DataError
from loralab.evaluation.metrics.calibration import CALIBRATION, label_probabilities
from loralab.evaluation.metrics.measure import measure
from unit.evaluation.metrics.made import evidence_of, figures_of


def _scores(*probabilities: float) -> dict[str, float]:
    names = ("yes", "no", "maybe")
    return {name: math.log(p) if p else -math.inf for name, p in zip(names, probabilities, strict=False)}


def test_scores_are_normalised_over_the_labels() -> None:
    np.testing.assert_allclose(label_probabilities({"a": -800.0, "b": -800.0 + math.log(3)}), [0.25, 0.75])
    np.testing.assert_allclose(label_probabilities({"a": -math.inf, "b": -3.0}), [0, 1])


def test_by_hand() -> None:
    # Confidences 0.8 (right), 0.8 (wrong), 0.6 (right): bins (0.7, 0.8] and (0.5, 0.6].
    scores = [_scores(0.8, 0.2), _scores(0.8, 0.2), _scores(0.4, 0.6)]
    evidence = evidence_of(["yes", "yes", "no"], ["yes", "no", "no"], way="score", scores=scores)
    figures = figures_of(CALIBRATION, evidence)
    assert figures["calibration_ece"] == pytest.approx(2 / 3 * abs(0.5 - 0.8) + 1 / 3 * abs(1 - 0.6))
    assert figures["calibration_brier"] == pytest.approx((0.08 + 1.28 + 0.32) / 3)
    assert CALIBRATION.per_answer(evidence).tolist() == pytest.approx([-0.08, -1.28, -0.32])
    assert sum(each["answers"] for each in CALIBRATION.details(evidence)["bins"]) == 3


def test_bins_are_open_below_and_closed_above() -> None:
    evidence = evidence_of(["yes"], ["no"], way="score", scores=[{"yes": -1.0, "no": -1.0}])
    assert CALIBRATION.details(evidence)["bins"] == [
        {"above": 0.4, "up_to": 0.5, "answers": 1, "confidence": 0.5, "accuracy": 0.0}
    ]


def test_certain_and_right_is_zero_certain_and_wrong_is_two() -> None:
    right = evidence_of(["yes"], ["yes"], way="score", scores=[_scores(1.0, 0.0)])
    wrong = evidence_of(["yes"], ["no"], way="score", scores=[_scores(1.0, 0.0)])
    assert figures_of(CALIBRATION, right) == {"calibration_ece": 0, "calibration_brier": 0}
    assert figures_of(CALIBRATION, wrong) == {"calibration_ece": 1, "calibration_brier": 2}


def test_brier_is_what_scikit_learn_says() -> None:
    rng = np.random.default_rng(5)
    probabilities = rng.dirichlet([1, 1, 1], size=60)
    true = rng.choice(["maybe", "no", "yes"], size=60).tolist()
    names = ["maybe", "no", "yes"]
    scores = [dict(zip(names, np.log(row).tolist(), strict=True)) for row in probabilities]
    evidence = evidence_of(["?"] * 60, true, way="score", scores=scores)
    expected = brier_score_loss(true, probabilities, labels=names, scale_by_half=False)
    assert figures_of(CALIBRATION, evidence)["calibration_brier"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reference", "scores", "says"),
    [
        ("perhaps", _scores(0.5, 0.5), "'perhaps' is none of the labels yes, no"),
        ("yes", {"yes": math.nan, "no": -1.0}, "not finite"),
        ("yes", {"yes": -math.inf, "no": -math.inf}, "not finite"),
        ("yes", {"yes": -1.0, "Yes ": -1.0}, "two differ in case"),
    ],
)
def test_scores_that_cannot_be_used(reference: str, scores: dict[str, float], says: str) -> None:
    evidence = evidence_of(["yes"], [reference], way="score", scores=[scores])
    with pytest.raises(DataError) as caught:
        measure({"calibration": CALIBRATION}, evidence, resamples=10)
    assert says in str(caught.value)
