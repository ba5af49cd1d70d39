"""Perplexity by token, byte and word, from sums over rows."""

import math

import pytest

from loralab.evaluation.metrics.losses import PERPLEXITY, TOKEN_ACCURACY, TOKEN_ENTROPY
from loralab.evaluation.metrics.measure import measure
from unit.evaluation.metrics.made import evidence_of_losses, figures_of


def test_perplexity_is_of_sums_not_of_means() -> None:
    evidence = evidence_of_losses([2.0, 10.0], [1, 5], lengths=([4, 20], [1, 5]))
    figures = figures_of(PERPLEXITY, evidence)
    assert figures["perplexity"] == pytest.approx(math.exp(12 / 6))
    assert figures["byte_perplexity"] == pytest.approx(math.exp(12 / 24))
    assert figures["word_perplexity"] == pytest.approx(math.exp(12 / 6))
    assert figures["bits_per_byte"] == pytest.approx(12 / math.log(2) / 24)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(figures["byte_perplexity"]))
    found = measure({"perplexity": PERPLEXITY}, evidence, resamples=50)
    assert {name: figure.count for name, figure in found.figures.items()} == {
        "perplexity": 6,
        "byte_perplexity": 24,
        "word_perplexity": 6,
        "bits_per_byte": 24,
    }


def test_lengths_that_are_not_known_leave_their_figures_out() -> None:
    found = measure({"perplexity": PERPLEXITY}, evidence_of_losses([1.0, 2.0], [1, 1]), resamples=20)
    assert set(found.values) == {"perplexity"}


def test_perplexity_beyond_floats_is_infinite_and_has_no_interval() -> None:
    found = measure({"perplexity": PERPLEXITY}, evidence_of_losses([1e4, 1e4], [1, 1]), resamples=20)
    assert found.values["perplexity"] == math.inf
    assert found.figures["perplexity"].low is None
    found = measure({"perplexity": PERPLEXITY}, evidence_of_losses([math.inf, 1.0], [1, 1]), resamples=20)
    assert found.values["perplexity"] == math.inf
    assert "not finite" in found.figures["perplexity"].method


def test_token_accuracy_and_entropy() -> None:
    evidence = evidence_of_losses([1.0, 1.0], [2, 6], correct=[2, 1], entropies=[0.5, 3.5])
    assert figures_of(TOKEN_ACCURACY, evidence) == {"token_accuracy": pytest.approx(3 / 8)}
    assert figures_of(TOKEN_ENTROPY, evidence) == {"token_entropy": pytest.approx(0.5)}
    assert TOKEN_ENTROPY.better == {"token_entropy": None}
