"""Metrics by group: the same figures and differences as of the whole, on the questions of one group at a time.

Owns what is measured of a group. Which group a question belongs to is handed in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loralab.errors import DataError
from loralab.evaluation.answers import Answered, Evidence
from loralab.evaluation.metrics.classes import plain_label
from loralab.evaluation.metrics.measure import Measurement, compare, measure
from loralab.evaluation.metrics.metric import Metric
from loralab.evaluation.questions import with_unit

# A confusion table of more different references would be none.
_MOST_REFERENCES = 20


def measure_groups(
    metrics: Mapping[str, Metric], adapter: Evidence, base: Evidence, names: Sequence[str], *, resamples: int
) -> dict[str, dict[str, Any]]:
    """Measure both sides on each group and compare them in pairs.

    Args:
        metrics: of answers, by name.
        adapter: answers with the adapter.
        base: answers without, to the same questions.
        names: group of each question.
        resamples: bootstrap resamples.

    Returns:
        By group, that of the most answers first: `rows`, `answers`, `metrics` of the adapter, `base` with its
        `metrics`, `differences`, `confusion` where there are at most 20 different references, and `left_out` with the
        reason for each metric that cannot be measured on the group.
    """
    members: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        members.setdefault(name, []).append(place)
    ordered = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: _measure_group(metrics, adapter, base, places, resamples) for name, places in ordered}


def _measure_group(
    metrics: Mapping[str, Metric], adapter: Evidence, base: Evidence, places: Sequence[int], resamples: int
) -> dict[str, Any]:
    ours, theirs = (_part(side, places) for side in (adapter, base))
    left_out = {name: reason for name, metric in metrics.items() if (reason := _misfit(metric, (ours, theirs)))}
    usable = {name: metric for name, metric in metrics.items() if name not in left_out}
    mine, other = (measure(usable, side, resamples=resamples) for side in (ours, theirs))
    confusion = _confusion(ours.answers)
    return {
        "rows": ours.units,
        "answers": len(ours.answers),
        "metrics": _figures(mine),
        "base": {"metrics": _figures(other)},
        "differences": compare(mine, other, resamples=resamples),
        **({} if confusion is None else {"confusion": confusion}),
        **({"left_out": left_out} if left_out else {}),
    }


def _figures(side: Measurement) -> dict[str, Any]:
    return {name: figure.as_dict() for name, figure in side.figures.items()}


def _part(side: Evidence, places: Sequence[int]) -> Evidence:
    """Return the answers at some places, their rows numbered anew."""
    units: dict[int, int] = {}
    chosen = [side.answers[place] for place in places]
    answers = [
        replace(each, question=with_unit(each.question, units.setdefault(each.question.unit, len(units))))
        for each in chosen
    ]
    return Evidence(units=len(units), way=side.way, answers=answers)


def _misfit(metric: Metric, sides: Sequence[Evidence]) -> str | None:
    """Return why a metric cannot be measured on a group, or None."""
    if metric.check is None:
        return None
    try:
        for side in sides:
            metric.check(side)
    except DataError as error:
        return error.problems[0].what
    return None


def _confusion(answers: Sequence[Answered]) -> dict[str, Any] | None:
    """Return how often each reference met each answer, or None where there are too many references."""
    pairs = [(plain_label(each.question.reference), plain_label(each.text)) for each in answers]
    known = sorted({reference for reference, _ in pairs})
    if len(known) > _MOST_REFERENCES:
        return None
    column = {label: index for index, label in enumerate(known)}
    counts, other = [[0] * len(known) for _ in known], [0] * len(known)
    for reference, answer in pairs:
        if answer in column:
            counts[column[reference]][column[answer]] += 1
        else:
            other[column[reference]] += 1
    return {"references": known, "answers": known, "counts": counts, "other": other}
