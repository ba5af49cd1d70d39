"""The swap test: exchanges counted by hand, and random ones against all of them."""

import itertools
from collections.abc import Mapping

import numpy as np
import pytest

from loralab.evaluation.metrics import swap
from loralab.evaluation.metrics.intervals import FloatArray
from loralab.evaluation.metrics.swap import swap_test


def ratio(totals: FloatArray) -> Mapping[str, FloatArray]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"ratio": totals[..., 0] / totals[..., 1]}


def test_by_hand() -> None:
    ours, theirs = (
        np.array([[3.0, 1], [2.0, 1], [0.5, 1], [7.0, 1]]),
        np.array([[1.0, 1], [1.0, 1], [1.0, 1], [7.0, 1]]),
    )
    # Differences 2, 1, -0.5 of three rows: 2.5 seen; of +-2 +-1 +-0.5 four are as large (3.5, 2.5 and their opposites).
    found = swap_test(ours, theirs, ratio, resamples=10)["ratio"]
    assert (found.p, found.differing) == (4 / 8, 3)
    assert found.method == "exact test of all swaps of 3 differing rows"
    assert swap_test(theirs, ours, ratio, resamples=10)["ratio"].p == found.p


@pytest.mark.parametrize(("rows", "p"), [(0, 1.0), (1, 1.0), (5, 2 / 2**5), (6, 2 / 2**6), (12, 2 / 2**12)])
def test_rows_that_all_go_one_way(rows: int, p: float) -> None:
    same = np.ones((3, 2))
    ours, theirs = np.tile([2.0, 1.0], (rows, 1)), np.tile([1.0, 1.0], (rows, 1))
    found = swap_test(np.concatenate([ours, same]), np.concatenate([theirs, same]), ratio, resamples=10)["ratio"]
    assert found.p == pytest.approx(p)
    assert found.differing == rows


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_all_swaps_are_those_of_a_plain_loop_and_random_ones_agree(
    monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    rng = np.random.default_rng(3)
    ours, theirs = (np.stack([rng.gamma(2, size=9) + each, rng.uniform(1, 2, size=9)], axis=1) for each in (shift, 0))
    seen = abs(ratio(ours.sum(axis=0))["ratio"] - ratio(theirs.sum(axis=0))["ratio"])
    hits = 0
    for swapped in itertools.product([False, True], repeat=9):
        first = np.where(np.array(swapped)[:, None], theirs, ours).sum(axis=0)
        second = np.where(np.array(swapped)[:, None], ours, theirs).sum(axis=0)
        hits += abs(ratio(first)["ratio"] - ratio(second)["ratio"]) >= seen - 1e-9
    exact = swap_test(ours, theirs, ratio, resamples=10)["ratio"]
    assert exact.p == pytest.approx(hits / 2**9)
    monkeypatch.setattr(swap, "_EXACT_ROWS", 3)
    drawn = swap_test(ours, theirs, ratio, resamples=20_000)["ratio"]
    assert drawn.method == "20000 random swaps of 9 differing rows"
    assert drawn.p == pytest.approx(exact.p, abs=0.02)
    assert swap_test(ours, theirs, ratio, resamples=20_000)["ratio"] == drawn
    monkeypatch.setattr(swap, "_HELD", 100)  # eleven swaps at a time
    assert swap_test(ours, theirs, ratio, resamples=20_000)["ratio"].p == pytest.approx(exact.p, abs=0.02)
    assert swap_test(ours, theirs, ratio, resamples=5)["ratio"].method.startswith("1000 random")


def test_a_swap_without_the_figure_counts_against_a_difference() -> None:
    # With the first row on the other side there is nothing to divide by.
    ours, theirs = np.array([[1.0, 1.0], [3.0, 0.0]]), np.array([[9.0, 0.0], [1.0, 1.0]])
    assert swap_test(ours, theirs, ratio, resamples=10)["ratio"].p == 1.0
