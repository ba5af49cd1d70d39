"""What the page of a run says of its metrics by group, and of the same questions with grey pictures.

Owns the choice of groups that are shown. Figures and matrices are `metric_sections.py`'s.
"""

from loralab.reports.facts import Facts, dig, dig_list, dig_number, dig_table
from loralab.reports.metric_sections import describe_matrix, figure_row
from loralab.reports.wording import format_count
from loralab.run import Json

# Of more groups a table is no use to anybody; evaluation.json has all.
SHOWN_GROUPS = 20
_OTHER = "another answer"


def describe_groups(facts: Facts) -> Json | None:
    """Return the figures of each group, the largest first, or None where nothing was grouped.

    Args:
        facts: the run.
    """
    found = dig_table(facts.evaluation, "groups", "values")
    if not found:
        return None
    names = list(found)[:SHOWN_GROUPS]
    matrices = [(name, _confusion(dig_table(found, name, "confusion"))) for name in names]
    return {
        "by": str(dig(facts.evaluation, "groups", "by") or "group"),
        "reason": _sentence(str(dig(facts.evaluation, "groups", "reason") or "")),
        "rows": [
            {
                "name": name,
                "answers": format_count(dig_number(found, name, "answers")),
                "figures": _figures(dig_table(found, name)),
            }
            for name in names
        ],
        "more": len(found) - len(names),
        "notes": [note for name in names for note in _left_out(name, dig_table(found, name, "left_out"))],
        "matrices": [{"name": name, **matrix} for name, matrix in matrices if matrix is not None],
    }


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".")


def _figures(group: Json) -> list[Json]:
    sides = {"base": dig_table(group, "base", "metrics"), "adapter": dig_table(group, "metrics")}
    names = dict.fromkeys([*sides["adapter"], *sides["base"]])
    return [figure_row(name, sides, dig_table(group, "differences", name)) for name in names]


def _left_out(name: str, reasons: Json) -> list[str]:
    return [f"{name}: {metric} is not measured: {reason}." for metric, reason in reasons.items()]


def _confusion(table: Json) -> Json | None:
    """Return a group's confusion table as a matrix, with a column for other answers where there are any."""
    references, answers = dig_list(table, "references"), dig_list(table, "answers")
    counts, other = dig_list(table, "counts"), dig_list(table, "other")
    if any(other) and len(other) == len(counts):
        answers = [*answers, _OTHER]
        counts = [[*row, count] for row, count in zip(counts, other, strict=True) if isinstance(row, list)]
    return describe_matrix({"classes": references, "columns": answers, "confusion_matrix": counts})


def describe_blank(facts: Facts) -> Json | None:
    """Return what the adapter does with grey pictures beside what it does with the real ones, or None.

    Args:
        facts: the run.
    """
    blank = dig_table(facts.evaluation, "blank_images")
    if not blank:
        return None
    sides = {"base": dig_table(blank, "metrics"), "adapter": dig_table(facts.evaluation, "metrics")}
    differences = dig_table(blank, "differences")
    return {
        "note": str(blank.get("note") or ""),
        "rows": [figure_row(name, sides, dig_table(differences, name)) for name in sides["adapter"]],
    }
