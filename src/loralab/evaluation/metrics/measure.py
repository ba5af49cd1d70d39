"""Figures of one model with their intervals, and two models compared in pairs.

Owns what is said of a difference; what a metric is stands in `metric.py`, how rows are drawn in `intervals.py`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loralab.errors import DataError
from loralab.evaluation.answers import Evidence
from loralab.evaluation.metrics.intervals import (
    Interval,
    describe_resamples,
    percentile_interval,
    resample_sums,
    wilson_interval,
)
from loralab.evaluation.metrics.metric import Better, Metric
from loralab.evaluation.metrics.swap import SwapTest, swap_test
from loralab.evaluation.metrics.verdict import McNemar, compare_right, judge
from loralab.evaluation.perplexity import FloatArray

_MISSING = {
    "losses": ("losses", "measure the losses of the rows too"),
    "answers": ("answers", "have the rows answered, or leave the metric out of evaluation.metrics"),
    "generated": ("generated answers", "set evaluation.answer_by: generate, or leave it out of evaluation.metrics"),
    "scores": ("scores of closed labels", "set evaluation.answer_by: score, or leave it out of evaluation.metrics"),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure and how far it can be trusted.

    Attributes:
        value: the figure.
        count: observations behind it: answers (of a class those whose reference it is, for its precision those that
            say it), tokens, bytes or words.
        low: lower bound of its interval, or None where there is none.
        high: upper bound, or None.
        level: confidence level.
        method: how the interval came about, or why there is none.
        better: which direction is better, or None where neither is.
    """

    value: float
    count: int
    low: float | None
    high: float | None
    level: float
    method: str
    better: Better | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Measurement:
    """All figures of one model on some rows.

    Attributes:
        metrics: what was measured, by name.
        units: rows behind it.
        figures: by figure name; those that are not defined on these rows are left out.
        details: what else a report shows, by metric name.
        statistics: what each row adds, by metric name (units, k).
        per_answer: a score per answer, higher is better, by metric name (answers), for metrics that have one.
            For those with a `share_of_right` it is 1 for a right answer and 0 for a wrong one.
        evidence: what was measured.
    """

    metrics: Mapping[str, Metric]
    units: int
    figures: Mapping[str, Figure]
    details: Mapping[str, Mapping[str, Any]]
    statistics: Mapping[str, FloatArray]
    per_answer: Mapping[str, FloatArray]
    evidence: Evidence

    @property
    def values(self) -> dict[str, float]:
        """The figures alone, by name."""
        return {name: figure.value for name, figure in self.figures.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return figures and details, ready for JSON."""
        return {
            "metrics": {name: figure.as_dict() for name, figure in self.figures.items()},
            "details": {name: dict(details) for name, details in self.details.items()},
        }


def measure(
    metrics: Mapping[str, Metric], evidence: Evidence, *, resamples: int, level: float = 0.95, seed: int = 0
) -> Measurement:
    """Measure metrics on what a model answered.

    Args:
        metrics: by name, as `resolve_metrics` gives them.
        evidence: answers and losses.
        resamples: bootstrap resamples; with 0 there are only those intervals that need none.
        level: confidence level of the intervals.
        seed: of the resamples.

    Raises:
        DataError: the evidence lacks what a metric needs, or a metric cannot be measured on it.
    """
    for name, metric in metrics.items():
        _check_needs(name, metric, evidence)
        if metric.check is not None:
            metric.check(evidence)
    statistics = {name: np.asarray(metric.statistics(evidence)) for name, metric in metrics.items()}
    draws = _draw(metrics, statistics, resamples=resamples, seed=seed)
    # Wilson's interval takes answers for independent of each other; those of one row are not.
    single = _one_answer_a_row(evidence)
    figures: dict[str, Figure] = {}
    for name, metric in metrics.items():
        totals = statistics[name].sum(axis=0)
        wilson = metric.shares if single else ()
        figures |= _figures(metric, totals, draw=draws[name], wilson=wilson, level=level)
    return Measurement(
        metrics=metrics,
        units=evidence.units,
        figures=figures,
        details={name: metric.details(evidence) for name, metric in metrics.items() if metric.details is not None},
        statistics=statistics,
        per_answer={n: metric.per_answer(evidence) for n, metric in metrics.items() if metric.per_answer is not None},
        evidence=evidence,
    )


def _one_answer_a_row(evidence: Evidence) -> bool:
    return len({answer.question.unit for answer in evidence.answers}) == len(evidence.answers)


def _check_needs(name: str, metric: Metric, evidence: Evidence) -> None:
    there = {
        "losses": evidence.losses is not None,
        "answers": len(evidence.answers) > 0,
        "generated": len(evidence.answers) > 0 and evidence.way == "generate",
        "scores": len(evidence.answers) > 0 and all(answer.label_scores for answer in evidence.answers),
    }
    if there[metric.needs] and evidence.units > 0:
        return
    what, fix = _MISSING[metric.needs]
    if evidence.units == 0:
        what, fix = "rows", "measure a split that has rows"
    way = f"; the answers came by way of {evidence.way}" if evidence.way is not None and evidence.answers else ""
    raise DataError(f"metric {name!r} needs {what}, and there are none{way}", where="key evaluation.metrics", fix=fix)


@dataclass(frozen=True, slots=True)
class _Draw:
    """Figures of each resample (resamples) and how they were drawn, or None and why there are none."""

    figures: Mapping[str, FloatArray] | None
    method: str


def _draw(
    metrics: Mapping[str, Metric], statistics: Mapping[str, FloatArray], *, resamples: int, seed: int
) -> dict[str, _Draw]:
    """Draw rows once for all metrics."""
    finite = [name for name in metrics if np.isfinite(statistics[name]).all()]
    draws = {name: _Draw(None, "none: some row is not finite") for name in metrics}
    rows = len(statistics[finite[0]]) if finite else 0
    count, method = describe_resamples(rows, resamples)
    if not count:
        return draws | dict.fromkeys(finite, _Draw(None, method))
    sums = resample_sums(np.concatenate([statistics[name] for name in finite], axis=1), resamples=count, seed=seed)
    widths = np.cumsum([statistics[name].shape[1] for name in finite])
    for name, part in zip(finite, np.split(sums, widths[:-1], axis=1), strict=True):
        draws[name] = _Draw(_values(metrics[name], part), method)
    return draws


def _values(metric: Metric, totals: FloatArray) -> Mapping[str, FloatArray]:
    """Return the figures of totals (..., k), each under its name (...)."""
    return {name: np.asarray(value, dtype=np.float64) for name, value in metric.figures(totals).items()}


def _counts(metric: Metric, totals: FloatArray) -> dict[str, int]:
    """Return how many observations stand behind each figure of totals (k)."""
    counts: dict[str, FloatArray] = dict.fromkeys(metric.better, metric.count(totals))
    counts |= {} if metric.counts is None else metric.counts(totals)
    return {name: round(float(count)) for name, count in counts.items()}


def _figures(
    metric: Metric, totals: FloatArray, *, draw: _Draw, wilson: tuple[str, ...], level: float
) -> dict[str, Figure]:
    counts = _counts(metric, totals)
    figures = {}
    for name, array in _values(metric, totals).items():
        value, count = float(array), counts[name]
        if np.isnan(value):
            continue
        if name in wilson:
            interval = wilson_interval(value, count, level=level)
        elif draw.figures is None:
            interval = Interval(None, None, draw.method)
        else:
            interval = percentile_interval(value, draw.figures[name], level=level, method=draw.method)
        figures[name] = Figure(value, count, interval.low, interval.high, level, interval.method, metric.better[name])
    return figures


def compare(
    adapter: Measurement, base: Measurement, *, resamples: int, level: float = 0.95, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Compare two models on the same rows, in pairs.

    Args:
        adapter: figures of the one model.
        base: figures of the other, of the same questions.
        resamples: bootstrap resamples; the same rows are drawn on both sides.
        level: confidence level; a difference is seen where its interval leaves out 0 and the tests agree (`judge`).
        seed: of the resamples and swaps.

    Returns:
        For each figure that both have, on answers that both give: `value` (adapter - base), `low`, `high`, `level`,
        `method`, `count` (the smaller of the two), `rows` (those that the metric is defined on), `verdict`, `reason`
        (what the verdict rests on), `swap_p` and `swap_method` (p of a test that exchanges the two models' rows, where
        sums are finite) and, for shares of right answers with one answer per row, `mcnemar` with `only_adapter`,
        `only_base` and the exact two-sided `p`.

    Raises:
        DataError: the two were not measured on equally many rows and answers.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile interval); `swap.py` has
    those of the swap test.
    """
    metrics = {name: metric for name, metric in adapter.metrics.items() if name in base.metrics}
    _check_pairs(metrics, adapter, base)
    pairs = {name: _pair(name, metric, adapter, base) for name, metric in metrics.items()}
    ours, theirs = (
        _draw(metrics, {name: pair[side] for name, pair in pairs.items()}, resamples=resamples, seed=seed)
        for side in (0, 1)
    )
    result: dict[str, dict[str, Any]] = {}
    for name, metric in metrics.items():
        values = [_values(metric, side.sum(axis=0)) for side in pairs[name]]
        counts = [_counts(metric, side.sum(axis=0)) for side in pairs[name]]
        swaps = _swap(metric, pairs[name], resamples=resamples, seed=seed)
        rows = int(np.any(np.concatenate(pairs[name], axis=1) != 0, axis=1).sum())
        for figure, better in metric.better.items():
            value = float(values[0][figure]) - float(values[1][figure])
            if np.isnan([values[0][figure], values[1][figure]]).any():
                continue
            interval = _paired_interval(value, ours[name], theirs[name], figure=figure, level=level)
            count, test = min(side[figure] for side in counts), _test_right(name, figure, adapter, base)
            swap = swaps.get(figure)
            verdict = judge(value, interval, better=better, rows=rows, level=level, swap=swap, test=test)
            result[figure] = {
                "value": value,
                "low": interval.low,
                "high": interval.high,
                "level": level,
                "method": interval.method,
                "count": count,
                "rows": rows,
                "verdict": verdict.verdict,
                "reason": "; ".join([verdict.reason, *_notes(name, figure, adapter, base, count=count)]),
                **({} if swap is None else swap.as_dict()),
                **({} if test is None else {"mcnemar": test.as_dict()}),
            }
    return result


def _check_pairs(metrics: Mapping[str, Metric], adapter: Measurement, base: Measurement) -> None:
    for name in metrics:
        ours, theirs = adapter.statistics[name], base.statistics[name]
        answers = [len(side.per_answer.get(name, ())) for side in (adapter, base)]
        if ours.shape != theirs.shape or answers[0] != answers[1]:
            raise DataError(
                f"metric {name!r} was measured on {len(ours)} rows and {answers[0]} answers with the adapter, on "
                f"{len(theirs)} rows and {answers[1]} answers without",
                where="comparison of adapter and base",
                fix="measure both on the same questions",
            )


def _pair(name: str, metric: Metric, adapter: Measurement, base: Measurement) -> tuple[FloatArray, FloatArray]:
    """Return what each row adds on either side (units, k each)."""
    if metric.paired is None:
        return adapter.statistics[name], base.statistics[name]
    return metric.paired(adapter.evidence, base.evidence)


def _swap(metric: Metric, pair: tuple[FloatArray, FloatArray], *, resamples: int, seed: int) -> Mapping[str, SwapTest]:
    if not all(np.isfinite(side).all() for side in pair):
        return {}
    return swap_test(*pair, functools.partial(_values, metric), resamples=resamples, seed=seed)


def _test_right(name: str, figure: str, adapter: Measurement, base: Measurement) -> McNemar | None:
    # It takes answers for independent of each other; those of one row are not.
    if figure != adapter.metrics[name].share_of_right or not _one_answer_a_row(adapter.evidence):
        return None
    return compare_right(adapter.per_answer[name], base.per_answer[name])


def _notes(name: str, figure: str, adapter: Measurement, base: Measurement, *, count: int) -> list[str]:
    """Return what else a reader of the verdict has to know."""
    notes, metric = [], adapter.metrics[name]
    own = [side.figures[figure].count if figure in side.figures else 0 for side in (adapter, base)]
    if metric.paired is not None and own != [count, count]:
        sides = f"with the adapter {own[0]}, without {own[1]}, on both sides {count}"
        notes.append(f"over answers that count on both sides ({sides})")
    if figure == metric.share_of_right and not _one_answer_a_row(adapter.evidence):
        notes.append("without McNemar's test, since rows hold several answers")
    return notes


def _paired_interval(value: float, ours: _Draw, theirs: _Draw, *, figure: str, level: float) -> Interval:
    if ours.figures is None or theirs.figures is None:
        return Interval(None, None, theirs.method if theirs.figures is None else ours.method)
    with np.errstate(invalid="ignore"):  # infinite on both sides: not a number, and said so
        drawn = ours.figures[figure] - theirs.figures[figure]
    return percentile_interval(value, drawn, level=level, method=f"paired {ours.method}")
