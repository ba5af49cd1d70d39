"""What may be said of a difference between two models.

Owns the rule: a difference is seen only where nothing speaks against it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from scipy import stats

from loralab.config.metric_facts import Better
from loralab.evaluation.metrics.intervals import FloatArray, Interval
from loralab.evaluation.metrics.swap import SwapTest


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
    level: float,
    swap: SwapTest | None,
    test: McNemar | None = None,
) -> Verdict:
    """Say what a paired difference allows to say, by the most careful of what was measured.

    A difference is seen where its interval leaves out 0, the swap test's p is at most 1 - level, and so is
    McNemar's where there is one.

    Args:
        value: adapter - base.
        interval: of the difference.
        better: which direction is better, or None where neither is.
        rows: rows that were measured.
        level: confidence level of the interval.
        swap: the swap test, or None where sums are not finite, of which there is no interval either.
        test: McNemar's test, for shares of right answers.
    """
    nothing = f"no difference seen at n = {rows}"
    low, high = interval.low, interval.high
    if low is None or high is None or swap is None:
        return Verdict(nothing, f"there is no interval ({interval.method})")
    if low <= 0 <= high:
        return Verdict(nothing, "the interval holds 0")
    out = "the interval leaves out 0"
    if swap.p > 1 - level + 1e-12:
        differing = f"{swap.differing} row{' differs' if swap.differing == 1 else 's differ'}"
        return Verdict(nothing, f"{out}, but the swap test has p = {swap.p:.2g} ({differing})")
    if test is not None and test.p > 1 - level + 1e-12:
        return Verdict(nothing, f"{out}, but McNemar's test has p = {test.p:.2g}")
    if better is None:
        verdict = "higher" if value > 0 else "lower"
    else:
        verdict = "better" if (value > 0) == (better == "higher") else "worse"
    tests = [f"the swap test has p = {swap.p:.2g}"] + ([] if test is None else [f"McNemar's p = {test.p:.2g}"])
    return Verdict(verdict, "; ".join([out, *tests]))
