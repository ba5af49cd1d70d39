"""What can be said of a sweep: the best run, and how sure that is."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.reports.wording import format_number

_SEED = "training.seed"
_LONGEST_LABEL = 22


def read_sweep(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the best run of a sweep and what speaks against taking it for the best.

    Args:
        content: of `sweep.json`.

    Returns:
        `best` (its name, or None), `order` (names, the best first) and `cautions` (sentences).
    """
    runs = [entry for entry in content["runs"] if entry["status"] == "completed"]
    sign = 1 if content["mode"] == "min" else -1
    ordered = sorted(runs, key=lambda entry: (sign * entry["metric"], entry["number"]))
    if not ordered:
        return {"best": None, "order": [], "cautions": ["No run has been completed.", *_lacking(content)]}
    cautions = [_noise(content["metric"], ordered), _seeds(runs, content), _rows(runs), _edge(content, ordered[0])]
    cautions += _lacking(content)
    return {
        "best": ordered[0]["name"],
        "order": [entry["name"] for entry in ordered],
        "cautions": [text for text in cautions if text],
    }


def _lacking(content: Mapping[str, Any]) -> list[str]:
    """Say how many runs failed, and how many have not come to their end."""
    states, found = [entry["status"] for entry in content["runs"]], []
    failed = states.count("failed")
    waiting = len(states) - failed - states.count("completed")
    if failed:
        found.append(f"{failed} of {len(states)} runs failed.")
    if waiting:
        found.append(f"{waiting} of {len(states)} runs not at their end yet.")
    return found


def _noise(metric: str, ordered: Sequence[Mapping[str, Any]]) -> str:
    best, others = ordered[0], ordered[1:]
    if not others:
        return ""
    if best["interval"] is None:
        return f"No interval of {metric} is known: small differences between runs may be chance."
    low, high = best["interval"]
    near = [f"{entry['number']:03}" for entry in others if low <= entry["metric"] <= high]
    if not near:
        return ""
    whose, who = ("Its", "it") if len(near) == 1 else ("Their", "they")
    return (
        f"Within the noise of the validation rows: {', '.join(near)}. {whose} {metric} lies within the 95 % interval "
        f"of {best['number']:03} ({format_number(low)} to {format_number(high)}), so {who} may be as good."
    )


def _seeds(runs: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> str:
    """Say how far runs lie apart that differ by their seed alone."""
    if _SEED not in content["space"]:
        return ""
    groups: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for entry in runs:
        key = tuple((name, value) for name, value in entry["settings"].items() if name != _SEED)
        groups.setdefault(key, []).append(entry["metric"])
    spread = max((max(values) - min(values) for values in groups.values() if len(values) > 1), default=None)
    if spread is None:
        return ""
    metric = content["metric"]
    return (
        f"Runs that differ by their seed alone lie up to {format_number(spread)} apart in {metric}; less says nothing."
    )


def _rows(runs: Sequence[Mapping[str, Any]]) -> str:
    if len({(entry["examples"], entry["supervised_tokens"]) for entry in runs}) <= 1:
        return ""
    return (
        "The runs were not measured on the same tokens: a setting changed rows or tokens, so losses cannot be compared."
    )


def _edge(content: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    """Say where the best value is the first or last of those with a result: a better one may lie beyond."""
    if content["search"] != "grid":
        return ""
    found = []
    for key, value in best["settings"].items():
        known = _numbers([entry for entry in content["runs"] if entry["status"] == "completed"], key)
        number = as_number(value)
        if key == _SEED or number is None or len(_numbers(content["runs"], key)) < 3:
            continue
        if number in (min(known), max(known)):
            found.append(f"{key}={value}")
    return f"At the edge of what has a result: {', '.join(found)}. A better value may lie beyond." if found else ""


def _numbers(runs: Sequence[Mapping[str, Any]], key: str) -> set[float]:
    return {number for entry in runs if (number := as_number(entry["settings"][key])) is not None}


def as_number(text: str) -> float | None:
    """Return a setting's value as a number, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def shorten(text: str) -> str:
    """Return a value without its middle where it is long."""
    if len(text) <= _LONGEST_LABEL:
        return text
    half = (_LONGEST_LABEL - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
