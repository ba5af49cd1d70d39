"""What votes of a blind preference test allow to say: shares with intervals, tests, agreement, position bias.

Owns the statistics and the rule of the verdict. Knows neither files nor texts: votes come as words. No torch, and no
scipy, so that a result is there at once.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, median
from typing import Any, Literal, get_args

# Of whom the better answer is; neither is a tie, of which `both_bad` is a kind.
Vote = Literal["adapter", "base", "tie", "both_bad"]
VOTES: tuple[Vote, ...] = get_args(Vote)
LEVEL = 0.95
# What such tests usually aim at, and the chance to see it that a test should give.
AIM_SHARE = 0.6
AIM_POWER = 0.8

DEFINITIONS = {
    "verdict of an item": (
        "what more than half of its raters chose; a tie where there is no such choice. Items, not votes, are counted: "
        "raters of one item do not judge independently"
    ),
    "tie": "no answer is better; both bad is a kind of tie; an item with the same text twice is one, and never shown",
    "share": "items for the adapter / (items for the adapter + items for the base), Wilson's interval",
    "share_with_ties": "the same over all judged items, a tie counting one half, Bonett and Price's interval",
    "sign_test_p": "exact two-sided p-value of both being preferred equally often, ties left out",
    "verdict": "a preference is seen where the share's interval leaves out 50 % and the sign test's p is at most 0.05",
    "agreement": "over items that all raters judged: the share of pairs of raters with the same vote, and kappa; both "
    "bad counts as a tie",
    "position": "share of left among the votes for a side; sides are drawn anew for every rater and item",
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share or kappa with its interval; None where there is none.

    Attributes:
        value: the figure.
        low: lower end.
        high: upper end.
    """

    value: float | None
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Return the fields by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Tally:
    """How often each was chosen.

    Attributes:
        adapter: the adapter's answer was better.
        base: the base's answer was better.
        tie: neither was, both bad among them.
        both_bad: both were bad.
    """

    adapter: int
    base: int
    tie: int
    both_bad: int

    @property
    def decided(self) -> int:
        """How many have a better answer."""
        return self.adapter + self.base


def tally(votes: Sequence[Vote]) -> Tally:
    """Count votes, or verdicts of items.

    Args:
        votes: any number of them.
    """
    counts = Counter(votes)
    return Tally(counts["adapter"], counts["base"], counts["tie"] + counts["both_bad"], counts["both_bad"])


def majority(votes: Sequence[Vote]) -> Vote:
    """Return the verdict of an item: what more than half of its raters chose, else a tie.

    Args:
        votes: of its raters, at least one.
    """
    found = tally(votes)
    counts: dict[Vote, int] = {"adapter": found.adapter, "base": found.base, "both_bad": found.both_bad}
    return next((vote for vote, count in counts.items() if 2 * count > len(votes)), "tie")


def wilson(count: int, total: int) -> Estimate:
    """Return a share with its 95 % score interval.

    Args:
        count: how many of them.
        total: how many there are.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if not total:
        return Estimate(None, None, None)
    z = _quantile(LEVEL)
    share, extra = count / total, z * z / total
    centre = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / total + extra / (4 * total))
    low, high = (0.0 if not count else centre - half), (1.0 if count == total else centre + half)
    return Estimate(share, low, high)


def share_with_ties(found: Tally) -> Estimate:
    """Return the adapter's share with every tie as one half, and its 95 % interval.

    The share is (1 + d) / 2, where d is the difference of the shares of adapter and base, which are paired.

    Args:
        found: of items or votes.

    Source: Bonett and Price 2012, Adjusted Wald confidence interval for a difference of binomial proportions based
    on paired data.
    """
    total = found.decided + found.tie
    if not total:
        return Estimate(None, None, None)
    wins, losses = ((count + 1) / (total + 2) for count in (found.adapter, found.base))
    centre = wins - losses
    half = _quantile(LEVEL) * math.sqrt((wins + losses - centre * centre) / (total + 2))
    value = (1 + (found.adapter - found.base) / total) / 2
    return Estimate(value, max((1 + centre - half) / 2, 0.0), min((1 + centre + half) / 2, 1.0))


def sign_test(one: int, other: int) -> float:
    """Return the exact two-sided p-value of both being equally likely; 1 where there is nothing to compare.

    Args:
        one: how often the one.
        other: how often the other.

    Source: Dixon and Mood 1946, The statistical sign test.
    """
    total = one + other
    tail = sum(math.comb(total, count) for count in range(max(one, other), total + 1))
    return min(1.0, float(2 * tail / 2**total))


def votes_needed(share: float = AIM_SHARE, power: float = AIM_POWER) -> int:
    """Return the number of decided votes from which on a preference is seen with a given chance, whatever more come.

    Exact: from binomial probabilities, under the verdict's own rule. The chance goes up and down a little with the
    number, so the last number with too small a chance counts.

    Args:
        share: true share of one side, above one half.
        power: the chance.
    """
    return _votes_needed(share, power)


@cache
def _votes_needed(share: float, power: float) -> int:
    z = _quantile(LEVEL) + _quantile(2 * power - 1)
    most = 50 + math.ceil(2 * (z / (2 * share - 1)) ** 2)  # twice the normal approximation
    return max((total for total in range(1, most) if _power(share, total) < power), default=0) + 1


def _power(share: float, total: int) -> float:
    """Return the chance that the sign test of `total` votes has p <= 5 %."""
    seen = total + 1  # the least count with which it has
    tail = 0.0
    while seen and 2 * (tail + _binomial(seen - 1, total, 0.5)) <= 1 - LEVEL:
        seen -= 1
        tail += _binomial(seen, total, 0.5)
    return sum(
        _binomial(count, total, share) + _binomial(total - count, total, share) for count in range(seen, total + 1)
    )


def _binomial(count: int, total: int, share: float) -> float:
    if count > total:
        return 0.0
    ways = math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1)
    return math.exp(ways + count * math.log(share) + (total - count) * math.log1p(-share))


@cache
def _quantile(level: float) -> float:
    """Return how many standard deviations hold a share `level` of a normal distribution, to both sides."""
    return NormalDist().inv_cdf((1 + level) / 2)


def cohen_kappa(one: Sequence[Vote], other: Sequence[Vote]) -> Estimate:
    """Return the agreement of two raters beyond chance, with its large-sample 95 % interval.

    Args:
        one: votes of one rater (items).
        other: votes of the other, on the same items (items).

    Returns:
        Kappa; none where both always chose the same one thing, and no interval where they always agreed.

    Source: Cohen 1960, A coefficient of agreement for nominal scales; Fleiss, Cohen and Everitt 1969, Large sample
    standard errors of kappa and weighted kappa, equation 13.
    """
    count = len(one)
    joint = Counter(zip(map(_category, one), map(_category, other), strict=True))
    rows, columns = Counter(map(_category, one)), Counter(map(_category, other))
    names = ("adapter", "base", "tie")
    cells = {(row, column): joint[row, column] / count for row in names for column in names} if count else {}
    chance = sum(rows[name] * columns[name] for name in names) / max(count, 1) ** 2
    if not count or chance >= 1:
        return Estimate(None, None, None)
    kappa = (sum(cells[name, name] for name in names) - chance) / (1 - chance)
    variance = -((kappa - chance * (1 - kappa)) ** 2)
    for (row, column), cell in cells.items():
        if row == column:
            variance += cell * (1 - (rows[row] + columns[row]) / count * (1 - kappa)) ** 2
        else:
            variance += cell * (1 - kappa) ** 2 * ((columns[row] + rows[column]) / count) ** 2
    half = _quantile(LEVEL) * math.sqrt(max(variance, 0.0) / count) / (1 - chance)
    if half < 1e-9:
        return Estimate(kappa, None, None)
    return Estimate(kappa, max(kappa - half, -1.0), min(kappa + half, 1.0))


def fleiss_kappa(items: Sequence[Sequence[Vote]]) -> float | None:
    """Return the agreement of several raters beyond chance; None where all votes are the same.

    Args:
        items: votes of the same number of raters on each item (items, raters), at least two raters.

    Source: Fleiss 1971, Measuring nominal scale agreement among many raters.
    """
    if not items:
        return None
    totals = Counter(_category(vote) for votes in items for vote in votes)
    count = sum(totals.values())
    chance = sum((each / count) ** 2 for each in totals.values())
    return None if chance >= 1 else (pair_agreement(items) - chance) / (1 - chance)


def pair_agreement(items: Sequence[Sequence[Vote]]) -> float:
    """Return the share of pairs of raters, over all items, that voted the same.

    Args:
        items: votes of at least two raters on each item (items, raters), at least one item.
    """
    shares = []
    for votes in items:
        counts = Counter(map(_category, votes)).values()
        shares.append(sum(each * (each - 1) for each in counts) / (len(votes) * (len(votes) - 1)))
    return sum(shares) / len(shares)


def _category(vote: Vote) -> str:
    return "tie" if vote == "both_bad" else vote


def describe_agreement(raters: Sequence[Mapping[str, Vote]]) -> dict[str, Any] | None:
    """Return how far raters agree on the items that all of them judged; None with a single rater.

    Args:
        raters: votes of each rater, by item.

    Returns:
        `raters`, `items`, `agreement`, `kappa` with `low` and `high` (of two raters only), and `method`.
    """
    if len(raters) < 2:
        return None
    common = [item for item in raters[0] if all(item in votes for votes in raters)]
    votes = [[rater[item] for rater in raters] for item in common]
    kappa = Estimate(None, None, None)
    if len(raters) == 2:
        kappa = cohen_kappa([each[0] for each in votes], [each[1] for each in votes])
    elif votes:
        kappa = Estimate(fleiss_kappa(votes), None, None)
    return {
        "raters": len(raters),
        "items": len(common),
        "agreement": pair_agreement(votes) if votes else None,
        "kappa": kappa.value,
        "low": kappa.low,
        "high": kappa.high,
        "method": "Cohen's kappa" if len(raters) == 2 else "Fleiss' kappa",
    }


def describe_position(left: int, right: int) -> dict[str, Any]:
    """Return whether a side was preferred for being that side.

    Args:
        left: votes for the left answer.
        right: votes for the right answer.

    Returns:
        `left`, `right`, `share` with `low` and `high`, `p`, and `biased`: whether p < 0.05.
    """
    share = wilson(left, left + right)
    p = sign_test(left, right)
    return {
        "left": left,
        "right": right,
        "share": share.value,
        "low": share.low,
        "high": share.high,
        "p": p,
        "biased": p < 1 - LEVEL,
    }


def describe_tally(votes: Sequence[Vote]) -> dict[str, Any]:
    """Return counts, both shares with intervals and the sign test of votes, or of verdicts of items.

    Args:
        votes: any number of them.
    """
    found = tally(votes)
    return {
        **dataclasses.asdict(found),
        "decided": found.decided,
        "share": wilson(found.adapter, found.decided).as_dict(),
        "share_with_ties": share_with_ties(found).as_dict(),
        "sign_test_p": sign_test(found.adapter, found.base),
    }


def judge_preference(adapter: int, base: int) -> dict[str, Any]:
    """Say what decided items allow to say, by the most careful of what was measured.

    Args:
        adapter: items for the adapter.
        base: items for the base.

    Returns:
        `verdict`, `reason`, and `decided_needed`: how many decided items it would take to see `AIM_SHARE` with
        `AIM_POWER`, or None where a preference was seen.
    """
    decided = adapter + base
    nothing = {
        "verdict": f"no difference seen at n = {decided} decided item{'' if decided == 1 else 's'}",
        "decided_needed": votes_needed(),
    }
    share, p = wilson(adapter, decided), sign_test(adapter, base)
    if share.low is None or share.high is None:
        return {**nothing, "reason": "there is no interval: no answer was better than the other"}
    if share.low <= 0.5 <= share.high:
        return {**nothing, "reason": f"the interval holds 50 %; the sign test has {_p(p)}"}
    out = "the interval leaves out 50 %"
    if p > 1 - LEVEL + 1e-12:
        return {**nothing, "reason": f"{out}, but the sign test has {_p(p)}"}
    verdict = "adapter preferred" if adapter > base else "base preferred"
    return {"verdict": verdict, "decided_needed": None, "reason": f"{out}; the sign test has {_p(p)}"}


def _p(p: float) -> str:
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def typical_seconds(seconds: Sequence[float]) -> float | None:
    """Return the median time of a choice, in seconds; None where nobody measured.

    Args:
        seconds: of each choice that was measured.
    """
    return median(seconds) if seconds else None
