"""What may be said of a difference between two models.

Owns the rule: a difference is seen only where nothing speaks against it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from scipy import stats

from loralab.evaluation.metrics.intervals import Interval
from loralab.evaluation.metrics.metric import Better
from loralab.evaluation.perplexity import FloatArray


@dataclass(frozen=True, slots=True)
class McNemar:
    """Right and wrong answers of two models to the same questions.

    Attributes:
        only_adapter: questions that only the adapter answers right.
        only_base: questions that only the base answers right.
        p: exact two-sided p-value of both being equally likely.
    """

    only_adapter: int
    only_base: int
    p: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dataclasses.asdict(self)


def compare_right(adapter: FloatArray, base: FloatArray) -> McNemar:
    """Compare two models' right answers by McNemar's exact test.

    Args:
        adapter: 1 for each right, 0 for each wrong answer (answers).
        base: the same of the other model, to the same questions (answers).

    Source: McNemar 1947, Note on the sampling error of the difference between correlated proportions or percentages.
    """
    only_adapter = int(((adapter > 0) & (base <= 0)).sum())
    only_base = int(((adapter <= 0) & (base > 0)).sum())
    split = only_adapter + only_base
    p = float(stats.binomtest(only_adapter, split, 0.5).pvalue) if split else 1.0
    return McNemar(only_adapter, only_base, p)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is said of a difference.

    Attributes:
        verdict: better, worse (higher, lower where neither way is better) or that no difference was seen.
        reason: what it rests on.
    """

    verdict: str
    reason: str

    def as_dict(self) -> dict[str, str]:
        """Return the fields by name."""
        return dataclasses.asdict(self)


def judge(
    value: float,
    interval: Interval,
    *,
    better: Better | None,
    rows: int,
    differing: int,
    level: float,
    test: McNemar | None = None,
) -> Verdict:
    """Say what a paired difference allows to say, by the most careful of what was measured.

    Args:
        value: adapter - base.
        interval: of the difference.
        better: which direction is better, or None where neither is.
        rows: rows that were measured.
        differing: rows on which the two models differ at all.
        level: confidence level of the interval.
        test: McNemar's test, for shares of right answers.
    """
    nothing = f"no difference seen at n = {rows}"
    low, high = interval.low, interval.high
    if low is None or high is None:
        return Verdict(nothing, f"there is no interval ({interval.method})")
    if low <= 0 <= high:
        return Verdict(nothing, "the interval holds 0")
    # Even if all of so few rows moved the same way, a sign test would not call it more than chance.
    if 2 * 0.5**differing > 1 - level + 1e-12:
        return Verdict(nothing, f"the interval leaves out 0, but only {differing} rows differ")
    if test is not None and test.p > 1 - level:
        return Verdict(nothing, f"the interval leaves out 0, but McNemar's test has p = {test.p:.2g}")
    if better is None:
        verdict = "higher" if value > 0 else "lower"
    else:
        verdict = "better" if (value > 0) == (better == "higher") else "worse"
    return Verdict(verdict, "the interval leaves out 0" + ("" if test is None else f"; McNemar's p = {test.p:.2g}"))
