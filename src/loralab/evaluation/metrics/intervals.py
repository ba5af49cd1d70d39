"""Confidence intervals: rows drawn again for figures made of sums, Wilson's for plain shares.

Owns how rows are drawn and what an interval says of itself.

Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile interval);
Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference (score interval).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

# Not `evaluation.perplexity`'s, which draws its interval here.
FloatArray = npt.NDArray[np.float64]
# Drawn row numbers held at a time, 8 bytes each, twice.
_HELD = 2_000_000
# Drawn row numbers in all: some seconds. Beyond it there are fewer resamples, which matter little for that many rows.
_DRAWN = 500_000_000
_LEAST = 200


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval.

    Attributes:
        low: lower bound, or None where there is none.
        high: upper bound, or None where there is none.
        method: how it came about, or why there is none.
    """

    low: float | None
    high: float | None
    method: str


def affordable_resamples(rows: int, resamples: int) -> int:
    """Return how many resamples are drawn of that many rows: those asked for, or fewer above 100,000 rows or so."""
    return min(resamples, max(_LEAST, _DRAWN // max(rows, 1)))


def describe_resamples(rows: int, resamples: int) -> tuple[int, str]:
    """Return how many resamples are drawn, and how, in words; 0 and why where none can be.

    Args:
        rows: there are.
        resamples: asked for.
    """
    if rows < 2:
        return 0, "none: one row leaves nothing to resample"
    if resamples < 1:
        return 0, "none: not asked for"
    count = affordable_resamples(rows, resamples)
    fewer = "" if count == resamples else f" ({resamples} asked for)"
    return count, f"percentile bootstrap over {rows} rows, {count} resamples{fewer}"


def resample_sums(statistics: FloatArray, *, resamples: int, seed: int) -> FloatArray:
    """Draw rows with replacement and add them up.

    The same number of rows, resamples and the same seed draw the same rows, so sides can be paired.

    Args:
        statistics: what each row adds (units, k).
        resamples: how often as many rows as there are are drawn.
        seed: of the draws.

    Returns:
        Sums over the drawn rows (resamples, k).
    """
    units = len(statistics)
    rng = np.random.default_rng(seed)
    chunk = max(1, _HELD // units)
    sums = np.empty((resamples, statistics.shape[1]))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(0, units, size=(size, units)) + np.arange(size)[:, None] * units
        times = np.bincount(drawn.ravel(), minlength=size * units).reshape(size, units)
        sums[start : start + size] = times.astype(np.float64) @ statistics
    return sums


def percentile_interval(value: float, drawn: FloatArray, *, level: float, method: str) -> Interval:
    """Return the percentile interval of a figure, stretched to its value where that lies outside.

    Args:
        value: the figure itself.
        drawn: the figure of each resample, nan where it is not defined (resamples).
        level: confidence level.
        method: how the resamples were drawn, in words.
    """
    if not np.isfinite(value):
        return Interval(None, None, "none: the figure is not finite")
    defined = drawn[~np.isnan(drawn)]
    if len(defined) < 0.5 * len(drawn) or not len(defined):
        return Interval(None, None, f"none: not defined in {len(drawn) - len(defined)} of {len(drawn)} resamples")
    if not np.isfinite(defined).all():
        return Interval(None, None, "none: not finite in some resamples")
    if len(defined) < len(drawn):
        method += f", {len(drawn) - len(defined)} of them without this figure"
    low, high = (float(bound) for bound in np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]))
    if defined.min() == defined.max():
        method += ", the same in all of them"
    if not low <= value <= high:
        # A figure like the calibration error is larger in resamples than in the rows themselves.
        slack = 1e-9 * max(abs(value), abs(low), abs(high))
        if not low - slack <= value <= high + slack:
            method += ", stretched to the value since resamples are biased"
        low, high = min(low, value), max(high, value)
    return Interval(low, high, method)


def ratio_intervals(
    above: FloatArray, below: FloatArray, *, resamples: int, level: float, seed: int = 0
) -> list[Interval]:
    """Return the interval of each column's sum divided by the sum of `below`.

    Args:
        above: what each row adds to each column (units, k); a column that is not finite has no interval.
        below: what each row adds to the divisor (units).
        resamples: bootstrap resamples.
        level: confidence level.
        seed: of the resamples.
    """
    count, method = describe_resamples(len(below), resamples)
    if not count:
        return [Interval(None, None, method)] * above.shape[1]
    # Not drawn is 0 times infinity, which is no number; those columns get none below.
    rows = np.concatenate([np.where(np.isfinite(above), above, 0.0), below[:, None]], axis=1)
    sums = resample_sums(rows, resamples=count, seed=seed)
    drawn = np.full((count, above.shape[1]), np.nan)
    np.divide(sums[:, :-1], sums[:, -1:], out=drawn, where=sums[:, -1:] > 0)
    values = above.sum(axis=0) / max(float(below.sum()), 1.0)
    pairs = zip(values.tolist(), drawn.T, strict=True)
    return [percentile_interval(value, each, level=level, method=method) for value, each in pairs]


def wilson_interval(value: float, count: int, *, level: float) -> Interval:
    """Return Wilson's interval of a share.

    Args:
        value: the share, 0 to 1.
        count: how many answers it is a share of; at least one.
        level: confidence level.
    """
    found = stats.binomtest(round(value * count), count).proportion_ci(level, method="wilson")
    # At a share of 0 or 1 the bound is the share itself but for rounding.
    return Interval(min(float(found.low), value), max(float(found.high), value), "Wilson")
