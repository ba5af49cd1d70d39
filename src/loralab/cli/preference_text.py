"""The result of a preference test as text: one small table, then what it allows to say.

Owns the words of the terminal; `preference.json` has all figures.
"""

from typing import Any

from rich.markup import escape
from rich.table import Table

from loralab.console import ResultConsole, printable


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
    table = Table("", "adapter", "base", "tie", "adapter's share", "ties as halves", "sign test")
    table.add_row(f"{result['judged']} items", *_cells(result))
    for rater in result["raters"]:
        table.add_row(escape(printable(f"{rater['rater']}, {rater['votes']} votes")), *_cells(rater))
    table.caption = "share of those with a better answer; 95 % intervals"
    return table


def _cells(part: dict[str, Any]) -> list[str]:
    counts = [str(part[name]) for name in ("adapter", "base", "tie")]
    return [*counts, _share(part["share"]), _share(part["share_with_ties"]), f"p = {part['sign_test_p']:.2g}"]


def _share(share: dict[str, Any]) -> str:
    if share["value"] is None:
        return "-"
    return f"{_percent(share['value'])}  {100 * share['low']:.0f} to {_percent(share['high'])}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def preference_lines(result: dict[str, Any]) -> list[str]:
    """Return what a result says, in sentences.

    Args:
        result: the content of `preference.json`.
    """
    lines = [f"{result['verdict']}: {result['reason']}"]
    if result["decided_needed"] is not None:
        aim = result["aim"]
        lines.append(
            f"to see a true share of {_percent(aim['share'])} with a chance of {_percent(aim['power'])} it takes "
            f"{result['decided_needed']} decided items; there are {result['decided']}"
        )
    lines += _about_items(result)
    lines += _about_raters(result)
    return lines


def _about_items(result: dict[str, Any]) -> list[str]:
    lines = []
    if result["same"]:
        lines.append(f"{_items(result['same'])} with the same text twice: a tie, shown to nobody")
    if result["both_bad"]:
        lines.append(f"{_items(result['both_bad'])} with two bad answers, among the ties")
    if result["not_judged"]:
        lines.append(f"{_items(result['not_judged'])} judged by nobody: left out")
    if result["open"]:
        names = ", ".join(f"{each['rater']} ({each['votes']} votes)" for each in result["open"])
        lines.append(f"open sittings, not counted: {names}")
    return lines


def _items(count: int) -> str:
    return f"{count} item{'' if count == 1 else 's'}"


def _about_raters(result: dict[str, Any]) -> list[str]:
    lines = []
    agreement = result["agreement"]
    if agreement is not None:
        lines.append(_agreement(agreement))
    for rater in result["raters"]:
        position = rater["position"]
        if position["biased"]:
            lines.append(
                f"{rater['rater']} chose the left answer in {position['left']} of "
                f"{position['left'] + position['right']} decided votes (p = {position['p']:.2g}): a habit of position. "
                "Sides are drawn for every item, so it favours neither model; it adds noise"
            )
    return lines


def _agreement(agreement: dict[str, Any]) -> str:
    if not agreement["items"]:
        return f"agreement: there is no item that all {agreement['raters']} raters judged"
    words = f"agreement of {agreement['raters']} raters on {_items(agreement['items'])}: "
    words += f"{_percent(agreement['agreement'])} of pairs of votes are the same"
    if agreement["kappa"] is None:
        return f"{words}; {agreement['method']} is not defined, as all votes are the same"
    interval = "" if agreement["low"] is None else f" ({agreement['low']:.2f} to {agreement['high']:.2f})"
    return f"{words}, {agreement['method']} {agreement['kappa']:.2f}{interval}"
