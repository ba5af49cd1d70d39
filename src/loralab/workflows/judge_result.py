"""What the votes of a preference test come to: whose sittings count, the result file, and what a rater is shown.

Owns `preference.json`. The statistics are `evaluation/preference.py`'s.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.errors import JudgingError, StorageError
from loralab.evaluation.preference import (
    AIM_POWER,
    AIM_SHARE,
    DEFINITIONS,
    LEVEL,
    Vote,
    describe_agreement,
    describe_position,
    describe_tally,
    judge_preference,
    majority,
    tally,
    typical_seconds,
    wilson,
)
from loralab.judging.items import ItemSet
from loralab.judging.server import Reveal
from loralab.judging.votes import Choice, Votes
from loralab.progress import Reporter
from loralab.run import write_json
from loralab.workflows.judge import PreferenceTest

NAMES = ("the base model", "the adapter")


def named_votes(votes: Votes, items: ItemSet) -> dict[str, Vote]:
    """Return a rater's votes with names for sides, by item.

    Args:
        votes: of the rater.
        items: that were voted on.
    """
    sides = items.adapter_sides(votes.rater)
    return {item: _named(choice, sides[item]) for item, choice in votes.choices.items()}


def _named(choice: Choice, adapter_side: str) -> Vote:
    if choice in ("left", "right"):
        return "adapter" if choice == adapter_side else "base"
    return "both_bad" if choice == "both_bad" else "tie"


def write_result(test: PreferenceTest, reporter: Reporter) -> dict[str, Any]:
    """Compute the result of all closed sittings, write it to `preference.json`, and return it.

    A sitting with all pairs judged is closed here, since names are shown now; one that another process holds is not.

    Args:
        test: the test.
        reporter: told whose sitting is closed.

    Raises:
        JudgingError: nobody's sitting is closed.
        StorageError: the result cannot be written.
    """
    found = _close_finished(test, reporter)
    closed = [votes for votes in found if votes.closed and votes.choices]
    opened = [votes for votes in found if not votes.closed]
    if not closed and test.items.shown:
        raise _nobody(test, found)
    result = compute_result(test.items, closed, opened)
    try:
        write_json(test.place.preference, result)
    except OSError as error:
        raise StorageError(
            f"cannot write the result: {error.strerror or error}",
            where=str(test.place.preference),
            fix="make the folder writable",
        ) from None
    return result


def _close_finished(test: PreferenceTest, reporter: Reporter) -> list[Votes]:
    pairs = len(test.items.shown)
    for votes in test.folder.load_votes(test.items):
        if votes.closed or len(votes.choices) < pairs:
            continue
        try:
            with test.folder.open_sitting(test.items, votes.rater) as sitting:
                sitting.close()
        except JudgingError:  # the rater is still at it, and may change a choice
            continue
        reporter.say(f"all pairs of {votes.rater} are judged: the sitting is closed now, since names are shown")
    return test.folder.load_votes(test.items)


def _nobody(test: PreferenceTest, found: Sequence[Votes]) -> JudgingError:
    pairs = len(test.items.shown)
    where = str(test.folder.path)
    opened = [votes for votes in found if not votes.closed]
    if not found:
        return JudgingError("nobody has voted yet", where=where, fix="vote first: loralab judge RUN")
    if not opened:
        names = ", ".join(votes.rater for votes in found)
        return JudgingError(
            f"no vote counts: {names} closed the sitting without one",
            where=where,
            fix="somebody else may judge: loralab judge RUN --rater NAME",
        )
    names = ", ".join(f"{votes.rater} ({len(votes.choices)} of {pairs} pairs judged)" for votes in opened)
    return JudgingError(
        f"no sitting is closed, and only closed ones count; open: {names}",
        where=where,
        fix="finish one (loralab judge RUN --rater NAME), or close it as it is (--close NAME)",
    )


def compute_result(items: ItemSet, closed: Sequence[Votes], opened: Sequence[Votes] = ()) -> dict[str, Any]:
    """Return what votes come to, as `preference.json` holds it.

    Args:
        items: that were voted on.
        closed: votes that count.
        opened: votes of sittings that are still open; they are only named.
    """
    by_rater = {votes.rater: named_votes(votes, items) for votes in closed}
    rows = [_row(item, by_rater) for item in (each.as_dict() | {"same": each.same} for each in items.items)]
    verdicts = [row["verdict"] for row in rows if row["verdict"] is not None]
    same = sum(row["same"] for row in rows)
    counts = tally(verdicts)
    sides = [choice for votes in closed for choice in votes.choices.values()]
    return {
        "items": len(items.items),
        "judged": len(verdicts),
        "same": same,
        "not_judged": len(items.items) - len(verdicts),
        "votes": len(sides),
        **describe_tally(verdicts),
        **judge_preference(counts.adapter, counts.base),
        "aim": {"share": AIM_SHARE, "power": AIM_POWER},
        "raters": [_rater(votes, by_rater[votes.rater], items) for votes in closed],
        "open": [{"rater": votes.rater, "votes": len(votes.choices)} for votes in opened],
        "agreement": describe_agreement([by_rater[votes.rater] for votes in closed]),
        "position": describe_position(sides.count("left"), sides.count("right")),
        "level": LEVEL,
        "definitions": dict(DEFINITIONS),
        "split": items.split,
        "adapter_sha256": items.adapter_sha256,
        "comparison_sha256": items.comparison_sha256,
        "items_sha256": items.sha256,
        "rows": rows,
    }


def _row(item: Mapping[str, Any], by_rater: Mapping[str, Mapping[str, Vote]]) -> dict[str, Any]:
    votes = {rater: votes[item["item"]] for rater, votes in by_rater.items() if item["item"] in votes}
    verdict = "tie" if item["same"] else majority(list(votes.values())) if votes else None
    return {**item, "verdict": verdict, "votes": votes}


def _rater(votes: Votes, named: Mapping[str, Vote], items: ItemSet) -> dict[str, Any]:
    sides = list(votes.choices.values())
    return {
        "rater": votes.rater,
        "votes": len(sides),
        "not_judged": len(items.shown) - len(sides),
        **describe_tally(list(named.values())),
        "position": describe_position(sides.count("left"), sides.count("right")),
        "seconds_per_vote": typical_seconds(votes.seconds()),
    }


def reveal(test: PreferenceTest, rater: str) -> Reveal:
    """Return what a rater is shown behind the end of the sitting: the own votes, with names.

    Args:
        test: the test.
        rater: whose sitting is closed.

    Raises:
        JudgingError: it is not closed.
    """
    votes = next((each for each in test.folder.load_votes(test.items) if each.rater == rater), None)
    if votes is None or not votes.closed:
        raise JudgingError(
            f"the sitting of {rater!r} is not closed", where=str(test.folder.path), fix="finish it, or close it"
        )
    counts = tally(list(named_votes(votes, test.items).values()))
    return Reveal(
        names=NAMES,
        wins=(counts.base, counts.adapter),
        ties=counts.tie - counts.both_bad,
        both_bad=counts.both_bad,
        same_text=len(test.items.items) - len(test.items.shown),
        not_judged=len(test.items.shown) - len(votes.choices),
        reading=_reading(counts.adapter, counts.base),
        left={item: int(side == "left") for item, side in test.items.adapter_sides(rater).items()},
    )


def _reading(adapter: int, base: int) -> str:
    found = judge_preference(adapter, base)
    share = wilson(adapter, adapter + base)
    if share.value is None or share.low is None or share.high is None:
        return "You preferred neither answer in any pair."
    interval = f"95 % interval {100 * share.low:.0f} to {100 * share.high:.0f} %"
    return (
        f"Of the {adapter + base} pairs with a better answer, the adapter's was better in {adapter} "
        f"({100 * share.value:.0f} %; {interval}): {found['verdict']}."
    )
