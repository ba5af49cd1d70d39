"""What a blind preference test came to, in words: for the terminal, a run's page and its model card.

Owns the sentences and the choice of figures from `preference.json`. Nothing is judged again here.
"""

from collections.abc import Mapping
from typing import Any

from loralab.errors import RunFolderError
from loralab.reports.facts import Facts
from loralab.reports.wording import SPACE
from loralab.run import Json

_PARTS = (("adapter", "Adapter better"), ("tie", "Tie"), ("base", "Base better"))
_SHOWN_LOST = 8
_OUTCOMES = {"adapter preferred": "better", "base preferred": "worse"}


def describe_preference(facts: Facts) -> Json | None:
    """Return the section of a run's page, or None where nobody has judged.

    Raises:
        RunFolderError: `preference.json` is there but broken.
    """
    result = facts.preference
    if not result:
        return None
    try:
        return _section(result, own=is_own(facts))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunFolderError(
            f"{facts.folder.preference.name} does not hold a result: {error!r}",
            where=str(facts.folder.preference),
            fix="write it again: loralab judge RUN --result",
        ) from None


def is_own(facts: Facts) -> bool:
    """Return whether the votes are on the run's adapter as it is now, as far as is known."""
    hashes = facts.preference.get("adapter_sha256"), facts.record.get("adapter_sha256")
    return None in hashes or hashes[0] == hashes[1]


def _section(result: Json, *, own: bool) -> Json:
    lost = [row for row in result["rows"] if row["verdict"] == "base"]
    bars = [_bar("All items", result), *(_bar(rater["rater"], rater) for rater in result["raters"])]
    return {
        "own": own,
        "outcome": _OUTCOMES.get(result["verdict"], "none"),
        "headline": result["verdict"][:1].upper() + result["verdict"][1:],
        "sentence": _glued(summarize_preference(result)),
        "reason": _glued(_sentence(result["reason"])),
        "notes": [_glued(_sentence(line)) for line in preference_lines(result)[1:]],
        "legend": [(kind, words) for kind, words in _PARTS],
        "bars": bars if len(bars) != 2 or result["same"] else bars[:1],
        "lost": [_lost(row) for row in lost[:_SHOWN_LOST]],
        "lost_count": len(lost),
        "definitions": [(name.replace("_", " "), text) for name, text in result["definitions"].items()],
    }


def _lost(row: Mapping[str, Any]) -> Json:
    """Return an item whose base's answer was better: where to look for what the adapter spoiled."""
    votes = [f"{rater}: {str(vote).replace('_', ' ')}" for rater, vote in row["votes"].items()]
    return {
        "prompt": row["prompt"],
        "pictures": len(row["pictures"]),
        "answers": [("Base", "base", row["base_output"]), ("Adapter", "adapter", row["adapter_output"])],
        "votes": ", ".join(votes),
    }


def _bar(name: str, part: Mapping[str, Any]) -> Json:
    total = part["adapter"] + part["base"] + part["tie"]
    share, halves = part["share"], part["share_with_ties"]
    return {
        "name": name,
        "total": total,
        "parts": [
            {"kind": kind, "words": words, "count": part[kind], "width": round(100 * part[kind] / total, 2)}
            for kind, words in _PARTS
            if part[kind]
        ],
        "counts": [part[kind] for kind, _ in _PARTS],
        "share": _glued(format_percent_interval(share)),
        "halves": _glued(format_percent_interval(halves)),
        "p": format_p(part["sign_test_p"]),
    }


def format_percent_interval(share: Mapping[str, float | None], unit: str = " %") -> str:
    """Return a share in percent with its interval, such as `70 (48 to 85)`.

    Args:
        share: `value`, `low` and `high`.
        unit: behind the share.
    """
    value, low, high = (share[name] for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "-"
    return f"{100 * value:.0f}{unit} ({100 * low:.0f} to {100 * high:.0f})"


def format_p(p: float) -> str:
    """Return a p-value for a column of them.

    Args:
        p: the value.
    """
    return f"{p:.2g}" if p >= 0.001 else "<0.001"


def summarize_preference(result: Mapping[str, Any]) -> str:
    """Return who judged what, and what came out, in one sentence without names of raters.

    Args:
        result: content of `preference.json`.
    """
    raters, same = len(result["raters"]), result["same"]
    if not raters:
        return f"All {_count(same)} have the same text twice, so nobody had to judge."
    text = (
        f"{raters} rater{'' if raters == 1 else 's'} judged answers to {result['judged'] - same} prompts in "
        f"{result['votes']} votes, without knowing which was which"
        f"{f'; {same} more had the same answer twice' if same else ''}. The adapter's answer was better in "
        f"{result['adapter']}, the base's in {result['base']}, neither in {result['tie']}"
    )
    share = result["share"]
    if share["value"] is None:
        return f"{text}."
    return (
        f"{text}. The adapter's share of those with a better answer is {_percent(share['value'])} (95 % interval "
        f"{100 * share['low']:.0f} to {_percent(share['high'])}, sign test {_p(result['sign_test_p'])})."
    )


def preference_lines(result: Mapping[str, Any]) -> list[str]:
    """Return what a result allows to say and what weakens it.

    Args:
        result: content of `preference.json`.
    """
    return [f"{result['verdict']}: {result['reason']}", *_power(result), *_items(result), *_raters(result)]


def _power(result: Mapping[str, Any]) -> list[str]:
    if result["decided_needed"] is None:
        return []
    decided, needed = result["decided"], result["decided_needed"]
    share, power = (_percent(result["aim"][name]) for name in ("share", "power"))
    if decided < needed:
        return [
            f"to see a true share of {share} with a chance of {power} it takes {needed} decided items; "
            f"there are {decided}"
        ]
    return [
        f"a true share of {share} would have been seen with a chance of {power} or more: that takes {needed} decided "
        f"items, and there are {decided}"
    ]


def _items(result: Mapping[str, Any]) -> list[str]:
    lines = []
    if result["same"]:
        lines.append(f"{_count(result['same'])} with the same text twice: shown to nobody, counted as ties")
    if result["both_bad"]:
        lines.append(f"{_count(result['both_bad'])} with two bad answers, among the ties")
    if result["not_judged"]:
        lines.append(f"{_count(result['not_judged'])} judged by nobody: left out")
    if result["open"]:
        names = ", ".join(f"{each['rater']} ({each['votes']} votes)" for each in result["open"])
        lines.append(f"open sittings, not counted: {names}")
    return lines


def _raters(result: Mapping[str, Any]) -> list[str]:
    lines = [] if result["agreement"] is None else [_agreement(result["agreement"])]
    for rater in result["raters"]:
        position = rater["position"]
        if position["biased"]:
            lines.append(
                f"rater {rater['rater']} chose the left answer in {position['left']} of "
                f"{position['left'] + position['right']} decided votes ({_p(position['p'])}): a habit of position. "
                "Sides are drawn for every item, so it favours neither model; it adds noise"
            )
    return lines


def _agreement(agreement: Mapping[str, Any]) -> str:
    if not agreement["items"]:
        return f"agreement: there is no item that all {agreement['raters']} raters judged"
    words = f"agreement of {agreement['raters']} raters on {_count(agreement['items'])}: "
    words += f"{_percent(agreement['agreement'])} of pairs of votes are the same"
    if agreement["kappa"] is None:
        return f"{words}; {agreement['method']} is not defined, as all votes are the same"
    interval = "" if agreement["low"] is None else f" ({agreement['low']:.2f} to {agreement['high']:.2f})"
    return f"{words}, {agreement['method']} {agreement['kappa']:.2f}{interval}"


def _count(items: int) -> str:
    return f"{items} item{'' if items == 1 else 's'}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _p(p: float) -> str:
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def _sentence(line: str) -> str:
    return f"{line[:1].upper()}{line[1:]}." if not line.endswith(".") else line


def _glued(text: str) -> str:
    return text.replace(" %", f"{SPACE}%")
