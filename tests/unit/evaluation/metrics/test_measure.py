"""Intervals, and what is said of differences."""

import json
import math

import numpy as np
import pytest

from loralab.errors import DataError
from loralab.evaluation.answers import Evidence
from loralab.evaluation.metrics import intervals
from loralab.evaluation.metrics.classes import YES_NO_METRIC
from loralab.evaluation.metrics.intervals import (
    Interval,
    affordable_resamples,
    percentile_interval,
    resample_sums,
    wilson_interval,
)
from loralab.evaluation.metrics.losses import PERPLEXITY
from loralab.evaluation.metrics.measure import compare, measure
from loralab.evaluation.metrics.numbers import NUMBER
from loralab.evaluation.metrics.shapes import LENGTH, REPETITION, STOP_RATE
from loralab.evaluation.metrics.swap import SwapTest
from loralab.evaluation.metrics.table import METRICS
from loralab.evaluation.metrics.texts import EXACT_MATCH
from loralab.evaluation.metrics.verdict import McNemar, compare_right, judge
from unit.evaluation.metrics.made import evidence_of, evidence_of_losses

_EXACT = {"exact_match": EXACT_MATCH}


def _right(*right: int) -> Evidence:
    return evidence_of(["x" if each else "wrong" for each in right], ["x"] * len(right))


def test_sums_are_of_rows_drawn_with_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(7, 3))
    sums = resample_sums(rows, resamples=50, seed=4)
    drawn = np.random.default_rng(4).integers(0, 7, size=(50, 7))
    np.testing.assert_allclose(sums, rows[drawn].sum(axis=1))
    monkeypatch.setattr(intervals, "_HELD", 15)  # two resamples at a time
    np.testing.assert_allclose(resample_sums(rows, resamples=50, seed=4), sums)


def test_many_rows_are_drawn_less_often() -> None:
    assert affordable_resamples(1000, 2000) == 2000
    assert affordable_resamples(100_000, 2000) == 2000
    assert affordable_resamples(1_000_000, 2000) == 500
    assert affordable_resamples(10**9, 2000) == 200


def test_fewer_resamples_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_DRAWN", 300)
    monkeypatch.setattr(intervals, "_LEAST", 10)
    figure = measure({"length": LENGTH}, evidence_of(["a", "bb", "c"], ["x"] * 3, ids=[1, 2, 3]), resamples=400)
    assert "100 resamples (400 asked for)" in figure.figures["length_tokens"].method


def test_bootstrap_holds_the_truth_as_often_as_it_says() -> None:
    # Ratio of sums with rows of different weight: true value 1, 40 rows, 200 repetitions.
    rng, held, repetitions = np.random.default_rng(1), 0, 200
    for seed in range(repetitions):
        counts = rng.integers(1, 9, size=40)
        totals = counts * rng.gamma(4, 0.25, size=40)
        found = measure({"p": PERPLEXITY}, evidence_of_losses(totals, counts), resamples=300, seed=seed)
        figure = found.figures["perplexity"]
        held += figure.low <= math.e <= figure.high
    assert 0.88 <= held / repetitions <= 0.99


def test_wilson_by_hand() -> None:
    # Wilson 1927: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    z, n, p = 1.959963984540054, 50, 0.44
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = wilson_interval(p, n, level=0.95)
    assert found.low == pytest.approx((middle - half) / (1 + z * z / n))
    assert found.high == pytest.approx((middle + half) / (1 + z * z / n))
    assert wilson_interval(0.0, 10, level=0.95).low == 0
    assert wilson_interval(1.0, 10, level=0.95).high == 1


def test_shares_take_wilson_only_where_rows_have_one_answer() -> None:
    single = measure(_EXACT, _right(1, 0, 1, 1), resamples=100).figures["exact_match"]
    assert single.method == "Wilson"
    several = measure(_EXACT, evidence_of(["x"] * 4, ["x", "x", "x", "y"], units=[0, 0, 1, 1]), resamples=100)
    assert "bootstrap over 2 rows" in several.figures["exact_match"].method
    assert several.figures["exact_match"].count == 4


def test_one_row_has_no_interval() -> None:
    figure = measure({"length": LENGTH}, evidence_of(["a"], ["a"], ids=[3]), resamples=100).figures["length_tokens"]
    assert (figure.value, figure.low, figure.high, figure.count) == (3.0, None, None, 1)
    assert "one row" in figure.method
    pair = [measure({"length": LENGTH}, evidence_of(["a"], ["a"], ids=[n]), resamples=9) for n in (3, 5)]
    difference = compare(pair[1], pair[0], resamples=9)["length_tokens"]
    assert (difference["value"], difference["low"], difference["high"]) == (2.0, None, None)
    assert difference["verdict"] == "no difference seen at n = 1"


def test_without_resamples_only_what_needs_none() -> None:
    found = measure(_EXACT | {"length": LENGTH}, evidence_of(["a", "b"], ["a", "a"], ids=[1, 2]), resamples=0)
    assert found.figures["exact_match"].method == "Wilson"
    assert found.figures["length_tokens"].low is None
    assert found.figures["length_tokens"].method == "none: not asked for"


def test_interval_is_stretched_to_its_value() -> None:
    drawn = np.linspace(1, 2, 101)
    plain = percentile_interval(1.5, drawn, level=0.9, method="m")
    assert (plain.low, plain.high, plain.method) == (pytest.approx(1.05), pytest.approx(1.95), "m")
    stretched = percentile_interval(0.5, drawn, level=0.9, method="m")
    assert (stretched.low, stretched.high) == (0.5, pytest.approx(1.95))
    assert "stretched" in stretched.method
    assert "the same in all" in percentile_interval(1.0, np.ones(5), level=0.9, method="m").method


def test_resamples_without_the_figure() -> None:
    drawn = np.array([1.0, 2.0, 3.0, np.nan])
    assert "1 of them without" in percentile_interval(2.0, drawn, level=0.9, method="m").method
    assert percentile_interval(2.0, np.array([1.0, *[np.nan] * 3]), level=0.9, method="m").low is None
    assert percentile_interval(2.0, np.array([1.0, np.inf]), level=0.9, method="m").low is None


def test_rare_class_is_missing_from_some_resamples() -> None:
    references = ["yes"] * 9 + ["no"]
    found = measure({"yes_no": YES_NO_METRIC}, evidence_of(["yes"] * 8 + ["no"] * 2, references), resamples=400)
    assert "without this figure" in found.figures["yes_no_f1_no"].method
    assert "without this figure" not in found.figures["yes_no_f1_yes"].method


@pytest.mark.parametrize("name", ["exact_match", "number", "rouge", "bleu", "chrf", "length", "stop_rate"])
def test_same_sides_differ_by_nothing(name: str) -> None:
    texts = [f"{number} words of a text" for number in range(12)]
    evidence = evidence_of([*texts[:6], *texts[:6]], texts, ids=range(12), stopped=[True, False] * 6)
    sides = [measure({name: METRICS[name]}, evidence, resamples=100) for _ in range(2)]
    for figure, difference in compare(*sides, resamples=100).items():
        assert difference["value"] == 0, figure
        assert difference["low"] <= 0 <= difference["high"]
        assert difference["verdict"] == "no difference seen at n = 12"


def test_clear_difference_is_seen_in_its_own_direction() -> None:
    good, bad = _right(*[1] * 18, 0, 0), _right(*[1] * 4, *[0] * 16)
    adapter, base = (measure(_EXACT, side, resamples=500) for side in (good, bad))
    better = compare(adapter, base, resamples=500)["exact_match"]
    assert better["value"] == pytest.approx(0.7)
    assert better["low"] > 0
    assert better["verdict"] == "better"
    assert better["mcnemar"] == {"only_adapter": 14, "only_base": 0, "p": pytest.approx(2 / 2**14)}
    worse = compare(base, adapter, resamples=500)["exact_match"]
    assert worse["verdict"] == "worse"
    assert worse["low"] == pytest.approx(-better["high"])
    lower = [measure({"p": PERPLEXITY}, evidence_of_losses([x] * 10, [1] * 10), resamples=50) for x in (1.0, 2.0)]
    assert compare(*lower, resamples=50)["perplexity"]["verdict"] == "better"
    lengths = [measure({"l": LENGTH}, evidence_of(["a"] * 9, ["a"] * 9, ids=[n] * 9), resamples=50) for n in (9, 4)]
    assert compare(*lengths, resamples=50)["length_tokens"]["verdict"] == "higher"


def test_pairs_are_drawn_together() -> None:
    # Rows differ a thousand times more among themselves than the sides do.
    rng = np.random.default_rng(2)
    totals = rng.gamma(1, 100, size=60)
    sides = [
        measure({"p": PERPLEXITY}, evidence_of_losses(totals / 100 + shift, [1] * 60), resamples=200)
        for shift in (0.0, 0.01)
    ]
    difference = compare(*sides, resamples=200)["perplexity"]
    assert difference["high"] < 0
    assert difference["verdict"] == "better"
    assert difference["method"].startswith("paired percentile bootstrap over 60 rows")


def test_verdict_follows_the_more_careful_test() -> None:
    away = Interval(0.1, 0.9, "m")
    say = {"better": "higher", "rows": 9, "level": 0.95}
    sure, chance = SwapTest(0.03, 7, "m"), SwapTest(0.0625, 5, "m")
    seen = judge(0.5, away, swap=sure, test=McNemar(6, 0, 0.031), **say)
    assert seen.verdict == "better"
    assert seen.reason == "the interval leaves out 0; the swap test has p = 0.03; McNemar's p = 0.031"
    careful = judge(0.5, away, swap=sure, test=McNemar(5, 0, 0.0625), **say)
    assert careful.verdict == "no difference seen at n = 9"
    assert "McNemar" in careful.reason
    few = judge(0.5, away, swap=chance, **say)
    assert few.verdict == "no difference seen at n = 9"
    assert few.reason == "the interval leaves out 0, but the swap test has p = 0.062 (5 rows differ)"
    assert judge(0.5, away, swap=sure, **say).verdict == "better"
    assert judge(0.5, Interval(-0.1, 0.9, "m"), swap=sure, **say).verdict == "no difference seen at n = 9"
    assert judge(0.5, away, swap=None, **say).verdict == "no difference seen at n = 9"


def test_a_class_of_one_row_proves_nothing() -> None:
    # One "maybe" of 101 rows, right with the adapter alone; ten other rows differ, five each way.
    references = ["maybe", *["yes", "no"] * 50]
    base, adapter = ["no", *references[1:]], list(references)
    for side, first in ((adapter, 1), (base, 11)):
        for row in range(first, first + 5):
            side[row] = "no" if references[row] == "yes" else "yes"
    sides = [measure({"y": YES_NO_METRIC}, evidence_of(said, references), resamples=400) for said in (adapter, base)]
    found = compare(*sides, resamples=400)
    for figure in ("precision", "recall", "f1"):
        difference = found[f"yes_no_{figure}_maybe"]
        assert difference["value"] == 1
        assert difference["low"] > 0
        assert difference["verdict"] == "no difference seen at n = 101"
        assert difference["swap_p"] == 1.0
        assert "the swap test has p = 1" in difference["reason"]
    assert [found[f"yes_no_{figure}_maybe"]["count"] for figure in ("precision", "recall", "f1")] == [0, 1, 1]


def test_counts_of_a_class_are_its_own() -> None:
    found = measure(
        {"y": YES_NO_METRIC}, evidence_of(["yes", "yes", "no", "?"], ["yes", "no", "no", "no"]), resamples=9
    )
    counts = {name.removeprefix("yes_no_"): figure.count for name, figure in found.figures.items()}
    assert counts == {
        "accuracy": 4, "macro_f1": 4, "unparsable": 4, "precision_yes": 2, "recall_yes": 1, "f1_yes": 1,
        "precision_no": 1, "recall_no": 3, "f1_no": 3,
    }  # fmt: skip


def test_turns_of_one_row_are_no_independent_answers() -> None:
    # One row of 30 turns, all right with the adapter alone, and five rows that are equal.
    units = [0] * 30 + [1, 2, 3, 4, 5]
    said = [["x"] * 35, ["wrong"] * 30 + ["x"] * 5]
    sides = [measure(_EXACT, evidence_of(each, ["x"] * 35, units=units), resamples=400) for each in said]
    found = compare(*sides, resamples=400)["exact_match"]
    assert "mcnemar" not in found
    assert found["reason"].endswith("without McNemar's test, since rows hold several answers")
    assert found["verdict"] == "no difference seen at n = 6"
    # By chance alone one side or the other is right on the whole of a row: it is taken for a difference in few cases.
    rng, seen, every = np.random.default_rng(0), 0, 60
    for _ in range(every):
        right = rng.random(10) < 0.5
        both = [["x" if each == side else "wrong" for each in right for _ in range(30)] for side in (True, False)]
        rows = [row for row in range(10) for _ in range(30)]
        pair = [measure(_EXACT, evidence_of(each, ["x"] * 300, units=rows), resamples=0) for each in both]
        seen += not compare(*pair, resamples=200)["exact_match"]["verdict"].startswith("no difference")
    assert seen / every <= 0.1


def test_errors_are_compared_over_answers_that_both_gave() -> None:
    # The base reads twenty easy ones and misses none; the adapter is off by five on those, by one on the others.
    references = [str(100 + row) for row in range(100)]
    base = [reference if row < 20 else "I do not know" for row, reference in enumerate(references)]
    adapter = [str(int(reference) + (5 if row < 20 else 1)) for row, reference in enumerate(references)]
    sides = [measure({"n": NUMBER}, evidence_of(said, references), resamples=300) for said in (adapter, base)]
    found = compare(*sides, resamples=300)
    assert sides[0].values["number_mae"] == pytest.approx(1.8)
    for figure in ("number_mae", "number_rmse"):
        assert found[figure]["value"] == pytest.approx(5)
        assert (found[figure]["count"], found[figure]["verdict"]) == (20, "worse")
        assert found[figure]["reason"].endswith(
            "over answers that count on both sides (with the adapter 100, without 20, on both sides 20)"
        )
    assert found["number_r2"]["count"] == 20
    assert (found["number_within_20"]["count"], found["number_unparsable"]["count"]) == (100, 100)
    assert found["number_unparsable"]["value"] == pytest.approx(-0.8)
    assert "both sides" not in found["number_within_20"]["reason"]


def test_repetition_is_compared_over_answers_that_are_long_on_both_sides() -> None:
    long, short, again = "one two three four five", "one two", "a b c d a b c d"
    adapter = measure({"r": REPETITION}, evidence_of([long, again, short], ["x"] * 3), resamples=50)
    base = measure({"r": REPETITION}, evidence_of([long, short, again], ["x"] * 3), resamples=50)
    found = compare(adapter, base, resamples=50)["repetition"]
    assert (found["value"], found["count"]) == (0.0, 1)
    assert "with the adapter 2, without 2, on both sides 1" in found["reason"]


def test_three_answers_prove_nothing() -> None:
    adapter, base = (measure(_EXACT, side, resamples=200) for side in (_right(1, 1, 1), _right(0, 0, 0)))
    difference = compare(adapter, base, resamples=200)["exact_match"]
    assert difference["value"] == 1
    assert difference["verdict"] == "no difference seen at n = 3"


def test_mcnemar_by_hand() -> None:
    # 3 against 1: p = 2 * (C(4,3) + C(4,4)) / 2^4.
    found = compare_right(np.array([1, 1, 1, 0, 1, 0.0]), np.array([0, 0, 0, 1, 1, 0.0]))
    assert (found.only_adapter, found.only_base, found.p) == (3, 1, pytest.approx(2 * 5 / 16))
    assert compare_right(np.ones(4), np.ones(4)).p == 1


def test_figures_that_one_side_lacks_are_not_compared() -> None:
    base = measure({"number": NUMBER}, evidence_of(["1", "?"], ["1", "2"]), resamples=20)
    for said in (["?", "?"], ["?", "2"]):  # no number at all, and none to a question that the base answered by one
        adapter = measure({"number": NUMBER}, evidence_of(said, ["1", "2"]), resamples=20)
        assert set(compare(adapter, base, resamples=20)) == {"number_within_20", "number_unparsable"}


def test_sides_of_different_rows_are_refused() -> None:
    sides = [measure(_EXACT, _right(*[1] * n), resamples=10) for n in (4, 5)]
    with pytest.raises(DataError, match="on 4 rows and 4 answers with the adapter, on 5 rows"):
        compare(*sides, resamples=10)


@pytest.mark.parametrize(
    ("name", "evidence", "says"),
    [
        ("perplexity", evidence_of(["a"], ["a"]), "'perplexity' needs losses, and there are none"),
        ("exact_match", Evidence(units=3), "'exact_match' needs answers, and there are none"),
        (
            "stop_rate",
            evidence_of(["a"], ["a"], way="teacher_forced"),
            "needs generated answers, and there are none; the answers came by way of teacher_forced",
        ),
        ("calibration", evidence_of(["a"], ["a"]), "set evaluation.answer_by: score"),
        ("exact_match", Evidence(units=0, way="generate"), "'exact_match' needs rows"),
    ],
)
def test_missing_evidence_is_named(name: str, evidence: Evidence, says: str) -> None:
    with pytest.raises(DataError) as caught:
        measure({name: METRICS[name]}, evidence, resamples=10)
    assert says in str(caught.value)


def test_record_is_ready_for_json() -> None:
    evidence = evidence_of(["yes", "no"], ["yes", "yes"], ids=[1, 1], stopped=[True, True])
    metrics = {"yes_no": YES_NO_METRIC, "stop_rate": STOP_RATE, "repetition": REPETITION}
    found = measure(metrics, evidence, resamples=50)
    record = json.loads(json.dumps(found.as_dict()))
    assert set(record) == {"metrics", "details"}
    assert record["metrics"]["yes_no_accuracy"]["value"] == 0.5
    assert set(record["metrics"]["yes_no_accuracy"]) == {
        *("value", "count", "low", "high", "level", "method", "better"),
    }
    assert set(record["details"]) == {"yes_no"}
    json.dumps(compare(found, found, resamples=50))


def test_same_seed_gives_the_same_record() -> None:
    evidence = evidence_of(["yes", "no", "yes"], ["yes", "yes", "no"])
    records = [measure({"yes_no": YES_NO_METRIC}, evidence, resamples=80, seed=seed).as_dict() for seed in (5, 5)]
    assert records[0] == records[1]
