"""The result of a preference test as text: one small table, then what it allows to say.

Owns the table; the sentences are `reports/preference_section.py`'s, and `preference.json` has all figures.
"""

from typing import Any

from rich.markup import escape
from rich.table import Table

from loralab.console import ResultConsole, printable
from loralab.reports.preference_section import format_p, format_percent_interval, preference_lines


def print_preference(result: dict[str, Any]) -> None:
    """Print a result.

    Args:
        result: the content of `preference.json`.
    """
    console = ResultConsole(highlight=False)
    console.print(_table(result))
    for line in preference_lines(result):
        console.print(escape(printable(line)), soft_wrap=True)


def _table(result: dict[str, Any]) -> Table:
    table = Table("", "adapter", "base", "tie", "adapter's\nshare, %", "ties as\nhalves, %", "p")
    table.add_row(f"{result['judged']} items", *_cells(result))
    for rater in result["raters"]:
        table.add_row(escape(printable(f"{rater['rater']}: {rater['votes']}")), *_cells(rater))
    table.caption = "share of those with a better answer; 95 % intervals; p of the sign test"
    return table


def _cells(part: dict[str, Any]) -> list[str]:
    counts = [str(part[name]) for name in ("adapter", "base", "tie")]
    shares = (format_percent_interval(part[name], unit="") for name in ("share", "share_with_ties"))
    return [*counts, *shares, format_p(part["sign_test_p"])]
