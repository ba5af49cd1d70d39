"""The statistics of a preference test, held against other libraries, closed forms and 1,000 simulated sessions."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from loralab.evaluation.metrics.intervals import wilson_interval
from loralab.evaluation.preference import (
    VOTES,
    Estimate,
    Tally,
    Vote,
    cohen_kappa,
    describe_agreement,
    describe_position,
    describe_tally,
    fleiss_kappa,
    judge_preference,
    majority,
    pair_agreement,
    share_with_ties,
    sign_test,
    tally,
    typical_seconds,
    votes_needed,
    wilson,
)

SESSIONS = 1000
# Few votes have few possible intervals, so what they hold is a little beside 95 %.
COVERAGE = (0.93, 0.985)


@pytest.mark.parametrize("total", [1, 2, 7, 20, 51, 300])
def test_wilson_and_sign_test_are_those_of_scipy(total: int) -> None:
    for count in range(total + 1):
        found, other = wilson(count, total), stats.binomtest(count, total)
        low, high = other.proportion_ci(method="wilson")
        assert [found.low, found.high] == pytest.approx([low, high], abs=1e-12)
        assert sign_test(count, total - count) == pytest.approx(other.pvalue, rel=1e-9)
        metric = wilson_interval(count / total, total, level=0.95)
        assert [found.low, found.high] == pytest.approx([metric.low, metric.high], abs=1e-12)


def test_nothing_gives_no_share_and_no_evidence() -> None:
    assert wilson(0, 0).as_dict() == {"value": None, "low": None, "high": None}
    assert share_with_ties(Tally(0, 0, 0, 0)).value is None
    assert sign_test(0, 0) == 1
    assert typical_seconds([]) is None


def test_share_with_ties_by_hand() -> None:
    found = share_with_ties(Tally(adapter=12, base=5, tie=13, both_bad=4))
    wins, losses, total = 13 / 32, 6 / 32, 32
    half = stats.norm.ppf(0.975) * math.sqrt((wins + losses - (wins - losses) ** 2) / total)
    assert found.value == pytest.approx((12 + 13 / 2) / 30)
    assert found.low == pytest.approx((1 + wins - losses - half) / 2)
    assert found.high == pytest.approx((1 + wins - losses + half) / 2)
    only_ties = share_with_ties(Tally(0, 0, 30, 0))
    assert only_ties.low is not None
    assert only_ties.low < 0.5 == only_ties.value


def test_tally_counts_both_bad_as_a_kind_of_tie() -> None:
    found = tally(["adapter", "both_bad", "tie", "base", "adapter"])
    assert (found.adapter, found.base, found.tie, found.both_bad, found.decided) == (2, 1, 2, 1, 3)


@pytest.mark.parametrize(
    ("votes", "verdict"),
    [
        (["adapter"], "adapter"),
        (["both_bad"], "both_bad"),
        (["adapter", "base"], "tie"),
        (["adapter", "tie"], "tie"),
        (["adapter", "adapter", "base"], "adapter"),
        (["adapter", "base", "tie"], "tie"),
        (["base", "base", "tie", "tie"], "tie"),
        (["both_bad", "both_bad", "tie"], "both_bad"),
        (["both_bad", "tie"], "tie"),
    ],
)
def test_majority_is_more_than_half(votes: list[Vote], verdict: Vote) -> None:
    assert majority(votes) == verdict
    mirrored: dict[Vote, Vote] = {"adapter": "base", "base": "adapter", "tie": "tie", "both_bad": "both_bad"}
    assert majority([mirrored[vote] for vote in votes]) == mirrored[verdict]


def _power(share: float, total: int) -> float:
    seen = [count for count in range(total + 1) if stats.binomtest(count, total).pvalue <= 0.05]
    return float(stats.binom.pmf(seen, total, share).sum())


@pytest.mark.parametrize(("share", "power"), [(0.6, 0.8), (0.75, 0.8), (0.9, 0.9)])
def test_votes_needed_is_where_the_exact_power_stays(share: float, power: float) -> None:
    needed = votes_needed(share, power)
    assert _power(share, needed - 1) < power
    assert all(_power(share, total) >= power for total in range(needed, needed + 12))


def test_votes_needed_is_enough_for_the_verdict_itself() -> None:
    rng = np.random.default_rng(0)
    counts = rng.binomial(votes_needed(), 0.6, 2000)
    verdicts = [judge_preference(int(count), votes_needed() - int(count))["verdict"] for count in counts]
    assert 0.77 <= verdicts.count("adapter preferred") / 2000 <= 0.84


@pytest.mark.parametrize(
    ("adapter", "base", "verdict", "reason"),
    [
        (15, 3, "adapter preferred", "the interval leaves out 50 %; the sign test has p = 0.0075"),
        (3, 15, "base preferred", "the interval leaves out 50 %; the sign test has p = 0.0075"),
        (7, 5, "no difference seen at n = 12 decided items", "the interval holds 50 %; the sign test has p = 0.77"),
        (5, 0, "no difference seen at n = 5 decided items", "leaves out 50 %, but the sign test has p = 0.062"),
        (1, 0, "no difference seen at n = 1 decided item", "the interval holds 50 %"),
        (0, 0, "no difference seen at n = 0 decided items", "no answer was better"),
    ],
)
def test_verdict_needs_interval_and_test(adapter: int, base: int, verdict: str, reason: str) -> None:
    found = judge_preference(adapter, base)
    assert found["verdict"] == verdict
    assert reason in found["reason"]
    assert found["decided_needed"] == (None if "preferred" in verdict else votes_needed())


def _draw(rng: random.Random, count: int) -> list[Vote]:
    return rng.choices(VOTES, weights=[4, 2, 3, 1], k=count)


def _merged(votes: Sequence[Vote]) -> list[str]:
    return ["tie" if vote == "both_bad" else vote for vote in votes]


@pytest.mark.parametrize("seed", range(20))
def test_cohen_kappa_is_that_of_scikit_learn(seed: int) -> None:
    rng = random.Random(seed)
    one = _draw(rng, 30)
    other = [vote if rng.random() < 0.6 else rng.choice(VOTES) for vote in one]
    found = cohen_kappa(one, other)
    assert found.value == pytest.approx(cohen_kappa_score(_merged(one), _merged(other)))
    assert found.low is not None
    assert found.high is not None
    assert -1 <= found.low < found.value < found.high <= 1  # type: ignore[operator]


def test_interval_of_kappa_is_the_published_one() -> None:
    # Fleiss, Cohen and Everitt 1969, table 1, without weights: kappa 0.429, standard error 0.0537 (n = 200).
    table = {("a", "a"): 106, ("a", "b"): 10, ("a", "c"): 4, ("b", "a"): 22, ("b", "b"): 28, ("b", "c"): 10}
    table |= {("c", "a"): 2, ("c", "b"): 12, ("c", "c"): 6}
    names: dict[str, Vote] = {"a": "adapter", "b": "base", "c": "tie"}
    pairs = [(names[row], names[column]) for (row, column), count in table.items() for _ in range(count)]
    found = cohen_kappa([row for row, _ in pairs], [column for _, column in pairs])
    assert found.value == pytest.approx(0.429, abs=5e-4)
    assert found.high is not None
    assert (found.high - 0.4286) / stats.norm.ppf(0.975) == pytest.approx(0.0537, abs=5e-4)


def test_kappa_without_chance_or_doubt() -> None:
    always: list[Vote] = ["adapter"] * 5
    assert cohen_kappa(always, always).value is None
    assert cohen_kappa([], []).value is None
    both: list[Vote] = ["adapter", "base", "tie"]
    assert cohen_kappa(both, both).as_dict() == {"value": 1.0, "low": None, "high": None}
    assert fleiss_kappa([always]) is None
    assert fleiss_kappa([]) is None


def test_fleiss_kappa_of_two_raters_is_scotts_pi() -> None:
    rng = random.Random(3)
    items = [(_draw(rng, 2)) for _ in range(40)]
    shares = [sum(_merged(votes).count(name) for votes in items) / 80 for name in ("adapter", "base", "tie")]
    chance = sum(share**2 for share in shares)
    agreement = sum(len(set(_merged(votes))) == 1 for votes in items) / 40
    assert pair_agreement(items) == pytest.approx(agreement)
    assert fleiss_kappa(items) == pytest.approx((agreement - chance) / (1 - chance))


def test_fleiss_kappa_by_hand() -> None:
    items: list[list[Vote]] = [["adapter"] * 3, ["adapter", "adapter", "base"], ["tie", "both_bad", "base"]]
    # Pairs that agree: 3 of 3, 1 of 3, 1 of 3; shares 5/9, 2/9, 2/9.
    observed, chance = 5 / 9, (25 + 4 + 4) / 81
    assert fleiss_kappa(items) == pytest.approx((observed - chance) / (1 - chance))


def test_agreement_is_over_items_that_all_saw() -> None:
    first: dict[str, Vote] = {"1": "adapter", "2": "base", "3": "tie"}
    second: dict[str, Vote] = {"3": "both_bad", "2": "adapter", "4": "base"}
    assert describe_agreement([first]) is None
    found = describe_agreement([first, second])
    assert found is not None
    assert (found["items"], found["agreement"], found["method"]) == (2, 0.5, "Cohen's kappa")
    three = describe_agreement([first, second, {"9": "tie"}])
    assert three == {
        "raters": 3,
        "items": 0,
        "agreement": None,
        "kappa": None,
        "low": None,
        "high": None,
        "method": "Fleiss' kappa",
    }


@pytest.mark.parametrize("share", [0.5, 0.6, 0.8])
@pytest.mark.parametrize("total", [20, 50])
def test_intervals_hold_the_truth_as_often_as_they_say(share: float, total: int) -> None:
    holding = [count for count in range(total + 1) if _holds(wilson(count, total), share)]
    chance = float(stats.binom.pmf(holding, total, share).sum())
    assert COVERAGE[0] <= chance <= COVERAGE[1]
    drawn = np.random.default_rng(round(1000 * share) + total).binomial(total, share, SESSIONS)
    assert np.isin(drawn, holding).mean() == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / SESSIONS))


def _holds(found: Estimate, truth: float) -> bool:
    return found.low is not None and found.high is not None and found.low <= truth <= found.high


@pytest.mark.parametrize("share", [0.5, 0.6, 0.8])
@pytest.mark.parametrize("total", [20, 50])
@pytest.mark.parametrize("ties", [0.1, 0.3, 0.6])
def test_intervals_with_ties_hold_the_truth_as_often_as_they_say(share: float, total: int, ties: float) -> None:
    rng = np.random.default_rng(round(1000 * share + 100 * ties) + total)
    chances = [(1 - ties) * share, (1 - ties) * (1 - share), ties]
    truth = chances[0] + ties / 2
    sessions = rng.multinomial(total, chances, SESSIONS).tolist()
    held = sum(_holds(share_with_ties(Tally(wins, losses, tie, 0)), truth) for wins, losses, tie in sessions)
    assert COVERAGE[0] <= held / SESSIONS <= 0.99


def test_items_not_votes_are_counted_since_votes_on_one_item_go_together() -> None:
    rng = np.random.default_rng(2)
    items, raters = 40, 5
    chances = np.where(rng.random((SESSIONS, items)) < 0.6, 0.9, 0.1)  # most items have one answer that is better
    votes = rng.random((SESSIONS, raters, items)) < chances[:, None, :]
    names = np.where(votes, "adapter", "base").tolist()
    by_item = [tally([majority(list(each)) for each in zip(*session, strict=True)]) for session in names]
    wins = float(0.6 * stats.binom.sf(2, raters, 0.9) + 0.4 * stats.binom.sf(2, raters, 0.1))
    held = sum(_holds(wilson(found.adapter, found.decided), wins) for found in by_item) / SESSIONS
    naive = sum(_holds(wilson(int(session.sum()), items * raters), 0.58) for session in votes) / SESSIONS
    assert COVERAGE[0] - 0.01 <= held <= COVERAGE[1]
    assert naive < 0.85


def test_no_preference_is_seen_in_few_sessions_without_one() -> None:
    rng = np.random.default_rng(1)
    counts = rng.binomial(40, 0.5, SESSIONS)
    seen = sum("preferred" in judge_preference(int(count), 40 - int(count))["verdict"] for count in counts)
    assert seen / SESSIONS <= 0.06


def _session(rng: random.Random, *, left: float, share: float, count: int) -> tuple[int, int]:
    """Return votes for left and for the adapter of a rater who in half of the pairs goes by position alone."""
    lefts = adapters = 0
    for _ in range(count):
        adapter_left = rng.random() < 0.5
        by_position = rng.random() < 0.5
        chose_left = rng.random() < left if by_position else (rng.random() < share) == adapter_left
        lefts += chose_left
        adapters += chose_left == adapter_left
    return lefts, adapters


def test_habit_of_position_is_seen_and_nobody_is_accused_of_it() -> None:
    rng = random.Random(7)
    count = 40
    biased = [rng.choices([0, 1], [1, 3], k=count) for _ in range(SESSIONS)]  # 75 % left, whatever it shows
    fair = [rng.choices([0, 1], k=count) for _ in range(SESSIONS)]
    found, accused = (
        sum(describe_position(sum(votes), count - sum(votes))["biased"] for votes in sessions) / SESSIONS
        for sessions in (biased, fair)
    )
    assert found >= 0.85
    assert accused <= 0.055


def test_habit_of_position_does_not_move_the_share() -> None:
    rng = random.Random(11)
    count, share = 40, 0.7
    fair, biased = (
        [_session(rng, left=left, share=share, count=count)[1] / count for _ in range(SESSIONS)] for left in (0.5, 1.0)
    )
    noise = math.sqrt(0.6 * 0.4 / count / SESSIONS)  # half of the votes say 0.7, the other half nothing: 0.6
    assert np.mean(fair) == pytest.approx(0.6, abs=4 * noise)
    assert np.mean(biased) == pytest.approx(0.6, abs=4 * noise)


def test_figures_of_a_tally_and_of_positions() -> None:
    votes: list[Vote] = ["adapter", "adapter", "adapter", "adapter", "adapter", "adapter", "base", "base"]
    found = describe_tally([*votes, "tie", "both_bad"])
    assert {name: found[name] for name in ("adapter", "base", "tie", "both_bad", "decided")} == {
        "adapter": 6,
        "base": 2,
        "tie": 2,
        "both_bad": 1,
        "decided": 8,
    }
    assert found["share"]["value"] == 0.75
    assert found["share_with_ties"]["value"] == 0.7
    assert found["sign_test_p"] == sign_test(6, 2)
    assert describe_position(9, 1) == {
        "left": 9,
        "right": 1,
        "share": 0.9,
        "low": pytest.approx(wilson(9, 10).low),
        "high": pytest.approx(wilson(9, 10).high),
        "p": sign_test(9, 1),
        "biased": True,
    }
    assert typical_seconds([3.0, 1.0, 10.0]) == 3.0
