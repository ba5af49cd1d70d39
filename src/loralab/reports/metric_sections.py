"""What the page of a run says of its task metrics, as plain values for templates.

Owns the choice and order of figures, confusion matrices and calibration. Examples are `examples.py`'s.
"""

from typing import Any

from loralab.config.metric_facts import FACTS, owner_of
from loralab.reports.facts import Facts, dig, dig_list, dig_number, dig_table
from loralab.reports.wording import MISSING, format_count, format_interval, format_measured, format_number
from loralab.run import Json

SIDES = (("base", "Base model"), ("adapter", "Adapter"))
WAYS = {
    "generate": "written by the model, token by token, as in use",
    "score": "the most likely of the closed labels; the model wrote nothing, so it could not say anything else",
    "teacher_forced": "the most likely token behind each of the reference\u2019s own tokens (teacher forcing)",
}
# Of more classes a matrix is no use to anybody; evaluation.json has all.
SHOWN_CLASSES = 20
# Percent of colour in a cell that holds its whole row: dark enough to be seen, pale enough to be read on.
DARKEST = 40
# From so many figures on, one of them being off by chance is likely enough to be said.
MANY_FIGURES = 5


def describe_metrics(facts: Facts) -> Json | None:
    """Return every figure of both sides with its interval, and what may be said of the difference; None without any.

    Args:
        facts: the run.
    """
    sides = {"base": dig_table(facts.evaluation, "base", "metrics"), "adapter": dig_table(facts.evaluation, "metrics")}
    names = list(dict.fromkeys([*sides["adapter"], *sides["base"]]))
    if not names:
        return None
    differences = dig_table(facts.evaluation, "differences")
    rows = [figure_row(name, sides, dig_table(differences, name)) for name in names]
    levels = [level for side in sides.values() for name in side if (level := dig_number(side, name, "level"))]
    return {
        "rows": rows,
        "summary": _summary(rows),
        "level": f"{100 * max(levels, default=0.95):.4g}\u00a0%",
        "methods": _methods(sides["adapter"] or sides["base"]),
        "tests": _tests(differences),
        "way": describe_way(facts),
        "many": len(differences) if len(differences) >= MANY_FIGURES else 0,
    }


def _summary(rows: list[Json]) -> str:
    """Return in one sentence what may be said of the headline figures."""
    kinds: dict[str, list[str]] = {}
    for row in rows:
        if row["headline"] and row["verdict"] != MISSING:
            kinds.setdefault(row["verdict"], []).append(row["name"])
    ordered = sorted(kinds.items(), key=lambda pair: {"better": 0, "worse": 1}.get(pair[0], 2))
    return "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in ordered)


def measured_figures(facts: Facts) -> set[str]:
    """Return the names of the figures that have an interval of their own."""
    return {*dig_table(facts.evaluation, "metrics"), *dig_table(facts.evaluation, "base", "metrics")}


def figure_row(name: str, sides: dict[str, Json], difference: Json) -> Json:
    """Return a figure of both sides, and what may be said of the difference.

    Args:
        name: of the figure.
        sides: figures of "base" and "adapter", by name.
        difference: of this figure.
    """
    owner = owner_of(name)
    figures = {side: dig_table(found, name) for side, found in sides.items()}
    better = next((str(each["better"]) for each in figures.values() if each.get("better")), "")
    counts = [dig_number(difference, "count"), *(dig_number(each, "count") for each in figures.values())]
    verdict = str(difference.get("verdict") or "")
    return {
        "name": name,
        "headline": owner is None or name in FACTS[owner].headline,
        "better": better or MISSING,
        "values": [_with_interval(figures[side]) for side, _ in SIDES],
        "difference": _with_interval(difference, signed=True) if difference else (MISSING, ""),
        "verdict": verdict or MISSING,
        "outcome": verdict if verdict in ("better", "worse") else "none",
        "reason": str(difference.get("reason") or ""),
        "count": format_count(next((count for count in counts if count is not None), None)),
    }


def _with_interval(figure: Json, *, signed: bool = False) -> tuple[str, str]:
    value, low, high = (dig_number(figure, key) for key in ("value", "low", "high"))
    return format_measured(value, low, high, signed=signed), format_interval(low, high, signed=signed)


def _methods(figures: Json) -> list[tuple[str, str]]:
    """Return each way of coming to an interval, or reason why there is none, with the figures it is of."""
    methods: dict[str, list[str]] = {}
    for name in figures:
        method = str(dig(figures, name, "method") or "")
        if method:
            methods.setdefault(method, []).append(name)
    return [(method[:1].upper() + method[1:], ", ".join(names)) for method, names in methods.items()]


def _tests(differences: Json) -> list[str]:
    tests = []
    for name in differences:
        test = dig_table(differences, name, "mcnemar")
        if test:
            adapter, base = (format_count(dig_number(test, f"only_{side}")) for side in ("adapter", "base"))
            p = format_number(dig_number(test, "p"), 2)
            tests.append(
                f"{name}: right only with the adapter {adapter}, right only without it {base}; "
                f"McNemar\u2019s exact p = {p}."
            )
    return tests


def describe_way(facts: Facts) -> Json | None:
    """Return how answers came about, or None where there were none."""
    way = dig(facts.evaluation, "answered_by")
    if not isinstance(way, str) or not way:
        return None
    rows = dig_number(facts.evaluation, "answered_rows")
    return {
        "name": way,
        "words": WAYS.get(way, ""),
        "rows": format_count(rows) if rows is not None else "",
        "note": str(dig(facts.evaluation, "note") or ""),
    }


def describe_details(facts: Facts) -> list[Json]:
    """Return, of each metric that has them, confusion matrices and calibration of both sides."""
    tables = {"base": dig_table(facts.evaluation, "base", "details"), "adapter": dig_table(facts.evaluation, "details")}
    found = []
    for metric in dict.fromkeys([*tables["adapter"], *tables["base"]]):
        matrices = [(title, describe_matrix(dig_table(tables[side], metric))) for side, title in SIDES]
        bins = [(title, _bins(dig_list(tables[side], metric, "bins"))) for side, title in SIDES]
        found.append(
            {
                "metric": metric,
                "matrices": [{"side": title, **matrix} for title, matrix in matrices if matrix],
                "bins": [{"side": title, "rows": rows} for title, rows in bins if rows],
            }
        )
    return [each for each in found if each["matrices"] or each["bins"]]


def describe_matrix(details: Json) -> Json | None:
    """Return a confusion matrix with the share of each row in each cell, or None where there is none.

    Args:
        details: `classes`, `columns` and the counts as `confusion_matrix`.
    """
    classes, columns = (dig_list(details, key) for key in ("classes", "columns"))
    counts = dig_list(details, "confusion_matrix")
    whole = bool(counts) and len(counts) == len(classes) and all(_is_row(row, len(columns)) for row in counts)
    if not whole:
        return None
    # Rows by their frequency, so that the most common classes are shown where there are too many.
    kept = sorted(sorted(range(len(classes)), key=lambda i: -sum(counts[i]))[:SHOWN_CLASSES])
    shown = [columns.index(classes[i]) for i in kept if classes[i] in columns]
    shown += [place for place in range(len(columns)) if place not in shown and columns[place] not in classes]
    return {
        "columns": [str(columns[place]) for place in shown],
        "more": len(classes) - len(kept),
        "rows": [
            {
                "name": str(classes[i]),
                "total": format_count(sum(counts[i])),
                "cells": [_cell(counts[i][p], sum(counts[i]), right=columns[p] == classes[i]) for p in shown],
            }
            for i in kept
        ],
    }


def _is_row(row: Any, width: int) -> bool:
    return isinstance(row, list) and len(row) == width and all(isinstance(n, int) and n >= 0 for n in row)


def _cell(count: int, total: int, *, right: bool) -> Json:
    share = count / total if total else 0.0
    return {"count": format_count(count), "shade": round(DARKEST * share), "right": right}


def _bins(bins: list[Any]) -> list[list[str]]:
    rows = []
    for each in bins:
        low, high, count = (dig_number(each, key) for key in ("above", "up_to", "answers"))
        confidence, accuracy = (dig_number(each, key) for key in ("confidence", "accuracy"))
        if None not in (low, high, count, confidence, accuracy):
            span = f"{format_number(low)} to {format_number(high)}"
            rows.append([span, format_count(count), f"{confidence:.3f}", f"{accuracy:.3f}"])
    return rows
