"""Two models' rows exchanged at random: how often chance alone makes a difference as large as the one seen.

Owns the swap test. It rests on the rows that touch a figure, however few, and on no shape of their
distribution, which an interval from few rows or rows of very different weight does.

Source: Fisher 1935, The Design of Experiments, ch. 3 (exchanging the members of pairs); Yeh 2000, More accurate
tests for the statistical significance of result differences (for F1 and the like); Phipson & Smyth 2010,
Permutation P-values Should Never Be Zero (p of random swaps).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loralab.evaluation.metrics.intervals import FloatArray, affordable_resamples

# Differing rows up to which every swap is tried: 2^11 of them, since exchanging all rows turns the sign alone.
_EXACT_ROWS = 12
# Fewer random swaps could not tell a p of 0.05 from one of 0.03.
_LEAST = 1000
# Choices held at a time, 8 bytes each, a few times.
_HELD = 2_000_000


@dataclass(frozen=True, slots=True)
class SwapTest:
    """What a swap test found for one figure.

    Attributes:
        p: two-sided p-value of the two models being interchangeable on every row.
        differing: rows on which the two differ in anything that the figure's metric adds up.
        method: how it came about.
    """

    p: float
    differing: int
    method: str

    def as_dict(self) -> dict[str, Any]:
        """Return p and method as the entry of a difference has them."""
        return {"swap_p": self.p, "swap_method": self.method}


def swap_test(
    ours: FloatArray,
    theirs: FloatArray,
    figures: Callable[[FloatArray], Mapping[str, FloatArray]],
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, SwapTest]:
    """Test for each figure whether the sides of the rows may as well be exchanged.

    Each row's sums change sides or do not, both figures are computed again, and those exchanges are counted whose
    difference is as large as the one seen, in either direction. One without a figure counts as large.

    Args:
        ours: what each row adds with the one model, finite (units, k).
        theirs: what the same rows add with the other (units, k).
        figures: from totals (..., k) to each figure (...).
        resamples: swaps tried where the differing rows are too many to try all; at least 1000 are.
        seed: of the swaps.

    Returns:
        By figure.
    """
    differ = (ours != theirs).any(axis=1)
    rows = int(differ.sum())
    exact = rows <= _EXACT_ROWS
    count = 2 ** max(rows - 1, 0) if exact else affordable_resamples(rows, max(resamples, _LEAST))
    choices = _every_swap(rows) if exact else _random_swaps(rows, count, seed=seed)
    mine, other = ours[differ], theirs[differ]
    sides, rest = np.concatenate([mine, other], axis=1), np.tile(ours[~differ].sum(axis=0), 2)
    # Sums of the rows on each side, not one side and the change: what is never negative stays so.
    back = np.concatenate([other, mine], axis=1)
    sums = np.concatenate([swapped @ back + (1 - swapped) @ sides for swapped in choices]) + rest
    with np.errstate(invalid="ignore"):  # infinite on both sides: no number, counted as large
        first, second = map(figures, np.split(sums, 2, axis=1))
        seen = [figures(side) for side in np.split(sides.sum(axis=0) + rest, 2)]
        large = {name: _as_large(first[name] - second[name], seen[0][name], seen[1][name]) for name in first}
    kind = "exact test of all" if exact else f"{count} random"
    method = f"{kind} swaps of {rows} differing row{'' if rows == 1 else 's'}"
    return {
        name: SwapTest(hits / count if exact else (hits + 1) / (count + 1), rows, method)
        for name, hits in large.items()
    }


def _as_large(drawn: FloatArray, first: FloatArray, second: FloatArray) -> int:
    """Return how many differences are as large as `first - second`, but for rounding."""
    seen = np.abs(first - second)
    slack = 1e-9 * seen + 1e-12 * np.maximum(np.abs(first), np.abs(second))
    return int((~(np.abs(drawn) < seen - slack)).sum())


def _every_swap(rows: int) -> Iterator[FloatArray]:
    """Yield all choices of rows to swap, but for those that are another one's opposite (2^(rows - 1), rows)."""
    numbers = np.arange(2 ** max(rows - 1, 0))
    yield ((numbers[:, None] >> np.arange(rows)) & 1).astype(np.float64)


def _random_swaps(rows: int, count: int, *, seed: int) -> Iterator[FloatArray]:
    rng = np.random.default_rng(seed)
    chunk = max(1, _HELD // rows)
    for start in range(0, count, chunk):
        yield rng.integers(0, 2, size=(min(chunk, count - start), rows), dtype=np.int8).astype(np.float64)
