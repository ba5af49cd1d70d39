"""What can be told of a curve against its own noise.

Owns estimates alone; what they mean for a run is `curves_reading.py`'s.
"""

import itertools
import math
import statistics
from collections.abc import Sequence

from loralab.reports.curves import Curve

# Of normal noise, one point in 16,000 lies so far off.
SURE = 4.0
FEWEST_FOR_NOISE = 5


def noise_of(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a curve around its own course, or None of fewer than five points.

    Second differences take a straight course out; of independent noise they have 6 times its variance. The larger
    of two estimates counts: their median, which a jump does not move, and their root mean square over the points
    without the largest, which no few equal values deceive.
    """
    if len(values) < FEWEST_FOR_NOISE:
        return None
    second = sorted(abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False))
    robust = statistics.median(second) / 0.6745
    rest = second[:-1]
    return max(robust, math.sqrt(sum(each * each for each in rest) / len(rest))) / math.sqrt(6)


def sure_change(values: Sequence[float]) -> float:
    """Return the change that noise does not make: four times it, more of few points, whose noise is told badly.

    With n points it is 4 (1 + 3 / (n - 2)) times the noise: 8 times with 5 points, 4.3 times with 40. It is 0 where
    noise cannot be told.
    """
    return SURE * (1 + 3 / max(len(values) - 2, 1)) * seen_noise(values)


def seen_noise(values: Sequence[float]) -> float:
    """Return the noise of a curve, 0 where it cannot be told."""
    return noise_of(values) or 0.0


def lowest(values: Sequence[float]) -> int:
    """Return the first place of the lowest value."""
    return min(range(len(values)), key=values.__getitem__)


def mostly_rising(values: Sequence[float], noise: float | None) -> bool:
    """Return whether a course rises: in each step where noise is unknown, else in most of its pairs.

    Source: Kendall 1938, A new measure of rank correlation (tau, here above 0.5).
    """
    pairs = list(itertools.combinations(values, 2))
    if noise is None or len(values) < 4:
        return all(a < b for a, b in itertools.pairwise(values))
    return sum((a < b) - (a > b) for a, b in pairs) > 0.5 * len(pairs)


def fell_after(train: Curve, since: float) -> bool:
    """Return whether the training loss fell after a step.

    The later half of what follows lies 1 % and three standard errors below as many points before it.
    """
    before = [value for step, value in zip(train.steps, train.values, strict=True) if step <= since]
    after = [value for step, value in zip(train.steps, train.values, strict=True) if step > since]
    late = after[len(after) // 2 :]
    near = before[-max(2, len(late)) :]
    if not near or not late:
        return False
    error = math.sqrt(sum(statistics.pvariance(part) / max(len(part) - 1, 1) for part in (near, late)))
    return statistics.mean(near) - statistics.mean(late) > max(3 * error, 0.01 * abs(statistics.mean(near)))


def chance(values: Sequence[float], best: float, rows: float | None) -> float:
    """Return what chance can do to a task figure.

    Args:
        values: its curve.
        best: its best value.
        rows: answers behind each, or None where unknown.
    """
    if rows and all(0 <= value <= 1 for value in values):
        share = statistics.mean(values)
        return 2.5 * math.sqrt(2 * share * (1 - share) / rows)
    return 0.1 * abs(best)
