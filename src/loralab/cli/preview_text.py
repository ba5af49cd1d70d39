"""What `preview` shows on a terminal: tokens in colours, figures, findings.

Owns marks and colours. Where there are no colours, brackets stand around what carries loss.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from loralab.console import printable
from loralab.reports.preview_wording import (
    describe_epoch,
    describe_finding,
    describe_lists,
    describe_pictures,
    describe_proofs,
    describe_row,
    describe_turn,
    list_places,
    split_table,
)

# Most tokens of a turn that are shown; of more, the beginning of the prompt is left out, then the answer's end.
_SHOWN_TOKENS = 1200
_SHOWN_FINDINGS = 3
_BAR_WIDTH = 36
# Two shades each, so that neighbouring tokens can be told apart.
_PROMPT = (Style(dim=True), Style(dim=True, italic=True))
_ANSWER = (Style(color="green"), Style(color="bright_green", bold=True))
_SPECIAL, _STOP = Style(color="cyan", dim=True), Style(color="magenta", bold=True, reverse=True)
_PICTURE = Style(color="blue", bold=True)
# Around what carries loss, where there are no colours.
_BRACKETS, _ASCII_BRACKETS = ("\u27e6", "\u27e7"), ("[[", "]]")


def print_preview(console: Console, result: dict[str, Any]) -> None:
    """Print rows, report and findings.

    Args:
        console: where to.
        result: of the workflow.
    """
    for row in result["rows"]:
        _print_row(console, row)
    _print_report(console, result["report"])
    _print_findings(console, result)


def _say(console: Console, text: str | Text = "") -> None:
    console.print(text if isinstance(text, Text) else Text(text), soft_wrap=True)


def _print_row(console: Console, row: dict[str, Any]) -> None:
    _say(console, Text(f"--- {printable(describe_row(row))}", style="bold"))
    for name, value in row.get("fields", {}).items():
        _say(console, printable(f"{name}: {value}"))
    turns = row.get("turns", [])
    coloured = console.color_system is not None and not console.no_color
    for number, turn in enumerate(turns, 1):
        if len(turns) > 1:
            _say(console, Text(describe_turn(turn, number), style="italic"))
        _say(console, _render_tokens(turn["tokens"], coloured=coloured, ascii_only=_plain(console)))
    _say(console)


def _plain(console: Console) -> bool:
    return bool(console.options.ascii_only)


def _render_tokens(tokens: Sequence[dict[str, Any]], *, coloured: bool, ascii_only: bool) -> Text:
    text, left_out = Text(), 0
    begin, end = _ASCII_BRACKETS if ascii_only else _BRACKETS
    if len(tokens) > _SHOWN_TOKENS:
        prompt = sum(not token["supervised"] for token in tokens)
        left_out = min(len(tokens) - _SHOWN_TOKENS, prompt)
        text.append(f"... {left_out:,} tokens ... ")
    shown = tokens[left_out : left_out + _SHOWN_TOKENS]
    before = False
    for number, token in enumerate(shown):
        if token["supervised"] != before and not coloured:
            text.append(begin if token["supervised"] else end)
        before = token["supervised"]
        shows = printable(token["text"]) if "picture" in token else _visible(token["text"], ascii_only=ascii_only)
        text.append(shows, style=_style(token, number))
    if before and not coloured:
        text.append(end)
    if len(tokens) > left_out + len(shown):
        text.append(f" ... {len(tokens) - left_out - len(shown):,} tokens")
    return text


def _style(token: dict[str, Any], number: int) -> Style:
    if token["stop"]:
        return _STOP
    if "picture" in token:
        return _PICTURE
    if token["special"] and not token["supervised"]:
        return _SPECIAL
    return (_ANSWER if token["supervised"] else _PROMPT)[number % 2]


def _visible(text: str, *, ascii_only: bool) -> str:
    """Return text with blanks and line breaks that can be seen."""
    if ascii_only:
        return printable(text).replace("\n", "\\n\n").replace("\t", "\\t")
    return printable(text.replace("\t", "\u2192")).replace(" ", "\u00b7").replace("\n", "\u21b5\n")


def _print_report(console: Console, report: dict[str, Any]) -> None:
    _say(console, Text("--- data", style="bold"))
    template, stops = report["template"], report["stop_tokens"]
    _say(console, f"format {report['format']['value']}; template {template['name']} ({template['reason']})")
    _say(console, printable(f"generation stops on {', '.join(map(repr, stops['texts']))} ({stops['reason']})"))
    table = Table("", *report["splits"], box=None, pad_edge=False)
    for name in range(1, len(report["splits"]) + 1):
        table.columns[name].justify = "right"
    for label, cells in split_table(report["splits"]):
        table.add_row(Text(label), *map(Text, cells))
    console.print(table)
    # Those of the other splits are in the page and the JSON document.
    name, facts = next(iter(report["splits"].items()))
    _print_bars(console, f"{name}: rows by length in tokens", facts["length_histogram"], percent=False)
    title = f"{name}: rows by share of tokens that carry loss"
    _print_bars(console, title, facts["coverage_histogram"], percent=True)
    for line in describe_pictures(report):
        _say(console, printable(line))
    for line in describe_lists(report):
        _say(console, printable(line))
    for line in describe_epoch(report["epoch"]):
        _say(console, line)
    _say(console)


def _print_bars(console: Console, title: str, histogram: dict[str, Any], *, percent: bool) -> None:
    counts, edges = histogram["counts"], histogram["edges"]
    if not any(counts):
        return
    _say(console, title)
    mark = "#" if _plain(console) else "\u2588"
    for start, end, count in zip(edges, edges[1:], counts, strict=False):
        label = f"{start:.0%} to {end:.0%}" if percent else f"{start:,.0f} to {end - 1:,.0f}"
        bar = mark * max(round(_BAR_WIDTH * count / max(counts)), 1 if count else 0)
        _say(console, f"  {label:>16} {count:>9,} {bar}".rstrip())


def _print_findings(console: Console, result: dict[str, Any]) -> None:
    _say(console, Text("--- proofs", style="bold"))
    for group in result["findings"]:
        head = Text(f"{group['severity']}: ", style="bold red" if group["severity"] == "error" else "yellow")
        head.append(f"{group['title']} ({group['count']:,})", style="bold")
        _say(console, head)
        for entry in group["rows"][:_SHOWN_FINDINGS]:
            _say(console, printable(f"  {describe_finding(entry)}"))
        if group["count"] > _SHOWN_FINDINGS:
            _say(console, f"  rows: {list_places(group['rows'], group['count'])}")
        _say(console, f"  fix: {group['fix']}")
    _say(console, describe_proofs(result["proofs"]))
